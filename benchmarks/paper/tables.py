"""What all tables of RESULTS.md have."""

from collections.abc import Sequence

from .figures import NOT_MEASURED, Measured


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, without rows whose scores are not measured yet."""
    lines = [head, ["---"] * len(head), *(row for row in rows if NOT_MEASURED not in row[1:4])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compares(section: str) -> bool:
    """Whether there are two rows in a section's tables, or more."""
    return sum(line.startswith("| ") for line in section.splitlines()) >= 4


def trainings(measured: Measured) -> str:
    """How many each row of a table has."""
    subjects, n = len({subject for subject, _ in measured.keys}), len(measured.keys)
    return f"{n} training{'s' * (n != 1)} in each row, of {subjects} subject{'s' * (subjects != 1)}."
