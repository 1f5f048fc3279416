"""The two prompts of the method: the personal one holds the identifier, the generic one does not."""

import re

from ..errors import HollowError


def personal_prompt(identifier: str, class_word: str) -> str:
    """The prompt that training learns, "a photo of a sks dog" (Hollowed Net, Sec. 4.1).

    Raises HollowError where a word is empty, or where both are the same.
    """
    identifier, class_word = identifier.strip(), class_word.strip()
    if not identifier:
        raise HollowError("The identifier is empty. Give a rare word for your subject, such as sks.")
    if not class_word:
        raise HollowError("The class word is empty. Name your subject by a common word, such as dog or cup.")
    if identifier.lower() == class_word.lower():
        raise HollowError(
            f"The identifier and the class word are both {class_word!r}. Give a rare word as identifier, such as sks."
        )
    return f"a photo of a {identifier} {class_word}"


def generic_prompt(personal: str, identifier: str) -> str:
    """The personal prompt without its identifier, "a photo of a dog": what the base path sees.

    A prompt without the identifier comes back as it is. Raises HollowError where nothing else is there.
    """
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
