"""A picture's caption, changed a little each time it is learned, so that no wording is learned with it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import HollowError


@dataclass(frozen=True)
class CaptionChanges:
    """How captions change from record to record. Raises HollowError for a value that cannot be."""

    dropout: float = 0.0
    """The share of records, from 0 to 1, that are learned without a caption."""
    shuffle_tags: bool = False
    """Whether the tags of a caption, the words between commas, come in a new order each time."""
    keep_tags: int = 1
    """So many tags, from the first on, stay where they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise HollowError(f"The caption dropout is {self.dropout:g}. Give a share from 0 to 1, such as 0.1.")
        if self.keep_tags < 0:
            raise HollowError(f"keep_tags is {self.keep_tags}. It must be 0 or more.")

    def of(self, caption: str, generator: torch.Generator) -> Iterator[str]:
        """The caption as it is each time, for ever."""
        tags = [tag.strip() for tag in caption.split(",")]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        while True:
            order = torch.randperm(len(others), generator=generator).tolist()
            dropped = torch.rand((), generator=generator).item() < self.dropout
            changed = ", ".join([*kept, *(others[place] for place in order)]) if self.shuffle_tags else caption
            yield "" if dropped else changed

    @property
    def any(self) -> bool:
        """Whether they change at all."""
        return self.dropout > 0 or self.shuffle_tags
