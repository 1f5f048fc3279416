"""The numbers that random choices begin with: as in ComfyUI, whole ones from 0 to 2^64 - 1."""

from .errors import HollowError

SEEDS = 2**64
"""So many there are."""


def check_seed(seed: int) -> None:
    """Raises HollowError for a number that is no seed."""
    if not 0 <= seed < SEEDS:
        raise HollowError(f"There is no seed {seed}. Give a whole number from 0 to 2^64 - 1.")


def counted_up(seed: int, number: int) -> list[int]:
    """So many seeds, from this one on; behind the last seed is 0 again. Raises HollowError as `check_seed` does."""
    check_seed(seed)
    return [(seed + step) % SEEDS for step in range(number)]
