"""Prompts: the identifier goes without a trace, and empty words are refused."""

import pytest

from hollow_core.data.prompts import generic_prompt, personal_prompt
from hollow_core.errors import HollowError


def test_personal_prompt_is_the_papers() -> None:
    assert personal_prompt("sks", " dog ") == "a photo of a sks dog"


@pytest.mark.parametrize(
    ("personal", "generic"),
    [
        ("a photo of a sks dog", "a photo of a dog"),
        ("sks dog on grass", "dog on grass"),
        ("a dog, sks, on grass", "a dog, on grass"),
        ("A  SKS  dog", "A dog"),
        ("a (sks dog:1.2) at the beach", "a (dog:1.2) at the beach"),
        ("a sks-like dog and a mysks dog", "a sks-like dog and a mysks dog"),
        ("a photo of a dog", "a photo of a dog"),
        ("a dog by sks.", "a dog by."),
    ],
)
def test_generic_prompt_drops_whole_words_only(personal: str, generic: str) -> None:
    assert generic_prompt(personal, "sks") == generic


def test_identifier_of_two_words() -> None:
    assert generic_prompt("a photo of my  own cup", "my own") == "a photo of cup"


@pytest.mark.parametrize(
    ("identifier", "class_word", "sentence"),
    [
        ("sks", "", "The class word is empty. Name your subject"),
        ("sks", "  ", "The class word is empty. Name your subject"),
        ("Dog", "dog", "are both 'dog'. Give a rare word as identifier"),
    ],
)
def test_unusable_words_are_refused(identifier: str, class_word: str, sentence: str) -> None:
    with pytest.raises(HollowError, match=sentence):
        personal_prompt(identifier, class_word)


def test_nothing_but_the_identifier_is_refused() -> None:
    with pytest.raises(HollowError, match=r"holds only the identifier 'sks'. Add the class word"):
        generic_prompt("sks, ", "sks")
