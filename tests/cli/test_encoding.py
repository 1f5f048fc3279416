"""What the command says where the terminal, or a file behind it, cannot show every sign."""

import io
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hollow_core.cli import main


def said(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> tuple[str, str]:
    """By the command with these arguments, on stdout and stderr of an encoding that are strict, as stdout is where
    Windows redirects it."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(sys, "argv", ["hollow", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return out, err


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Of SD1.5's true shape, in a folder that cp1252 cannot name."""
    file = tmp_path / "猫" / "rex.safetensors"
    file.parent.mkdir()
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(1280, 2)}, file)
    return file


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp932"])
def test_what_a_file_holds(lora: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = said(monkeypatch, encoding, "convert", lora, lora.with_name("out.safetensors"), "--json")
    assert '"layers": 1' in out
    if encoding == "cp932":  # which has both
        assert "猫" in err
        assert "the largest |ΔW| is 2" in err
    else:
        assert r"\u732b" in err
        assert "the largest |dW| is 2" in err


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_tables(lora: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = said(monkeypatch, encoding, "analyze", lora)
    assert "mean |dW|" in out
    row = next(
        line for line in said(monkeypatch, encoding, "cuts", "sd15", "--cut", "3")[0].splitlines() if "3-3" in line
    )
    assert ("3-3 … 6-4" if encoding == "cp1252" else "3-3 ... 6-4") in row


@pytest.mark.parametrize("command", ["train", "sample", "plan", "analyze", "evaluate", "benchmark", "scale", "demo"])
def test_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = said(monkeypatch, "ascii", command, "--help")
    assert "--json" in out
    assert err == ""
