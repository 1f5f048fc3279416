"""The two prompts of the method: the personal one holds the identifier, the generic one does not."""

import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

from ..errors import HollowError


class Subject(NamedTuple):
    """What is learned, in words."""

    identifier: str
    """The rare word by which prompts will call it: "sks". Empty for a style or a concept, which is to be there in
    whatever is drawn: then both prompts are the same. Those of several subjects are separated by commas."""
    class_word: str
    """What it is, in a common word: "dog". May be empty where every picture has a caption."""

    @property
    def called(self) -> str:
        """Both words, of several subjects with commas between: "sks dog"."""
        identifiers, classes = (words.split(",") for words in self)
        pairs = [
            f"{one.strip()} {other.strip()}".strip() for one, other in zip_longest(identifiers, classes, fillvalue="")
        ]
        return ", ".join(pair for pair in pairs if pair)

    @classmethod
    def all_of(cls, subjects: "Iterable[Subject]") -> "Subject":
        """Several as one, each once."""
        identifiers, classes = zip(*dict.fromkeys(subjects), strict=True)
        return cls(", ".join(identifiers), ", ".join(classes))


def personal_prompt(identifier: str, class_word: str) -> str:
    """The prompt that training learns, "a photo of a sks dog" (Hollowed Net, Sec. 4.1).

    Without an identifier it is the generic one. Raises HollowError where the class word is empty, or both are the same.
    """
    identifier, class_word = identifier.strip(), class_word.strip()
    if not class_word:
        raise HollowError("The class word is empty. Name your subject by a common word, such as dog or cup.")
    if identifier.lower() == class_word.lower():
        raise HollowError(
            f"The identifier and the class word are both {class_word!r}. Give a rare word as identifier, such as sks."
        )
    return f"a photo of a {Subject(identifier, class_word).called}"


def generic_prompt(personal: str, identifier: str) -> str:
    """The personal prompt without its identifier, "a photo of a dog": what the base path sees.

    `identifier` may be several words separated by commas, each of which goes. A prompt without any, and any where the
    identifier is empty, comes back as it is. Raises HollowError where nothing else is there.
    """
    for one in identifier.split(","):
        personal = _without(personal, one)
    return personal


def _without(personal: str, identifier: str) -> str:
    words = r"\s+".join(re.escape(word) for word in identifier.split())
    if not words:
        return personal
    generic, found = re.subn(rf"(?<![\w-]){words}(?![\w-])", "", personal, flags=re.IGNORECASE)
    if not found:
        return personal
    generic = re.sub(r"\s+", " ", generic)
    generic = re.sub(r" ([,.;:!?)])", r"\1", re.sub(r"\( ", "(", generic))
    generic = re.sub(r"([,;])(?: ?[,;])+", r"\1", generic).strip(" ,;")
    if not re.search(r"\w", generic):
        raise HollowError(
            f"The prompt {personal!r} holds only the identifier {identifier!r}. Add the class word behind it."
        )
    return generic
