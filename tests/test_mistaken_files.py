"""What is said of files that are not what their name says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hollow_core.errors import HollowError
from hollow_core.files import read_object, read_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4265380512\n"


def refusal(path: Path) -> str:
    with pytest.raises(HollowError) as refused:
        read_safetensors(path)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a whole safetensors file: it is empty. Get"),
        (POINTER, 'it is a git-lfs pointer to one. Run "git lfs pull"'),
        (b"\n<!DOCTYPE html>\n<html>\xe2\x80\xa6", "it is a web page. Download the file itself"),
        (b"\xef\xbb\xbf<html lang='en'>", "it is a web page. Download the file itself"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "it is a web page"),
        (
            b"Access to model x is restricted.\nPlease log in.",
            "it is a text: 'Access to model x is restricted. Please",
        ),
        (b'{"error":"Unauthorized"}', "it is a text: "),
        (b"PK\x03\x04\x00\x00archive/data.pkl", "it is a pickle or zip (.ckpt, .pt, .bin). Those are never read"),
        (b"\x80\x02}q\x00X\n\x00\x00\x00", "it is a pickle or zip (.ckpt, .pt, .bin). Those are never read"),
        (b"GGUF\x03\x00\x00\x00", "it is a GGUF file. Get the model as .safetensors"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "it ends after 9 bytes of at least 24. Download or copy it again"),
        (b"\x00\xff\x01", "is not a whole safetensors file ("),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + 15 * b"\xff", "is not a whole safetensors file ("),
    ],
)
def test_what_a_file_is_instead(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert sentence in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.001])
def test_a_download_that_broke_off(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"weight {number}": torch.zeros(100, 10) for number in range(50)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert f"it ends after {int(kept * len(whole))} bytes of at least " in refusal(path)
    if kept > 0.1:
        assert f"at least {len(whole)}. Download or copy it again" in refusal(path)


def test_a_folder_and_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "is a folder, not a safetensors file. Give a file in it" in refusal(tmp_path)
    assert "does not exist. Check the path" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(["StableDiffusionPipeline"]), "is no JSON object but a list. Get it again"),
        ("null", "is no JSON object but a NoneType"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": 1,', "is not valid JSON"),
        (POINTER.decode(), "is not valid JSON"),
    ],
)
def test_configs_that_are_no_objects(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HollowError, match=sentence):
        read_object(tmp_path / "config.json")
