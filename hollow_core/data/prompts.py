"""The two prompts of the method: the personal one holds the identifier, the generic one does not."""

import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

from ..errors import HollowError

_DETERMINER = re.compile(r"^(?:(?:an?|the|my|your|his|her|our|their|this|that|these|those|some)\s+)+", re.IGNORECASE)
_PLURAL = re.compile(r"(?<![ius])s$", re.IGNORECASE)  # shoes and glasses, but no bus, dress or iris
_VOWEL = re.compile(  # as it is spoken: an hour, a unicorn
    r"(?!uni(?![mn])|us[aeu]|uk[ue]|ute|ufo|eu|ewe|onc?e\b)(?:[aeiou]|hour|hono|honest|heir)", re.IGNORECASE
)


class Subject(NamedTuple):
    """What is learned, in words."""

    identifier: str
    """The rare word by which prompts will call it: "sks". Empty for a style or a concept, which is to be there in
    whatever is drawn: then both prompts are the same. Those of several subjects are separated by commas."""
    class_word: str
    """What it is, in a common word: "dog". May be empty where every picture has a caption."""

    @property
    def bare(self) -> "Subject":
        """The same with class words alone, as people may write "a cup" where cup is meant."""
        classes = [_DETERMINER.sub("", word.strip()) for word in self.class_word.split(",")]
        return Subject(self.identifier.strip(), ", ".join(classes) if any(classes) else self.class_word)

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

    Without an identifier it is the generic one. There is no article before what ends as a plural does. Raises
    HollowError where the class word is empty, or both are the same.
    """
    subject = Subject(identifier, class_word).bare
    if not subject.class_word.strip():
        raise HollowError("The class word is empty. Name your subject by a common word, such as dog or cup.")
    if subject.identifier.lower() == subject.class_word.lower():
        raise HollowError(
            f"The identifier and the class word are both {subject.class_word!r}. Give a rare word as identifier, such "
            "as sks."
        )
    called = subject.called
    if _PLURAL.search(called.split(",")[0]):
        return f"a photo of {called}"
    return f"a photo of {'a' if subject.identifier else _article(called)} {called}"


def generic_prompt(personal: str, identifier: str) -> str:
    """The personal prompt without its identifier, "a photo of a dog": what the base path sees.

    `identifier` may be several words separated by commas, each of which goes, with the s of "sks's", with brackets or
    quotation marks that hold nothing else, and an article before it suits what follows: "a sks owl" is "an owl". A
    prompt without any, and any where the identifier is empty, comes back as it is. Raises HollowError where nothing
    else is there.
    """
    for one in sorted(identifier.split(","), key=len, reverse=True):
        personal = _without(personal, one)
    return personal


def _without(personal: str, identifier: str) -> str:
    words = r"\s+".join(re.escape(word) for word in identifier.split())
    if not words:
        return personal
    word = rf"(?<![\w-]){words}(?![\w-])"
    quoted = rf"""[("'“‘«\[{{<]\s*{word}\s*(?::[\d.]+)?\s*[)"'”’»\]}}>]"""
    owning = rf"{word}(?:['’ʼ](?:s(?!\w)|(?=\s)))?"
    generic, found = re.subn(
        rf"(?:(?<![\w-])(an?)\s+)?(?:{quoted}|{owning})\s*", _article_for_the_rest, personal, flags=re.IGNORECASE
    )
    if not found:
        return personal
    generic = re.sub(r"\(\s*(?::[\d.]+)?\s*\)|\[\s*\]|\{\s*\}", "", generic)
    generic = re.sub(r"\s+", " ", generic)
    generic = re.sub(r" ([,.;:!?)])", r"\1", generic)
    generic = re.sub(r"([(\[{])[\s,;]+", r"\1", generic)
    generic = re.sub(r"[,;]([.!?)\]}])", r"\1", generic)
    generic = re.sub(r"([,;])(?: ?[,;])+", r"\1", generic).rstrip(" ,;").lstrip(" ,;:.!?/–—-")
    if not re.search(r"\w", generic):
        raise HollowError(
            f"The prompt {personal!r} holds only the identifier {identifier!r}. Add the class word behind it."
        )
    return generic


def _article_for_the_rest(found: re.Match[str]) -> str:
    """What stands in the place of an identifier and of an article before it."""
    next_word = re.match(r"""["'“‘«(\[]*(\w+)""", found.string[found.end() :])
    if found[1] is None or next_word is None:
        return ""
    article = _article(next_word[1])
    return f"{article.capitalize() if found[1][0] == 'A' else article} "


def _article(word: str) -> str:
    """a or an, before this word."""
    return "an" if _VOWEL.match(word) else "a"
