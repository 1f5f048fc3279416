"""Scaled fp8, weights that others quantised, and CLIP's names of every version."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hollow_core.errors import HollowError
from hollow_core.models.stored import StoredWeights, clip_weights, filled

FP8 = torch.float8_e4m3fn


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Its codes, as every tool makes them."""
    return (weight / scale).to(FP8)


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1)])
def test_scaled_fp8_is_read_as_it_is_meant(tmp_path: Path, end: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(8, 4, generator=torch.manual_seed(0)) / 2199
    rows = weight.abs().amax(1, keepdim=True) if 8 in shape else weight.abs().max()
    scale = rows / torch.finfo(FP8).max
    tensors = {
        "a.weight": scaled(weight, scale),
        f"a.{end}": scale.reshape(shape),
        "a.scale_input": torch.ones(()),
        "a.input_scale": torch.ones(()),
        "a.bias": torch.ones(8, dtype=torch.float16),
        "a.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
        "scaled_fp8": torch.tensor([], dtype=FP8),
        "b.weight": torch.ones(2, 2).to(FP8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = StoredWeights(tmp_path / "model.safetensors", torch.bfloat16)
    assert sorted(stored) == ["a.bias", "a.weight", "b.weight"]
    assert len(stored) == 3
    assert "scaled_fp8" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    torch.testing.assert_close(stored["a.weight"].float(), weight, rtol=0.08, atol=1e-6)
    assert torch.equal(stored["b.weight"].float(), torch.ones(2, 2))
    outlined = StoredWeights(tmp_path / "model.safetensors", torch.bfloat16, outlined=True)
    assert (outlined["a.weight"].is_meta, outlined["a.weight"].shape) == (True, weight.shape)
    with pytest.raises(KeyError):
        stored["a.scale_input"]


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(8, 4).to(FP8), "a.scale_weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(HollowError, match=r"scales a\.weight, which is \(8, 4\), by 4 numbers"):
        StoredWeights(tmp_path / "m.safetensors")["a.weight"]


@pytest.mark.parametrize(
    ("name", "tensor", "way"),
    [
        ("a.weight.absmax", torch.ones(1), "bitsandbytes"),
        ("a.weight.quant_state.bitsandbytes__nf4", torch.ones(1), "bitsandbytes"),
        ("a.SCB", torch.ones(1), "bitsandbytes"),
        ("a.qweight", torch.ones(1, dtype=torch.int32), "GPTQ"),
        ("a.weight_scale_2", torch.ones(1), "NVFP4"),
        ("a.weight_scale_inv", torch.ones(1), "fp8 in blocks"),
        ("a.weight._data", torch.ones(1), "quanto"),
        ("a.comfy_quant", torch.tensor(list(json.dumps({"format": "mxfp8"}).encode()), dtype=torch.uint8), "mxfp8"),
        ("a.comfy_quant", torch.tensor(list(b"?"), dtype=torch.uint8), "in a way that it does not tell"),
        ("a.weight", torch.ones(2, 2, dtype=torch.int8), "as I8"),
    ],
)
def test_what_others_quantised_is_named(tmp_path: Path, name: str, tensor: Tensor, way: str) -> None:
    save_file({name: tensor}, tmp_path / "m.safetensors")
    with pytest.raises(
        HollowError, match=rf"m\.safetensors is quantised on disk \({way}.*Get the model in plain weights"
    ):
        StoredWeights(tmp_path / "m.safetensors", outlined=True)


@pytest.mark.parametrize(
    ("known", "stored"), [("", "text_model."), ("text_model.", ""), ("", ""), ("text_model.",) * 2]
)
def test_clip_by_the_names_of_any_version(known: str, stored: str) -> None:
    module: nn.Module = nn.Linear(2, 2)
    for name in reversed(known.split(".")[:-1]):
        module = nn.ModuleDict({name: module})
    weights = {f"{stored}weight": torch.ones(2, 2), f"{stored}bias": torch.ones(2), "logit_scale": torch.ones(())}
    found = clip_weights(module, weights)
    assert found.keys() == module.state_dict().keys()
    filled(module, found, Path("x"))
    assert all(bool((tensor == 1).all()) for tensor in module.state_dict().values())
