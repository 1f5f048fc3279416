"""A thousand damaged files, each refused in a sentence, and none of what their headers claim is allocated."""

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_unets import make_tiny_unet

from hollow_core.errors import HollowError
from hollow_core.lora import file as lora_file
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import DIALECTS, Lora, weight_shapes

CONFIG = dict(make_tiny_unet("sd15", layers_per_block=1).config)
GIB = 2**30

Damage = Callable[[Path, random.Random], object]


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def put(path: Path, header: dict[str, Any] | bytes, numbers: bytes, length: int | None = None) -> None:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + numbers)


def an_entry(header: dict[str, Any], choose: random.Random, ends: str = "") -> dict[str, Any]:
    return header[choose.choice([key for key in header if key.endswith(ends) and key != "__metadata__"])]


def truncated(path: Path, choose: random.Random) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: choose.randrange(len(whole))])


def header_of_any_length(path: Path, choose: random.Random) -> None:
    header, numbers = split(path)
    length = choose.choice([0, 1, 5 * GIB, 2**63, 2**64 - 1, choose.randrange(10**8), path.stat().st_size])
    put(path, header, numbers, length)


def header_of_junk(path: Path, choose: random.Random) -> None:
    _, numbers = split(path)
    junk = [choose.randbytes(100), b"[" * 1000, b"{}}", b"null", b'"text"', b"[1, 2]", b"\xff\xfe{}", b""]
    put(path, choose.choice(junk), numbers)


def five_gigabytes_claimed(path: Path, choose: random.Random) -> None:
    header, numbers = split(path)
    entry = an_entry(header, choose)
    size = {"F16": 2, "F32": 4}[entry["dtype"]]
    entry["shape"] = choose.choice([[5 * GIB // size], [2, 5 * GIB // size // 2], [2**40, 2**40]])
    entry["data_offsets"] = [0, 5 * GIB]
    put(path, header, numbers)


def offsets_astray(path: Path, choose: random.Random) -> None:
    header, numbers = split(path)
    entry = an_entry(header, choose)
    first, last = entry["data_offsets"]
    entry["data_offsets"] = choose.choice([[last, first], [first, last + 2], [-1, last], [first, 2**62], [0, 0], "ab"])
    put(path, header, numbers)


def numbers_of_another_kind(path: Path, choose: random.Random) -> None:
    header, numbers = split(path)
    an_entry(header, choose, "weight")["dtype"] = choose.choice(["F64", "BOOL", "F4", "C64", "I16", "U16", "", 7, None])
    put(path, header, numbers)


def changed(path: Path, change: Callable[[dict[str, torch.Tensor], str], object], key: str) -> None:
    tensors = load_file(path)
    change(tensors, key)
    save_file(tensors, path)


def other_shapes(path: Path, choose: random.Random) -> None:
    tensors = load_file(path)
    key = choose.choice([key for key in sorted(tensors) if tensors[key].dim() > 1])
    out, into = tensors[key].shape[:2]
    shapes = [(), (0,), (0, into), (out, 0), (out,), (out + 1, into), (out, into + 3), (out, into, 2, 2, 2), (99, 1)]
    shape = choose.choice(shapes)
    changed(path, lambda t, k: t.update({k: torch.zeros(shape, dtype=torch.float16)}), key)


def not_numbers(path: Path, choose: random.Random) -> None:
    value = choose.choice([float("nan"), float("inf"), -float("inf")])
    key = choose.choice(sorted(load_file(path)))
    changed(path, lambda t, k: t[k].view(-1)[choose.randrange(t[k].numel()) :].fill_(value), key)


def a_part_missing(path: Path, choose: random.Random) -> None:
    key = choose.choice([key for key in sorted(load_file(path)) if key.endswith("weight")])
    changed(path, lambda t, k: t.pop(k), key)


def foreign_keys(path: Path, choose: random.Random) -> None:
    keys = [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "unet.down_blocks.9.attentions.0.to_q.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_unet_conv_in.hada_w1_a",
        "lora_unet_conv_in.lokr_w1",
        "lora_unet_conv_in.diff",
        "first_stage_model.encoder.conv_in.weight",
        "",
        "\x00",
        "..",
    ]
    changed(path, lambda t, k: t.update({k: torch.zeros(2, 2)}), choose.choice(keys))


def adapters_of_junk(path: Path, choose: random.Random) -> None:
    """What diffusers' files say of alpha."""
    junk = ["{", "[1]", "[" * 10**5, '{"unet.alpha_pattern": {"(": 1}}', '{"unet.alpha_pattern": 3}']
    junk += [f'{{"unet.lora_alpha": {alpha}}}' for alpha in ('"x"', "null", "NaN", "1e999", "[]")]
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("alpha")}
    save_file(tensors, path, {"lora_adapter_metadata": choose.choice(junk)})


DAMAGE: list[Damage] = [
    truncated,
    header_of_any_length,
    header_of_junk,
    five_gigabytes_claimed,
    offsets_astray,
    numbers_of_another_kind,
    other_shapes,
    not_numbers,
    a_part_missing,
    foreign_keys,
    adapters_of_junk,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small LoRA in each dialect."""
    folder, generator = tmp_path_factory.mktemp("whole"), torch.Generator().manual_seed(0)
    layers = {}
    for module, (out, *into) in list(weight_shapes(CONFIG).items())[::30]:
        up = torch.randn(out, 2, *[1] * (len(into) - 1), generator=generator)
        layers[module] = LoraLayer(torch.randn(2, *into, generator=generator), up, 1.0)
    files = {}
    for dialect in DIALECTS:
        path = folder / dialect if dialect == "peft" else folder / f"{dialect}.safetensors"
        lora_file.write_dialect(path, Lora("kohya", layers, {}, ()), CONFIG, {}, dialect=dialect)
        files[dialect] = path / "adapter_model.safetensors" if dialect == "peft" else path
    return files


def refusal(path: Path) -> str:
    with pytest.raises(HollowError) as refused:
        lora_file.convert(path, path.with_name("out.safetensors"), "kohya", config=CONFIG)
    return str(refused.value)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_in_a_sentence(damage: Damage, whole: dict[str, Path], tmp_path: Path) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(100):
        choose = random.Random(seed)
        path = tmp_path / "a.safetensors"
        path.write_bytes(whole[choose.choice(DIALECTS)].read_bytes())
        damage(path, choose)
        said = refusal(path)
        assert str(path) in said, (seed, said)
        assert said.endswith("."), (seed, said)
        assert 1 <= said.count(". ") <= 2, (seed, said)
        assert len(said) < 500, (seed, said)
        assert not (tmp_path / "out.safetensors").exists(), seed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GIB // 4 // 1024  # KiB on Linux


def test_five_gigabytes_that_are_there_are_not_read_where_they_do_not_fit(tmp_path: Path) -> None:
    """A file with a hole as large as its header says."""
    path, size = tmp_path / "a.safetensors", 5 * GIB
    names = ("lora_unet_conv_in.lora_down.weight", "unknown.weight")
    for name in names:
        put(path, {name: {"dtype": "F16", "shape": [2, size // 4], "data_offsets": [0, size]}}, b"")
        with path.open("ab") as file:
            file.truncate(path.stat().st_size + size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert str(path) in refusal(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GIB // 4 // 1024
