"""LoRA files: written in any dialect and read back, read from any dialect, converted. See `dialects` for the spelling.

What a hollowed LoRA needs beyond its weights to be sampled on two paths lies in the metadata, `hollow.*`.
"""

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import HollowError
from ..files import damaged, read_json, read_safetensors, write_json, write_safetensors
from ..models.layouts import LAYOUTS, TRANSFORMERS, layout_config, layout_name, transformer_config
from ..nets.families import FAMILIES, family_in
from ..nets.unet_layers import Config
from . import dialects
from .delta import LoraLayer
from .dialects import Lora
from .keys import LONGEST, in_words, of_text
from .layers import MAGNITUDES, is_dora
from .metadata import Recipe, describe, describe_converted, kohya_network, layout_of, recipe_of, thumbnail
from .peft_config import Adapter

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_HEAD = {"peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "bias": "none"}
_IN_UNET = re.compile(r"(down|up|mid|input|output|middle)_block")
_ADVICE = "Lower the learning rate and train again, or write fp32."


class LoraFile(NamedTuple):
    """What `load` finds in a file."""

    state: dict[str, Tensor]
    """As `lora_state` gives it: "….to_q.lora_A.weight" (rank, in, …) and "….lora_B.weight", fp32, and of a DoRA
    "….lora_magnitude_vector.weight" (out,)."""
    alpha: float
    """One for all layers: a file with several has the difference multiplied into its lora_B."""
    recipe: Recipe | None
    """None where the file was not written by Hollow."""
    metadata: dict[str, str]
    """All of it, as stored."""


class Written(NamedTuple):
    """What was found when a file was read back: every key belongs to a layer, and every number is as it was."""

    path: Path
    """The file; for peft the folder."""
    dialect: str
    layers: int
    """Of the network."""
    text_layers: int
    """Of text encoders."""
    largest: float
    """The largest |ΔW|, of any weight; of a DoRA before its magnitudes, as those need W to tell."""
    dora: bool = False
    """Whether it sets magnitudes."""
    network: str = "the U-Net"
    """In a sentence."""

    @property
    def sentence(self) -> str:
        """For people."""
        text = f" and {self.text_layers} of text encoders" if self.text_layers else ""
        if self.dora:
            effect = f"a DoRA, the largest |ΔW| before its magnitudes is {self.largest:.2g}"
        elif self.largest:
            effect = f"the largest |ΔW| is {self.largest:.2g}"
        else:
            effect = "all of them zero, so it has NO effect"
        layers = f"{self.layers} layers of {self.network}{text}"
        return f"{self.path} ({self.dialect}): {layers}, every key matched; {effect}."


def save(
    path: Path,
    state: Mapping[str, Tensor],
    config: Config,
    *,
    alpha: float,
    layout: str,
    recipe: Recipe,
    metadata: Mapping[str, str] | None = None,
    picture: Image.Image | None = None,
) -> Written:
    """Write a LoRA (names as in `LoraFile.state`, any dtype) in `usual_dialect` and fp16, and read it back.

    `config` is the network's, `layout` its family; `metadata` comes on top of the standard one, with `picture` as
    thumbnail. Raises HollowError as `write_dialect` does.
    """
    layers = _layers(state, alpha)
    rank = max(len(layer.down) for layer in layers.values())
    layout = layout if (family := family_in(config)) is None else family.name
    described = describe(path.stem, layout, rank, alpha, recipe, dora=is_dora(state)) | dict(metadata or {})
    if picture is not None:
        described |= thumbnail(picture)
    lora = Lora("kohya", layers, {}, ())
    return write_dialect(path, lora, config, described)


def to_kohya(state: Mapping[str, Tensor], config: Config, *, alpha: float, layout: str) -> dict[str, Tensor]:
    """What a file holds: `lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha` of each layer, in fp16, and
    `.dora_scale` of a DoRA, in fp32.

    Raises HollowError where a value is not finite in fp16, and as `dialects.spell` does.
    """
    lora = _with_one_alpha(Lora("kohya", _layers(state, alpha), {}, ()), torch.float16)
    return _spell(lora, config, "kohya", layout == "sdxl", torch.float16)


def write_dialect(
    path: Path,
    lora: Lora,
    config: Config,
    metadata: Mapping[str, str],
    *,
    dialect: str | None = None,
    zero_pad: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Written:
    """Write a LoRA for the network of `config`, read it back, and match every key to a layer.

    `dialect` None is `usual_dialect`. kohya's has diffusers' names for SD 1.x and 2.x, LDM names for SDXL. For peft,
    `path` is a folder. `zero_pad` writes zeros for the blocks that have no LoRA, for tools that count blocks in order.
    Raises HollowError where the name does not end in .safetensors, where a value is not finite in `dtype`, where the
    file cannot be written, and as `dialects.spell` does; then nothing is left at `path` that was not there before.
    """
    dialect = dialect or dialects.usual_dialect(config)
    if dialect not in dialects.DIALECTS:
        raise HollowError(f"There is no dialect {dialect!r}. Choose one of {', '.join(dialects.DIALECTS)}.")
    if zero_pad:
        lora = lora._replace(layers=dialects.zero_padded(lora.layers, config))
    lora = _with_one_alpha(lora, dtype)
    tensors = _spell(lora, config, dialect, _is_sdxl(config), dtype)
    rank = max(len(layer.down) for layer in lora.layers.values())
    alpha = next(iter(lora.layers.values())).alpha
    dora = any(layer.dora_scale is not None for layer in lora.layers.values())
    by_input = any(layer.by_input for layer in lora.layers.values())
    alpha = alpha if dialects.keeps_alpha(config, dialect) else rank
    described = dict(metadata) | kohya_network(rank, alpha, dora=dora, by_input=by_input)
    file = path
    if dialect == "diffusers":
        described |= {"format": "pt", "lora_adapter_metadata": json.dumps(_diffusers_adapters(lora, config))}
    elif dialect == "peft":
        if path.suffix == ".safetensors":
            raise HollowError(f"A peft LoRA is a folder, not {path.name}. Give a name without .safetensors.")
        file, described = path / _PEFT_FILE, described | {"format": "pt"}
    written, told = write(file, tensors, described)
    if dialect == "peft":  # the small file last: where the disk is full, the old pair stays whole
        write_json(path / _PEFT_CONFIG, _PEFT_HEAD | dialects.adapter_config(lora.layers))
    again = dialects.parse(written, config, _adapters(file, told), source=str(path))
    lost = (lora.layers[module] for module in lora.layers.keys() - again.layers.keys())
    more = (again.layers[module] for module in again.layers.keys() - lora.layers.keys())
    # of layers that a file puts together, those that change nothing cannot be told from none
    acting = any(layer.up.to(dtype).any() for each in (lost, more) for layer in each)
    if again.left_out or acting or again.text.keys() != lora.text.keys():
        raise HollowError(f"{path} does not read back as it was written. Check the disk and save again.")
    network = dialects.called_in(config).replace("this ", "the ")
    return Written(path, dialect, len(again.layers), len(again.text), _largest_change(again), dora, network)


def check_writable(modules: Iterable[str], config: Config) -> None:
    """Raises HollowError unless a LoRA of these layers of a network can be written in `usual_dialect` and read back: to
    be asked before it is trained."""
    weights, layers = dialects.weight_shapes(config), {}
    for module in modules:
        if module not in weights:
            called = dialects.called_in(config)
            raise HollowError(
                f"{module} is no layer of {called} by its config, so no LoRA file could name it. Take it off."
            )
        out, *into = weights[module]
        layers[module] = LoraLayer(torch.zeros(1, *into), torch.zeros(out, 1, *[1] * (len(into) - 1)), 1.0)
    dialect = dialects.usual_dialect(config)
    again = dialects.parse(dialects.spell(layers, {}, config, dialect, ldm=_is_sdxl(config)), config)
    if lost := layers.keys() - again.layers.keys():
        raise HollowError(f"A LoRA of {min(lost)} would not be read back from a file. Leave that layer out.")


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write tensors as they are, and read them back to compare: what was read, and its metadata. Raises HollowError as
    `write_dialect` does."""
    if path.suffix != ".safetensors":
        raise HollowError(f"The name {path.name!r} does not end in .safetensors. Choose one that does.")
    write_safetensors(path, tensors, metadata)
    written, told = read_safetensors(path)
    if written.keys() != tensors.keys() or any(not torch.equal(written[key], tensors[key]) for key in tensors):
        raise HollowError(f"{path} does not read back as it was written. Check the disk and save again.")
    return written, told


def read(path: Path, config: Config | None = None, *, unet_only: bool = False) -> tuple[Lora, dict[str, str]]:
    """The LoRA in a file of any dialect, or in peft's folder, and the file's metadata; values may be infinite or NaN.

    `config` is the network's; None takes that of the public model of which the file tells. `unet_only` leaves out what
    is for text encoders, and embeddings. Raises HollowError where the file is missing or damaged, where it does not
    tell the family, and as `dialects.parse` does; what does not fit is not read at all.
    """
    if path.is_dir():
        path = path / _PEFT_FILE
    try:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if not (unet_only and of_text(key))]  # noqa: SIM118 - no dict
            if keys and len(longest := max(keys, key=len)) > LONGEST:
                raise HollowError(f"{path} holds a name of {len(longest)} letters. Get or make it again.")
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            dialects.check_method(shapes, str(path))
            metadata = file.metadata() or {}
            config = config or config_of(metadata, shapes)
            adapters = _adapters(path, metadata)
            return dialects.parse_lazily(shapes, file.get_tensor, config, adapters, source=str(path)), metadata
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def read_whole(path: Path, config: Config | None = None, *, unet_only: bool = False) -> tuple[Lora, dict[str, str]]:
    """`read` of a file that is to be used or written again, so that nothing in it may be lost: raises HollowError where
    it holds more than LoRA and DoRA, too, and where a value is not finite."""
    lora, metadata = read(path, config, unet_only=unet_only)
    if lora.left_out:
        key = lora.left_out[0]
        way = ", or leave out what is not for the network (--unet-only)" if of_text(key) else ""
        what = f"{key}, {known}" if (known := in_words(key)) else key
        raise HollowError(f"{path} holds {what}, which is no LoRA and would be lost. Choose one without{way}.")
    _check_finite(lora, path)
    return lora, metadata


def differences(path: Path, keys: Mapping[str, Sequence[str]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """The full differences of layers' weights that a file holds beside its LoRA, one by one: (module, ΔW), in the
    file's dtype and the weight's shape. `keys` are as `dialects.differences_in` gives them.

    Raises HollowError where the file is damaged, and where a shape is not the layer's.
    """
    path = path / _PEFT_FILE if path.is_dir() else path
    weights = dialects.weight_shapes(config)
    try:
        with safe_open(path, "pt") as file:
            for key, modules in keys.items():
                whole, shapes = file.get_tensor(key), [weights[module] for module in modules]
                if whole.numel() != sum(map(math.prod, shapes)) or len(whole) != sum(shape[0] for shape in shapes):
                    called = dialects.called_in(config)
                    raise dialects.other_model(str(path), key, f"has shape {tuple(whole.shape)}, unlike {called}'s")
                for module, shape, part in zip(modules, shapes, whole.split([s[0] for s in shapes]), strict=True):
                    yield module, part.reshape(shape)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def load(path: Path, network: nn.Module, *, unet_only: bool = False) -> LoraFile:
    """Read a LoRA or DoRA in any dialect for this U-Net or transformer of diffusers'.

    `unet_only` leaves out what is for text encoders, and embeddings. Raises HollowError as `read_whole` does, where the
    file is for a text encoder, too, and where only some layers have magnitudes.
    """
    config = dict(cast(Config, network.config))
    if (name := type(network).__name__) in FAMILIES:
        config["_class_name"] = name
    lora, metadata = read_whole(path, config, unet_only=unet_only)
    if lora.text:
        called = dialects.called_in(config).replace("this ", "a ")
        raise HollowError(
            f"{path} is no plain LoRA of {called}: it holds {min(lora.text)} too. Choose one without, or leave text "
            "encoders out (--unet-only)."
        )
    alpha = next(iter(lora.layers.values())).alpha
    state: dict[str, Tensor] = {}
    for module, layer in lora.layers.items():
        state[f"{module}.lora_A.weight"] = layer.down
        state[f"{module}.lora_B.weight"] = layer.up * (layer.alpha / alpha)
        if layer.dora_scale is not None:
            state[f"{module}.{MAGNITUDES}.weight"] = layer.dora_scale
    for module, layer in lora.layers.items():
        if layer.dora_scale is None and is_dora(state):
            raise HollowError(f"{path} is a DoRA without magnitudes for {module}. Choose one with all or none.")
    return LoraFile(state, alpha, recipe_of(metadata), metadata)


def convert(
    source: Path,
    target: Path,
    dialect: str | None = None,
    *,
    config: Config | None = None,
    unet_only: bool = False,
    zero_pad: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Written:
    """Write the LoRA of one file in another dialect, with its metadata as `describe_converted` says.

    Layers of text encoders come along, unless `unet_only` leaves them out; peft has no place for them. `config` is the
    network's, needed where it is none of `LAYOUTS`; `dialect` None is `usual_dialect`. Raises HollowError as
    `read_whole` and `write_dialect` do.
    """
    lora, metadata = read_whole(source, config, unet_only=unet_only)
    config = config or config_of(metadata, lora.shapes)
    described = describe_converted(metadata, target.stem, kind_of(config))
    return write_dialect(target, lora, config, described, dialect=dialect, zero_pad=zero_pad, dtype=dtype)


def keep_last(path: Path, most: int) -> None:
    """Of the files NAME-000200.safetensors and so on that a training has left beside `path`, the last of them, leave so
    many. Those of more steps are of another training, and stay."""
    name, _, last = path.stem.rpartition("-")
    steps = {
        each: int(number)
        for each in path.parent.glob(f"{glob.escape(name)}-*.safetensors")
        if re.fullmatch(r"\d{6,}", number := each.stem[len(name) + 1 :])
    }
    own = [each for each in sorted(steps, key=steps.__getitem__) if steps[each] <= int(last)]
    for old in own[:-most]:
        old.unlink()


def config_of(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]] | None = None) -> Config:
    """The config of the network that a LoRA is for: that of a public model, the one that the metadata name unless the
    names and shapes of the tensors are those of another.

    Raises HollowError where neither the metadata nor the names and shapes of the tensors tell, and where its family of
    transformers has other sizes, too.
    """
    shapes = shapes or {}
    try:
        layout = layout_of(metadata, shapes)
    except HollowError:
        if (fitting := _fitting(shapes)) is None:
            raise
        return fitting
    public = [*map(layout_config, LAYOUTS), *map(transformer_config, TRANSFORMERS)]
    told = [config for config in public if kind_of(config) == layout]
    for config in told:
        if not shapes or dialects.fits(shapes, config):
            return config
    if (fitting := _fitting(shapes)) is not None:  # what the metadata tell is false
        return fitting
    if layout in LAYOUTS:
        return layout_config(layout)  # reading says what of it does not fit
    raise HollowError(f"The LoRA is for {layout}, but of another size than the public model. Give its own.")


def _fitting(shapes: Mapping[str, Sequence[int]]) -> Config | None:
    """The one public model whose network has all of the layers; None where there is none, or where several have."""
    unet = any(_IN_UNET.search(key) for key in shapes)
    public = map(layout_config, LAYOUTS) if unet else map(transformer_config, TRANSFORMERS)
    fitting = [config for config in public if dialects.fits(shapes, config)]
    return fitting[0] if len(fitting) == 1 else None


def kind_of(config: Config) -> str:
    """The name of a network's kind in metadata: "sd15", "flux", …"""
    family = family_in(config)
    return layout_name(config) if family is None else family.name


def alpha_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> float:
    """The alpha of a layer in kohya's spelling: missing or zero, it is the rank."""
    return float(tensors.get(f"{name}.alpha", 0.0)) or float(rank)


def _layers(state: Mapping[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    return {
        module: LoraLayer(
            state[f"{module}.lora_A.weight"],
            state[f"{module}.lora_B.weight"],
            float(alpha),
            state.get(f"{module}.{MAGNITUDES}.weight"),
        )
        for module in modules
    }


def _with_one_alpha(lora: Lora, dtype: torch.dtype) -> Lora:
    """The same LoRA, all layers with the alpha that most have, as diffusers loses others in kohya's files.

    It is a rank, where that alpha is too small or too large for `dtype`.
    """
    both = [*lora.layers.values(), *lora.text.values()]
    alpha = Counter(layer.alpha for layer in both).most_common(1)[0][0]
    if abs(float(torch.tensor(alpha, dtype=dtype)) - alpha) > 1e-2 * abs(alpha):
        alpha = float(len(both[0].down))
    layers, text = (
        {module: dialects.with_alpha(layer, alpha) for module, layer in part.items()}
        for part in (lora.layers, lora.text)
    )
    return lora._replace(layers=layers, text=text)


def _is_sdxl(config: Config) -> bool:
    return kind_of(config) == "sdxl"


def _spell(lora: Lora, config: Config, dialect: str, ldm: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """`dialects.spell` in `dtype`, but for magnitudes, which are few: they multiply the whole weight, so that fp16
    would round off some of what is learned. Raises HollowError where a value is not finite."""
    tensors = dialects.spell(lora.layers, lora.text, config, dialect, ldm=ldm)
    tensors = {
        key: tensor.detach().to("cpu", torch.float32 if dialects.sets_magnitudes(key) else dtype)
        for key, tensor in tensors.items()
    }
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise HollowError(f"The LoRA holds infinite or undefined values in {key}. {_ADVICE}")
    return tensors


def _diffusers_adapters(lora: Lora, config: Config) -> dict[str, Any]:
    """As diffusers' `save_lora_weights` puts peft's configs into the metadata: {"unet.r": …, "text_encoder.r": …}."""
    network = "unet" if family_in(config) is None else "transformer"
    parts: dict[str, dict[str, LoraLayer]] = {network: lora.layers}
    for module, layer in lora.text.items():
        encoder, name = module.split(".", 1)
        # peft matches the ends of names, and transformers 5 has no text_model
        parts.setdefault(encoder, {})[name.removeprefix("text_model.")] = layer
    return {
        f"{part}.{key}": value
        for part, layers in parts.items()
        for key, value in dialects.adapter_config(layers).items()
    }


def _adapters(path: Path, metadata: Mapping[str, str]) -> dict[str, Adapter]:
    """peft's configs of the parts that a file is for, "network" and text encoders: diffusers' in the metadata, or
    peft's own beside the file.

    Raises HollowError where one is damaged.
    """
    beside = path.with_name(_PEFT_CONFIG)
    told: dict[str, dict[str, Any]] = {}
    try:
        if path.name == _PEFT_FILE and beside.exists():
            told = {"network": read_json(beside)}
        else:
            for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
                part, _, name = key.rpartition(".")
                told.setdefault("network" if part in ("", "unet", "transformer") else part, {})[name] = value
        return {part: Adapter(config) for part, config in told.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise HollowError(
            f"The config of peft's in or beside {path} is damaged. Get or make the LoRA again."
        ) from error


def _check_finite(lora: Lora, path: Path) -> None:
    for module, layer in (lora.layers | lora.text).items():
        numbers = (layer.down, layer.up, torch.tensor(layer.alpha), layer.dora_scale)
        if not all(tensor.isfinite().all() for tensor in numbers if tensor is not None):
            raise HollowError(f"{path} holds infinite or undefined values in {module}. Take another copy of it.")


def _largest_change(lora: Lora) -> float:
    """Of any weight, the largest |(alpha / rank) B A|."""
    largest = 0.0
    for layer in (lora.layers | lora.text).values():
        least, most = torch.aminmax(layer.up.flatten(1) @ layer.down.flatten(1))
        largest = max(largest, abs(layer.scale) * max(-float(least), float(most)))
    return largest
