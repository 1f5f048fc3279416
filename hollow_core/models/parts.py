"""The parts of a base model in a diffusers folder: each whole, or a sentence that says what is wrong with it."""

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from ..errors import HollowError
from ..files import read_object
from .stored import StoredWeights, clip_weights, filled, lacking, quantised

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""Any of these is in a tokenizer's folder."""


def read_index(folder: Path) -> dict[str, Any]:
    """What the pipeline in a diffusers folder is made of: its class, and library and class of each part by name.
    Raises HollowError where the folder has none, or one that does not say."""
    files = [folder / name for name in ("model_index.json", "modular_model_index.json")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise HollowError(f"{folder} is no diffusers folder: it has no model_index.json. Give the folder with it.")
    index = read_object(file)
    if not isinstance(index.get("_class_name"), str):
        raise HollowError(f"{file} does not name a pipeline (_class_name). Get it again.")
    return index


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of a part. Raises HollowError where it is missing or broken, and for weights that were quantised on
    the disk."""
    part = folder / name
    if not (part / "config.json").exists():
        raise HollowError(f"{part} does not load: it lacks its config.json. Get the whole model.")
    config = read_object(part / "config.json")
    if told := config.get("quantization_config"):
        raise quantised(part, str(told.get("quant_method") if isinstance(told, dict) else told))
    return config


def empty_part(folder: Path, name: str, kind: Any) -> Any:
    """A part whose weights hold no data, as its config has it. Raises HollowError as `read_config` does, and for a
    config that makes none."""
    return _made(folder, name, kind, init_empty_weights())


def outline_part(folder: Path, name: str, kind: Any, *, dtype: torch.dtype) -> Any:
    """A part, frozen, of tensors without data (on PyTorch's "meta" device); its config alone is read. Raises
    HollowError as `empty_part` does."""
    part = _made(folder, name, kind, torch.device("meta")).requires_grad_(False)
    return nn.Module.to(part, dtype=dtype)  # diffusers has a remark on its own


def load_part(folder: Path, name: str, kind: Any, *, dtype: torch.dtype) -> Any:
    """A part with its weights, on the CPU. Raises HollowError where anything of it is missing, damaged, no
    safetensors or does not belong together."""
    part = folder / name
    read_config(folder, name)
    found = weight_files(part, "diffusion_pytorch_model" if issubclass(kind, ConfigMixin) else "model")
    stored = [StoredWeights(file, dtype) for file in found.files]
    if issubclass(kind, (CLIPTextModel, CLIPTextModelWithProjection)):
        # transformers would look for names of its own version, and fill what it does not find with noise
        module = empty_part(folder, name, kind)
        return filled(module, clip_weights(module, {key: it[key] for it in stored for key in it}), part)
    with _as_sentence(part):
        module, told = kind.from_pretrained(
            str(part),  # as configs keep it
            torch_dtype=dtype,
            variant=found.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(told["missing_keys"]) or [key for key, it in module.named_parameters() if it.is_meta]:
            raise lacking(part, missing[0])
        for weights in stored:
            for key in filter(weights.is_scaled, weights):
                module.get_parameter(key).data.copy_(weights[key])
    return module.eval()


def load_tokenizer(
    folder: Path, name: str, kind: Any, encoder: nn.Module | None, title: str = "model", **options: Any
) -> Any:
    """A tokenizer of the encoder, if there is one; `title` is what to get where it is missing. Raises HollowError then,
    for a broken one, and for one that has other tokens than the encoder."""
    if not any((folder / name / file).exists() for file in _VOCABULARIES):
        raise HollowError(f"{folder} lacks its {name}. Get the whole {title}.")
    with _as_sentence(folder / name):
        tokenizer = kind.from_pretrained(str(folder / name), **options)
    embedding: Any = None if encoder is None else _word_embedding(encoder)
    if embedding is not None:
        known, words = embedding.num_embeddings, len(tokenizer)
        is_clip = isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection)
        # other encoders have more rows than words, to be a round number
        if words > known or (is_clip and words < known):
            raise HollowError(
                f"{folder / name} has {words} tokens, its text encoder {known}, as where textual inversion changed one "
                "of them. Get both from the same model."
            )
    return tokenizer


class WeightFiles(NamedTuple):
    """The files of a part's weights, and what diffusers calls their variant."""

    files: list[Path]
    variant: str | None


def weight_files(part: Path, name: str) -> WeightFiles:
    """Plain ones if they are there, else fp16, else any other variant; whole or in shards. Raises HollowError where
    none are complete."""
    lacks: Path | None = None
    for variant in _variants(part, name):
        dotted = "" if variant is None else f".{variant}"
        whole, index = part / f"{name}{dotted}.safetensors", part / f"{name}.safetensors.index{dotted}.json"
        if whole.exists():
            return WeightFiles([whole], variant)
        if index.exists():
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise HollowError(f"{index} does not tell which weight is in which file. Get it again.")
            files = [part / Path(shard).name for shard in sorted(set(shards.values()))]
            if all(file.exists() for file in files):
                return WeightFiles(files, variant)
            lacks = lacks or next(file for file in files if not file.exists())
    if lacks is not None:
        raise HollowError(f"{part} does not load: it lacks {lacks.name}. Get the whole model.")
    pickles = ", and pickles (.bin) are never read" if any(part.glob("*.bin")) else ""
    raise HollowError(f"{part} does not load: it has no {name}.safetensors{pickles}. Get all of it as .safetensors.")


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers load without progress bars and remarks on stderr."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
    for logging in libraries:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # torch_dtype is on its way out, but the only name that older versions know.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logging, (verbosity, bars) in zip(libraries, before, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _variants(part: Path, name: str) -> list[str | None]:
    """None for the plain one, then those that files are named after."""
    pattern = re.compile(rf"{name}\.(\w+)\.safetensors|{name}\.safetensors\.index\.(\w+)\.json")
    matches = (pattern.fullmatch(file.name) for file in part.glob(f"{name}.*"))
    named = {match[1] or match[2] for match in matches if match is not None}
    return [None, *sorted(named, key=lambda variant: (variant != "fp16", variant))]


def _word_embedding(encoder: nn.Module) -> Any:
    try:
        found = encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _made(folder: Path, name: str, kind: Any, where: AbstractContextManager[Any]) -> nn.Module:
    config = read_config(folder, name)
    with _as_sentence(folder / name), where:
        if issubclass(kind, ConfigMixin):
            made: nn.Module = kind.from_config(config)
        else:
            made = kind(kind.config_class.from_pretrained(str(folder / name)))
        return made.eval()


@contextmanager
def _as_sentence(part: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except HollowError:
        raise
    except Exception as error:  # of many kinds, as configs and weights may be anything
        raise unloadable(part, error) from error


def unloadable(path: Path, error: Exception) -> HollowError:
    """What is said where a library fails, with the beginning of its reason."""
    reason = " ".join(str(error).split())[:200]
    return HollowError(f"{path} does not load: {reason} … Check that it is whole, and of a kind that Hollow takes.")
