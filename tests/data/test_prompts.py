"""Prompts: the identifier goes without a trace, and empty words are refused."""

import pytest

from hollow_core.data.prompts import generic_prompt, personal_prompt
from hollow_core.errors import HollowError


def test_personal_prompt_is_the_papers() -> None:
    assert personal_prompt("sks", " dog ") == "a photo of a sks dog"


@pytest.mark.parametrize(
    ("identifier", "class_word", "prompt"),
    [
        ("sks", "a cup", "a photo of a sks cup"),
        ("sks", "The  tabby cat", "a photo of a sks tabby cat"),
        ("sks", "my an owl", "a photo of a sks owl"),
        ("", "a cup", "a photo of a cup"),
        ("", "owl", "a photo of an owl"),
        ("", "unicorn", "a photo of a unicorn"),
        ("", "hourglass", "a photo of an hourglass"),
        ("ohwx", "owl", "a photo of a ohwx owl"),
        ("sks", "shoes", "a photo of sks shoes"),
        ("", "some sneakers", "a photo of sneakers"),
        ("sks", "dress", "a photo of a sks dress"),
        ("sks", "bus", "a photo of a sks bus"),
        ("sks, xyz", "a dog, the cat", "a photo of a sks dog, xyz cat"),
        ("my own", "cup of tea", "a photo of a my own cup of tea"),
        ("sks", "theatre", "a photo of a sks theatre"),
    ],
)
def test_a_class_word_may_come_with_an_article(identifier: str, class_word: str, prompt: str) -> None:
    assert personal_prompt(identifier, class_word) == prompt


@pytest.mark.parametrize(
    ("personal", "generic"),
    [
        ("a photo of sks's dog", "a photo of dog"),
        ("sks’s dog on grass", "dog on grass"),
        ("a photo of SKS's dog, SKS' ball", "a photo of dog, ball"),
        ("a sks owl, and an sks dog", "an owl, and a dog"),
        ("A sks owl", "An owl"),
        ("a sks unicorn with an sks hourglass", "a unicorn with an hourglass"),
        ("a photo of a sks, on grass", "a photo of, on grass"),
        ("sks: a dog on grass", "a dog on grass"),
        ("sks - a dog", "a dog"),
        ("Sks, dog, grass", "dog, grass"),
        ("dog, grass, sks!", "dog, grass!"),
        ("a dog called 'sks'", "a dog called"),
        ('a dog called "sks dog"', 'a dog called "dog"'),
        ("a (sks:1.3) owl, ((sks)), [sks], {sks} and <sks>", "an owl, and"),
        ("grass (sks, dog), ball (dog, sks)", "grass (dog), ball (dog)"),
        ("two sks dogs\nand a sks\tapple", "two dogs and an apple"),
        ("it's a sks dog", "it's a dog"),
    ],
)
def test_nothing_of_the_identifier_stays(personal: str, generic: str) -> None:
    assert generic_prompt(personal, "sks") == generic


def test_of_identifiers_that_hold_one_another_each_goes_whole() -> None:
    assert generic_prompt("a red sks dog and a sks cat", "sks, red sks") == "a dog and a cat"


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
