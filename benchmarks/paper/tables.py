"""What all tables of RESULTS.md have."""

from collections.abc import Sequence

from .figures import Measured


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def trainings(measured: Measured) -> str:
    """How many each row of a table has."""
    subjects, n = len({subject for subject, _ in measured.keys}), len(measured.keys)
    return f"{n} training{'s' * (n != 1)} in each row, of {subjects} subject{'s' * (subjects != 1)}."
