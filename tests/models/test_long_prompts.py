"""Prompts that are longer than CLIP reads at once: what is read of them, in chunks of 75 tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline
from transformers import CLIPTokenizer

from hollow_core.data.images import load_images
from hollow_core.errors import HollowError
from hollow_core.lora.file import LoraFile
from hollow_core.lora.metadata import recipe_for
from hollow_core.models.base_model import BaseModel, chunks_lacking, in_chunks, load, read_in_chunks
from hollow_core.models.layouts import FOLDER
from hollow_core.request import Request, check_heard
from hollow_core.sampling.sample import SampleSettings, sample, unheard

LONG = "a photo on grass, " * 20 + "of a sks dog"  # five tokens each time


@pytest.fixture(scope="module", params=["sd21", "sdxl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(folder)
    model = load(folder)
    assert isinstance(model, BaseModel)
    return model


@pytest.fixture
def model(loaded: BaseModel) -> BaseModel:
    """That reads one chunk."""
    read_in_chunks(loaded, 1)
    return loaded


def encoded(model: BaseModel, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the text encoders alone: token numbers 75 at a time, between begin and end, one chunk behind the other."""
    found: list[Any] = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        numbers = tokenizer(text, add_special_tokens=False).input_ids
        rows = [[tokenizer.bos_token_id, *numbers[i : i + 75], tokenizer.eos_token_id] for i in range(0, 150, 75)]
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows])
        with torch.no_grad():
            found.append(encoder(padded, output_hidden_states=True))
    if len(found) == 1:
        return found[0].last_hidden_state.reshape(1, 154, -1), None
    hidden = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
    return hidden.reshape(1, 154, -1), found[1].text_embeds[:1]


def test_chunks_are_what_the_usual_tools_read(model: BaseModel) -> None:
    read_in_chunks(model, 2)
    seen = model.encode_prompt(LONG)
    states, pooled = encoded(model, LONG)
    torch.testing.assert_close(seen.encoder_hidden_states, states, rtol=0, atol=1e-5)
    if pooled is not None:
        torch.testing.assert_close(seen.text_embeds, pooled, rtol=0, atol=1e-5)
    guided = model.encode_guided(LONG, "blurry", 7.5)
    assert torch.equal(guided["prompt_embeds"], seen.encoder_hidden_states)
    negative = model.encode_prompt("blurry")
    assert torch.equal(guided["negative_prompt_embeds"], negative.encoder_hidden_states)
    assert negative.encoder_hidden_states.shape == seen.encoder_hidden_states.shape


def test_an_identifier_that_is_not_read_is_refused_before_anything_starts(model: BaseModel, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "rex.png")
    (tmp_path / "rex.txt").write_text(LONG)
    request = Request(load_images(tmp_path, 64), "dog")
    with pytest.raises(HollowError, match=r"as far as 'sks' in the caption of .*png, .* or take --prompt-chunks 2\."):
        check_heard(model, request)
    check_heard(model, replace(request, identifier=""))  # a style has none
    read_in_chunks(model, 2)
    check_heard(model, request)
    read_in_chunks(model, 1)
    (tmp_path / "rex.txt").write_text("a sks dog, " + LONG)
    check_heard(model, replace(request, images=load_images(tmp_path, 64)))


def test_prompts_that_do_not_reach_their_identifier_are_known(model: BaseModel) -> None:
    lora = LoraFile({}, 1.0, recipe_for(3, "sks", "dog", "epsilon"), {})
    prompts = [LONG, "a sks dog", "sks", LONG.replace("sks ", ""), "a sks dog, " + LONG]
    assert unheard(model, prompts, lora) == [LONG]
    assert [chunks_lacking(model, prompt) for prompt in prompts] == [2, 0, 0, 2, 2]
    read_in_chunks(model, 2)
    assert unheard(model, prompts, lora) == []
    assert chunks_lacking(model, LONG) == 0
    assert unheard(model, [LONG], lora._replace(recipe=None)) == []


@pytest.mark.slow
def test_a_picture_is_drawn_of_the_whole_prompt(model: BaseModel) -> None:
    read_in_chunks(model, 2)
    settings = SampleSettings(steps=1, size=(64, 64), negative="blurry")
    one, other = sample(model, [LONG, LONG.replace("sks", "red")], [0, 0], settings)
    assert one.tobytes() != other.tobytes()
    read_in_chunks(model, 1)
    one, other = sample(model, [LONG, LONG.replace("sks", "red")], [0, 0], settings)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "text", ["", "a dog", LONG, "word " * 200, "w" * 3000, "写真の中の犬" * 60, "a " * 74 + "photography", "🐶" * 100]
)
def test_no_chunk_is_longer_than_is_read_and_no_letter_is_lost(text: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    chunks = in_chunks(text, tokenizer)
    assert all(len(tokenizer(chunk).input_ids) <= 77 for chunk in chunks)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    if " " in text:
        assert " ".join(chunks).split() == text.split()


def test_chunks_that_cannot_be_are_refused(model: BaseModel, transformer_folder: Callable[[str], Path]) -> None:
    with pytest.raises(HollowError, match="A prompt cannot be read in 0 chunks"):
        read_in_chunks(model, 0)
    with pytest.raises(HollowError, match=r"Transformers read long prompts at once\. Leave --prompt-chunks out"):
        read_in_chunks(load(transformer_folder("z-image")), 2)


@pytest.mark.parametrize("name", ["flux", "z-image", "sd3"])
def test_transformers_know_what_they_read(transformer_folder: Callable[[str], Path], name: str) -> None:
    model = load(transformer_folder(name))
    assert model.tokens("a sks dog") != model.tokens("a dog")
    assert model.tokens("word " * 3000 + "sks dog") == model.tokens("word " * 3000 + "dog")
