"""How LoRA files are spelled: the dialects of kohya's scripts, diffusers, peft and ComfyUI, read and written.

| dialect | a layer of the U-Net | its matrices |
|---|---|---|
| kohya | `lora_unet_down_blocks_0_…_to_q`, or `lora_unet_input_blocks_1_1_…` | `.lora_down.weight`, `.lora_up.weight` |
| diffusers | `unet.down_blocks.0.….to_q` | `.lora_A.weight`, `.lora_B.weight`; older ones `.lora.down.weight` … |
| peft | `base_model.model.down_blocks.0.….to_q` | `.lora_A.weight`, `.lora_B.weight` |
| comfy | `diffusion_model.input_blocks.1.1.….to_q` | `.lora_down.weight`, `.lora_up.weight` |

| dialect | a layer of a transformer | its matrices |
|---|---|---|
| kohya | `lora_unet_double_blocks_0_img_attn_qkv`, the original's name | `.lora_down.weight`, `.lora_up.weight` |
| diffusers | `transformer.transformer_blocks.0.attn.to_q` | `.lora_A.weight`, `.lora_B.weight` |
| peft | `base_model.model.transformer_blocks.0.attn.to_q` | `.lora_A.weight`, `.lora_B.weight` |
| comfy | `diffusion_model.blocks.0.attn.wq`, the original's name | `.lora_A.weight`, `.lora_B.weight` |

kohya and ComfyUI keep alpha beside the matrices, diffusers and peft in a config (`adapters` below), if at all. A
transformer's file of ComfyUI's has matrices for which alpha is the rank, as diffusers takes Krea 2's and Anima's in no
other way. What is one layer in the original and several in diffusers' network (queries, keys and values) is put
together where kohya's dialect cannot do without: one block of the matrices for each, and so of several times the rank,
with the same ΔW.

DoRA's magnitudes are one an output, or one an input as LyCORIS and OneTrainer have them unless told otherwise. kohya's
and ComfyUI's dialects hold both in `.dora_scale`, of shape (out, 1, …) or (1, in, …), the other two only the first.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import diffusers
import torch
from torch import Tensor, nn

from ..errors import HollowError
from ..nets.families import Family, family_in
from ..nets.unet_layers import Config, to_ldm
from .delta import LoraLayer
from .keys import MATRICES, OTHER_METHODS, in_words, split, text_module
from .peft_config import Adapter

DIALECTS = ("kohya", "diffusers", "peft", "comfy")

Shape = tuple[int, ...]


class Lora(NamedTuple):
    """What a file does, apart from how it spells it. Matrices are fp32."""

    dialect: str
    """The file's: one of DIALECTS."""
    layers: dict[str, LoraLayer]
    """Of the network, by diffusers' names: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"."""
    text: dict[str, LoraLayer]
    """Of the text encoders: "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2.…"."""
    left_out: tuple[str, ...]
    """Keys that are neither: trained norms and biases, for example; `keys.in_words` says what each is."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the layers' first matrices, by which the network is known."""
        return {f"{module}.lora_A.weight": tuple(layer.down.shape) for module, layer in self.layers.items()}


def parse(
    tensors: Mapping[str, Tensor],
    config: Config,
    adapters: Mapping[str, Adapter] | None = None,
    *,
    source: str = "The LoRA",
) -> Lora:
    """Read the LoRA that `tensors` hold, for the network of `config`: a U-Net's, or that of one of `FAMILIES`.

    `adapters` are peft's configs {"network": …, "text_encoder": …}, for the alpha of layers that have none of their
    own. Values may be infinite or undefined. Raises HollowError, beginning with `source`, where it is no LoRA, or one
    of another method (LoHa, LoKr); where a layer lacks a matrix, is not the network's or has other shapes, of which the
    sentence names the first.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return parse_lazily(shapes, tensors.__getitem__, config, adapters, source=source)


def parse_lazily(
    shapes: Mapping[str, Shape],
    tensor_of: Callable[[str], Tensor],
    config: Config,
    adapters: Mapping[str, Adapter] | None = None,
    *,
    source: str = "The LoRA",
) -> Lora:
    """`parse` of a file that is open: nothing is read before every name and shape is found to fit."""
    weights, names = _known(json.dumps(dict(config)))
    prefixes, called = _prefixes(config), called_in(config)
    found: dict[tuple[str, ...], dict[str, str]] = {}  # {modules, which one layer of the file is for: {part: key}}
    check_method(shapes, source)
    dialects, left_out = [], []
    for key in sorted(shapes):
        name, part = split(key)
        if part not in MATRICES:
            left_out.append(key)
            continue
        text = text_module(name)
        modules: tuple[str, ...] = () if text is None else (text,)
        if name in names:
            dialect, modules = names[name]
            dialects.append(dialect)
        elif text is None and name.startswith(prefixes):
            raise other_model(source, name, f"is no layer of {called}")
        if not modules:
            left_out.append(key)
        elif found.setdefault(modules, {}).setdefault(part, key) != key:
            raise HollowError(f"{source} holds {' and '.join(modules)} twice. Get or make it again.")
    if not dialects:
        instead = next((f", but {what} ({key})" for key in left_out if (what := in_words(key))), "")
        raise HollowError(
            f"{source} holds no LoRA of {_any(called)}{instead}. Choose a file with {prefixes[0]}… keys, or the like."
        )
    for modules, keys in found.items():
        parts_shapes = {part: shapes[key] for part, key in keys.items()}
        _check_shapes(source, called, modules[0], keys, parts_shapes, _together(modules, weights))
    layers: dict[str, LoraLayer] = {}
    for modules, keys in found.items():
        parts = {part: _number(source, key, tensor_of(key)) for part, key in keys.items()}
        alpha = _configured_alpha(source, modules[0], shapes[keys["down"]][0], adapters or {})
        whole = _layer(parts, _together(modules, weights), alpha)
        if len(modules) > 1 and whole.by_input:
            raise HollowError(
                f"{source} holds one magnitude for each input of {' and '.join(modules)} together, which cannot be "
                "told apart. Choose a LoRA, or a DoRA with a magnitude for each output."
            )
        for module, layer in _apart(whole, modules, weights).items():
            if module in layers:
                raise HollowError(f"{source} holds {module} twice. Get or make it again.")
            layers[module] = layer
    return Lora(
        dialects[0],
        {module: layer for module, layer in layers.items() if module in weights},
        {module: layer for module, layer in layers.items() if module not in weights},
        tuple(left_out),
    )


def spell(
    layers: Mapping[str, LoraLayer], text: Mapping[str, LoraLayer], config: Config, dialect: str, *, ldm: bool
) -> dict[str, Tensor]:
    """The content of a file in `dialect`, with names as in `Lora`; `ldm` asks kohya's for the original checkpoint's
    names, as is usual for SDXL.

    Diffusers and peft files get matrices for which alpha is the rank, as many of their readers know no other. Raises
    HollowError for a peft file with layers of a text encoder, for a dialect that the family of transformers has not,
    for a DoRA of a transformer, and for magnitudes of inputs in a dialect that has them of outputs only.
    """
    family = family_in(config)
    if dialect == "peft" and text:
        raise HollowError("A peft file is for one model, but this LoRA changes a text encoder, too. Choose diffusers.")
    if family is None:
        spelled = [(_spelled(module, config, dialect, ldm=ldm), layer) for module, layer in layers.items()]
    else:
        _check_can_spell(family, dialect, layers)
        spelled = list(_spelled_transformer(layers, config, family, dialect))
    spelled += [(_spelled_text(module, config, dialect), layer) for module, layer in text.items()]
    tensors: dict[str, Tensor] = {}
    for name, layer in spelled:
        out, ones = len(layer.up), [1] * (layer.up.dim() - 1)
        if layer.by_input and not keeps_alpha(config, dialect):
            raise HollowError(
                f"This DoRA has a magnitude for each input of {name}, and files in the dialect {dialect} only for each "
                "output. Choose kohya or comfy."
            )
        if not keeps_alpha(config, dialect):
            layer = with_alpha(layer, float(len(layer.down)))
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.down, layer.up
            if layer.dora_scale is not None:  # in peft's shape
                shape = (out,) if len(ones) == 1 else (1, out, *ones[1:])
                tensors[f"{name}.lora_magnitude_vector"] = layer.dora_scale.reshape(shape)
        else:
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
            if layer.dora_scale is not None:
                shape = (1, -1, *ones[1:]) if layer.by_input else (out, *ones)
                tensors[f"{name}.dora_scale"] = layer.dora_scale.reshape(shape)
    return tensors


def check_method(keys: Iterable[str], source: str) -> None:
    """Raises HollowError, beginning with `source`, where the keys of a file are those of another method than LoRA."""
    found = {part for key in keys if (part := split(key)[1]) in OTHER_METHODS}
    if found:
        raise HollowError(f"{source} is {OTHER_METHODS[min(found)]}, which Hollow does not read. Choose a LoRA.")


def fits(shapes: Mapping[str, Sequence[int]], config: Config) -> bool:
    """Whether a file's LoRA could be for this network: it has all of the layers, which take in as many numbers."""
    into = {name: tuple(shape) for key, shape in shapes.items() for name, part in [split(key)] if part == "down"}
    layers = {name: shape for name, shape in into.items() if text_module(name) is None}
    if not layers:
        return False
    weights, names = _known(json.dumps(dict(config)))
    return all(name in names and shape[1:2] == weights[names[name][1][0]][1:2] for name, shape in layers.items())


def differences_in(left_out: Sequence[str], config: Config) -> dict[str, tuple[str, ...]]:
    """Of the keys that `Lora.left_out` names, the full differences of layers' weights: {key: the modules that it is of,
    one behind another}."""
    names = _known(json.dumps(dict(config)))[1]
    parts = {key: split(key) for key in left_out}
    return {key: names[name][1] for key, (name, part) in parts.items() if part == "diff" and name in names}


def usual_dialect(config: Config) -> str:
    """Of a file for everyone: kohya's for a U-Net, and of a transformer what ComfyUI and diffusers both read."""
    family = family_in(config)
    return "kohya" if family is None else family.dialects[0]


def keeps_alpha(config: Config, dialect: str) -> bool:
    """Whether a file of the dialect has an alpha beside each layer, which else is the rank."""
    return dialect == "kohya" or (dialect == "comfy" and family_in(config) is None)


def check_dora(config: Config) -> None:
    """Raises HollowError where no DoRA can be written for this network."""
    if (family := family_in(config)) is not None:
        raise HollowError(
            f"A DoRA of {family.title} has no spelling that ComfyUI and diffusers both read. Train or take a LoRA."
        )


def called_in(config: Config) -> str:
    """The network in a sentence: "this U-Net", "FLUX.1"."""
    family = family_in(config)
    return "this U-Net" if family is None else family.title


def adapter_config(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """peft's config of a LoRA as `spell` writes it for peft and diffusers; {} without layers."""
    ranks = {module: len(layer.down) for module, layer in layers.items()}
    if not ranks:
        return {}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": sorted(ranks),
        "use_dora": any(layer.dora_scale is not None for layer in layers.values()),
    }


def with_alpha(layer: LoraLayer, alpha: float) -> LoraLayer:
    """The same ΔW with another alpha; both matrices are then of like size, where fp16 is most exact."""
    if layer.alpha == alpha:
        return layer
    scale = layer.alpha / alpha
    down, up = float(layer.down.abs().max()), float(layer.up.abs().max())
    factor = math.sqrt(abs(scale) * up / down) if up and down else 1.0
    if not (factor and math.isfinite(factor)):  # of sizes that no number can stand between
        factor = 1.0
    return layer._replace(down=layer.down * factor, up=layer.up * (scale / factor), alpha=alpha)


def zero_padded(layers: Mapping[str, LoraLayer], config: Config) -> dict[str, LoraLayer]:
    """With zeros for layers of the kinds that are there, attn1.to_q for example, in blocks that have none.

    In the order of the network, for tools that count blocks in order. Raises HollowError for a DoRA, whose magnitudes
    in those blocks would be the base model's.
    """
    if any(layer.dora_scale is not None for layer in layers.values()):
        raise HollowError("A DoRA cannot be padded with zeros. Write it without.")
    kinds = {_kind(module): layer for module, layer in layers.items()}
    padded: dict[str, LoraLayer] = {}
    for module, (out, *into) in weight_shapes(config).items():
        if module in layers:
            padded[module] = layers[module]
        elif like := kinds.get(_kind(module)):
            rank = len(like.down)
            padded[module] = LoraLayer(
                torch.zeros(rank, *into), torch.zeros(out, rank, *[1] * (len(into) - 1)), like.alpha
            )
    return padded


def weight_shapes(config: Config) -> dict[str, Shape]:
    """The shape of the weight of each layer of a network that can carry LoRA."""
    return dict(_known(json.dumps(dict(config)))[0])


def outlined(config: Config) -> nn.Module:
    """The network of a config, of tensors without data. Raises HollowError for one that diffusers has not."""
    family = family_in(config)
    name = "UNet2DConditionModel" if family is None else family.network
    if not hasattr(diffusers, name):
        raise HollowError(f"diffusers {diffusers.__version__} has no {name}. Install a newer one.")
    with torch.device("meta"):
        return cast(nn.Module, getattr(diffusers, name).from_config(config))


def sets_magnitudes(key: str) -> bool:
    """Whether a key of any dialect holds DoRA's magnitudes."""
    return split(key)[1] in ("dora_scale", "magnitude")


def kohya_name(module: str) -> str:
    """ "mid_block.attentions.0.proj_in" as kohya spells it: "lora_unet_mid_block_attentions_0_proj_in"."""
    return "lora_unet_" + module.replace(".", "_")


def other_model(source: str, key: str, why: str) -> HollowError:
    """What is said of a LoRA that does not fit the network."""
    return HollowError(f"{source} was made for another kind of model: {key} {why}. Use it with its own base model.")


_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")

_UNET_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "transformer.",
    "lycoris_",
    "diffusion_model.",
    "unet.",
    "base_model.model.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
)


@lru_cache(maxsize=16)
def _known(config: str) -> tuple[dict[str, Shape], dict[str, tuple[str, tuple[str, ...]]]]:
    """Of a network's config as JSON: {module: shape of its weight}, and {any spelling: (dialect, its modules)}."""
    told = json.loads(config)
    family = family_in(told)
    weights = {
        name: tuple(module.weight.shape)
        for name, module in outlined(told).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    if family is None:
        return weights, {spelled: (dialect, (module,)) for dialect, module, spelled in _spellings(weights, told)}
    return weights, {
        spelled: (dialect, modules) for dialect, modules, spelled in _transformer_spellings(weights, family)
    }


def _transformer_spellings(weights: Mapping[str, Shape], family: Family) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(dialect, modules, spelled) for every module and every way to spell it: ComfyUI, for one, takes diffusers' names
    under its own prefix, too."""
    named = [*((module, (module,)) for module in weights), *_originals(weights, family).items()]
    for name, modules in named:
        flat = name.replace(".", "_")
        yield from (("kohya", modules, f"{prefix}{flat}") for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"))
        yield from (("diffusers", modules, f"{prefix}{name}") for prefix in ("transformer.", ""))
        yield "peft", modules, f"base_model.model.{name}"
        yield "comfy", modules, f"diffusion_model.{name}"


def _originals(modules: Iterable[str], family: Family) -> dict[str, tuple[str, ...]]:
    """{name in the original network: the modules that are its parts}, of layers of blocks."""
    names = dict(family.original)
    order = {pattern: number for number, pattern in enumerate(names)}
    found: dict[str, list[tuple[int, str]]] = {}
    for module in modules:
        pattern = _BLOCK_NUMBER.sub(".*.", module, count=1)
        if family.original and pattern in names:
            number = _BLOCK_NUMBER.search(module)
            assert number is not None
            found.setdefault(names[pattern].replace("*", number[1]), []).append((order[pattern], module))
    return {name: tuple(module for _, module in sorted(parts)) for name, parts in found.items()}


def _spelled_transformer(
    layers: Mapping[str, LoraLayer], config: Config, family: Family, dialect: str
) -> Iterator[tuple[str, LoraLayer]]:
    """The layers of a file, by their names in it without what follows for each matrix."""
    weights = weight_shapes(config)
    originals = _originals(weights, family)
    if dialect in ("diffusers", "peft"):
        prefix = {"diffusers": "transformer.", "peft": "base_model.model."}[dialect]
        yield from ((f"{prefix}{module}", layer) for module, layer in layers.items())
        return
    fused = any(len(modules) > 1 for modules in originals.values())
    names = {module: name for name, modules in originals.items() for module in modules}
    if dialect == "comfy":  # which takes diffusers' own names where its own are put together
        yield from (
            (f"diffusion_model.{module if fused else names.get(module, module)}", layer)
            for module, layer in layers.items()
        )
        return
    for name in dict.fromkeys(names.get(module, module) for module in layers):
        modules = originals.get(name, (name,))
        if name not in originals and originals:
            raise HollowError(f"kohya's files of {family.title} have no place for {name}. Choose {family.dialects[0]}.")
        yield kohya_name(name), _put_together([layers.get(module) for module in modules], modules, weights)


def _put_together(parts: Sequence[LoraLayer | None], modules: Sequence[str], weights: Mapping[str, Shape]) -> LoraLayer:
    """One layer whose outputs are those of the parts, one behind another; of None they do not change. Parts with one
    and the same first matrix keep it; else each has ranks of its own."""
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(parts) == 1:
        return first
    if len(there) == len(parts) and all(p.alpha == first.alpha and torch.equal(p.down, first.down) for p in there):
        return first._replace(up=torch.cat([part.up for part in there]))
    ups, column, rank = [], 0, sum(len(part.down) for part in there)
    for part, module in zip(parts, modules, strict=True):
        up = torch.zeros(weights[module][0], rank)
        if part is not None:
            up[:, column : column + len(part.down)] = part.up * (part.scale / first.scale)
            column += len(part.down)
        ups.append(up)
    return LoraLayer(torch.cat([part.down for part in there]), torch.cat(ups), first.scale * rank)


def _apart(whole: LoraLayer, modules: Sequence[str], weights: Mapping[str, Shape]) -> dict[str, LoraLayer]:
    """A layer of a file as the layers of its modules: each with the ranks that reach its outputs. One that none reaches
    is left out, unless that is so of all of them."""
    if len(modules) == 1:
        return {modules[0]: whole}
    sizes = [weights[module][0] for module in modules]
    magnitudes = [None] * len(sizes) if whole.dora_scale is None else whole.dora_scale.split(sizes)
    layers = {}
    for module, up, magnitude in zip(modules, whole.up.split(sizes), magnitudes, strict=True):
        reach = up.any(dim=0) if whole.up.any() else torch.ones(len(whole.down), dtype=torch.bool)
        if reach.any() or magnitude is not None:
            reach = reach if reach.any() else ~reach
            down = whole.down[reach]
            layers[module] = LoraLayer(down, up[:, reach], whole.scale * len(down), magnitude)
    return layers


def _together(modules: Sequence[str], weights: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight of modules that are one layer; None of a text encoder's."""
    shapes = [weights[module] for module in modules if module in weights]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes else None


def _check_can_spell(family: Family, dialect: str, layers: Mapping[str, LoraLayer]) -> None:
    if dialect not in family.dialects:
        raise HollowError(
            f"{family.title} has no LoRA files in the dialect {dialect}. Choose one of {', '.join(family.dialects)}."
        )
    if any(layer.dora_scale is not None for layer in layers.values()):
        check_dora({"_class_name": family.network})


def _prefixes(config: Config) -> tuple[str, ...]:
    """How names of the network's layers begin; the first as an example."""
    if (family := family_in(config)) is None:
        return _UNET_PREFIXES
    usual = {"comfy": "diffusion_model.", "diffusers": "transformer."}[family.dialects[0]]
    return (usual, *_UNET_PREFIXES, *(f"{blocks.path}." for blocks in family.blocks))


def _any(called: str) -> str:
    return called.replace("this ", "a ")


def _spellings(weights: Mapping[str, Shape], config: Config) -> Iterator[tuple[str, str, str]]:
    """(dialect, module, spelled) for every module and every way to spell it."""
    for module in weights:
        ldm = to_ldm(config, module)
        yield from (("kohya", module, kohya_name(name)) for name in (module, ldm))
        yield "kohya", module, f"lycoris_{module.replace('.', '_')}"
        yield from (("diffusers", module, f"{prefix}{module}") for prefix in ("unet.", ""))
        yield "peft", module, f"base_model.model.{module}"
        yield from (("comfy", module, f"{prefix}{ldm}") for prefix in ("diffusion_model.", "unet."))


def _spelled(module: str, config: Config, dialect: str, *, ldm: bool) -> str:
    if dialect == "kohya":
        return kohya_name(to_ldm(config, module) if ldm else module)
    if dialect == "comfy":
        return f"diffusion_model.{to_ldm(config, module)}"
    return {"diffusers": "unet.", "peft": "base_model.model."}[dialect] + module


def _spelled_text(module: str, config: Config, dialect: str) -> str:
    """For a layer of a text encoder, of which SDXL has two; SD 2.x has OpenCLIP's."""
    encoder, _, name = module.partition(".")
    first = encoder == "text_encoder"
    xl = config.get("addition_embed_type") == "text_time" or family_in(config) is not None
    if dialect == "kohya":
        prefix = ("lora_te1_" if xl else "lora_te_") if first else "lora_te2_"
        return prefix + name.replace(".", "_")
    if dialect == "comfy":
        clip = ("clip_h" if config.get("cross_attention_dim") == 1024 else "clip_l") if first else "clip_g"
        return f"text_encoders.{clip}.transformer.{name}"
    return module


def _kind(module: str) -> str:
    """ "down_blocks.1.attentions.0.proj_in" and "mid_block.attentions.0.proj_in" are of one kind."""
    return re.sub(r"^(down_blocks|up_blocks|mid_block)\.", "", re.sub(r"(\w+s)\.\d+\.", r"\1.", module))


def _check_shapes(
    source: str, called: str, module: str, keys: Mapping[str, str], parts: Mapping[str, Shape], weight: Shape | None
) -> None:
    """`parts` are the shapes in the file; `weight` is the layer's, None where it is not known."""
    for part in ("down", "up"):
        if part not in parts:
            raise HollowError(f"{source} lacks lora_{part} of {module}, so it is no whole LoRA. Get or make it again.")
        if len(parts[part]) < 2 or 0 in parts[part]:
            raise HollowError(f"{source} holds {keys[part]} of shape {parts[part]}. Get or make it again.")
    rank, out = parts["down"][0], parts["up"][0]
    into: Sequence[int] = parts["down"][1:] if weight is None else weight[1:]
    needed = {"down": (rank, *into), "up": (out if weight is None else weight[0], rank)}
    if "mid" in parts:
        if len(into) != 3:
            raise other_model(source, keys["mid"], "is for a convolution, which this layer is not")
        needed |= {"down": (rank, into[0]), "mid": (rank, rank, *into[1:])}
    for part, shape in needed.items():
        if _trimmed(parts[part]) != _trimmed(shape):
            raise other_model(source, keys[part], f"has shape {parts[part]}, but {called} needs {shape}")
    for part, dims in (("alpha", 1), ("magnitude", out)):
        if part in parts and math.prod(parts[part]) != dims:
            raise HollowError(f"{source} holds {keys[part]} of shape {parts[part]}, not {dims}. Get or make it again.")
    if (given := parts.get("dora_scale")) is not None and _trimmed(given) not in ((out,), (out, 1), (1, into[0])):
        raise HollowError(
            f"{source} holds {keys['dora_scale']} of shape {given}, neither of {out} outputs nor of {into[0]} inputs. "
            "Get or make it again."
        )


def _trimmed(shape: Sequence[int]) -> Shape:
    """1×1 convolutions and linear layers are interchangeable."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _number(source: str, key: str, tensor: Tensor) -> Tensor:
    if tensor.is_complex() or (not tensor.is_floating_point() and tensor.numel() > 1):  # alpha may be whole
        raise HollowError(f"{source} holds {key} as {tensor.dtype}. Get or make it again.")
    return tensor.float()


def _layer(parts: Mapping[str, Tensor], weight: Shape | None, configured_alpha: float | None) -> LoraLayer:
    down, up = parts["down"], parts["up"]
    rank, into = len(down), down.shape[1:] if weight is None else weight[1:]
    if "mid" in parts:  # a convolution between two 1×1 ones: the first two make one
        mid = parts["mid"].reshape(rank, rank, *into[1:])
        down = torch.einsum("pqhw,qi->pihw", mid, down.flatten(1))
    alpha = float(parts["alpha"]) if "alpha" in parts else configured_alpha
    magnitude = parts.get("dora_scale", parts.get("magnitude"))
    if magnitude is not None:
        by_input = "dora_scale" in parts and len(magnitude) != len(up)
        magnitude = magnitude.reshape((1, -1) if by_input else -1)
    return LoraLayer(
        down.reshape(rank, *into),
        up.reshape(len(up), rank, *[1] * (len(into) - 1)),
        alpha or float(rank),
        magnitude,
    )


def _configured_alpha(source: str, module: str, rank: int, adapters: Mapping[str, Adapter]) -> float | None:
    """The alpha that peft's config of this part of the model gives a layer; None without one."""
    part, name = module.split(".", 1) if module.startswith("text_encoder") else ("network", module)
    adapter = adapters.get(part)
    try:
        return None if adapter is None else adapter.alpha(name, rank)
    except HollowError as error:
        raise HollowError(f"In the config of peft's in or beside {source} {error}. Name the layers there.") from None
