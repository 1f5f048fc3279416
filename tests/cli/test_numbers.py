"""Numbers that cannot be are refused, whichever command and option they are given to, before anything is made."""

import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import shallow_pipeline
from typer import Typer

from hollow_core.cli import main
from hollow_core.cli.app import app


def number_options(typer: Typer, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every command with each of its options that is a number, and with what no such number can be."""
    for group in typer.registered_groups:
        yield from number_options(group.typer_instance, f"{group.name} ")
    for command in typer.registered_commands:
        for param in signature(command.callback).parameters.values():
            for kind, value in {int: "-1", float: "nan"}.items():
                if getattr(param.annotation, "__origin__", None) in (kind, kind | None):
                    option = "--" + param.name.replace("_", "-")
                    yield f"{name}{command.callback.__name__}", option, value


CASES = list(number_options(app))
ZEROS = [  # where nothing would be made, or a 0 could be taken for none
    *(("sample", option, "0") for option in ("--images", "--width", "--height", "--refresh")),
    *((command, "--resolution", "0") for command in ("train", "plan", "benchmark")),
    *(("benchmark", option, "0") for option in ("--seeds", "--images")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a LoRA of it, and pictures with their prompts."""
    place = tmp_path_factory.mktemp("all")
    pipeline = shallow_pipeline("sd15")
    pipeline.save_pretrained(place / "model")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.shape
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, down), f"{name}.lora_up.weight": torch.ones(up, 1)},
        place / "lora.safetensors",
    )
    (place / "photos").mkdir()
    Image.new("RGB", (128, 128), (90, 60, 200)).save(place / "photos" / "0.png")
    (place / "prompts.txt").write_text("a sks dog")
    return place


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option", "value"), [*CASES, *ZEROS], ids=lambda each: each.replace(" ", "-"))
def test_a_number_that_cannot_be(
    command: str,
    option: str,
    value: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, lora, photos = folder / "model", folder / "lora.safetensors", folder / "photos"
    needed = {
        "train": [model, "--images", photos, "--subject", "dog"],
        "sample": [model, "--lora", lora, "--prompt", "a sks dog"],
        "plan": [model],
        "analyze": [lora, "--model", model],
        "benchmark": ["dreambooth", "--data", folder, "--model", model],
        "compare page": [
            *("--a", photos, "--b", photos),
            *("--references", photos, "--prompts", folder / "prompts.txt"),
        ],
    }[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hollow", *command.split(), *map(str, needed), f"{option}={value}"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code in (1, 2), said.out
    assert option in said.err or value in said.err
    assert list(tmp_path.iterdir()) == []


def test_there_are_numbers() -> None:
    assert len(CASES) > 50
