"""Single-file checkpoints in the original (LDM) layout: SD 1.x, SD 2.x and SDXL, without the network.

`layouts/` holds the configs of the three families, each as a diffusers folder without weights, and CLIP's
tokenizer, so diffusers' own loader has all that it would otherwise download.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import HollowError
from ..files import damaged, read_json
from ..nets.families import TITLES
from . import layouts
from .schedulers import told_by_file

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def load_single_file(path: Path, dtype: torch.dtype, config: Path | None = None) -> Pipeline:
    """The pipeline in a .safetensors file; its scheduler is not the file's, but that of its configs.

    `config` is a diffusers folder with the configs and tokenizers of a model whose layers have other sizes
    than the public ones.
    Raises HollowError for a damaged or incomplete file, a LoRA, and any other kind of model.
    """
    config, schedule = recognise(path, config)
    kind = pipeline_class(config)
    try:
        with quiet():
            pipeline = kind.from_single_file(
                str(path),
                config=str(config),
                torch_dtype=dtype,
                local_files_only=True,
                **without_extras(kind),
                **_tokenizers(config),
            )
    except Exception as error:  # of many kinds, for keys that are missing or of other shapes
        raise unloadable(path, error) from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _check_whole(path, name, part)
    pipeline.unet.register_to_config(sample_size=sample_size(config, schedule, pipeline.unet.config.sample_size))
    return pipeline


def recognise(path: Path, config: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder with the configs of a .safetensors checkpoint (`config` if given), and what the file tells of
    its noise schedule. Only its header is read, and one bias. Raises HollowError as `load_single_file` does.
    """
    try:
        with safe_open(path, "pt") as file:
            return config or layouts.FOLDER / _layout(path, file), _schedule(path, file)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def sample_size(config: Path, schedule: Mapping[str, Any], usual: int) -> int:
    """The side of a file's native latents: `usual`, but SD 2.x learned v-prediction at 768 pixels."""
    velocity = schedule.get("prediction_type") == "v_prediction"
    return 96 if velocity and config == layouts.FOLDER / "sd21" else usual


def pipeline_class(folder: Path) -> type[Pipeline]:
    """The class that model_index.json names. Raises HollowError for any but those of SD and SDXL."""
    name = read_json(folder / "model_index.json").get("_class_name")
    known = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
    if name not in known:
        raise HollowError(
            f"{folder} holds a {name}. Hollow takes text-to-image models: SD 1.x, SD 2.x, SDXL, and of transformers "
            f"{TITLES}."
        )
    return known[name]


def without_extras(kind: type[Pipeline]) -> Mapping[str, None]:
    """The parts of a pipeline that are not loaded."""
    extras = ["image_encoder", "feature_extractor"]
    return dict.fromkeys(extras if kind is StableDiffusionXLPipeline else [*extras, "safety_checker"])


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


def unloadable(path: Path, error: Exception) -> HollowError:
    """What is said where diffusers fails, with the beginning of its reason."""
    reason = " ".join(str(error).split())[:200]
    return HollowError(f"{path} does not load: {reason} … Check that it is whole, and of SD 1.x, 2.x or SDXL.")


def _layout(path: Path, file: Any) -> str:
    keys = set(file.keys())
    if any("lora_" in key or ".lora." in key for key in keys):
        raise HollowError(f"{path} is a LoRA, not a model. Give the base model that it belongs to.")
    if not {_FIRST, _TEXT} <= keys:
        raise HollowError(
            f"{path} is no checkpoint of SD 1.x, SD 2.x or SDXL. Hollow takes these only; of a transformer "
            f"({TITLES}) give the diffusers folder."
        )
    channels, width = (file.get_slice(key).get_shape()[1] for key in (_FIRST, _TEXT))
    layout = {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(width)
    if channels != 4 or layout is None:
        raise HollowError(
            f"{path} takes {channels} channels and text embeddings {width} wide, so it is for inpainting, a "
            "refiner or the like. Take the plain base model."
        )
    for part, prefixes in (
        ("VAE", ("first_stage_model.",)),
        ("text encoder", ("cond_stage_", "conditioner.")),
    ):
        if not any(key.startswith(prefixes) for key in keys):
            raise HollowError(f"{path} lacks its {part}. Get the full checkpoint.")
    return layout


def _schedule(path: Path, file: Any) -> dict[str, Any]:
    """What a single file tells of its noise schedule: by `told_by_file`, or for SD 2.x by the spread of one bias, as
    ComfyUI tells the 768-pixel model (v-prediction) from the 512-pixel one (epsilon)."""
    keys = set(file.keys())
    told = told_by_file(path, keys, file.metadata() or {})
    if "prediction_type" not in told and _BIAS in keys and file.get_slice(_TEXT).get_shape()[1] == 1024:
        spread = float(file.get_tensor(_BIAS).float().std(correction=0))
        told |= {"prediction_type": "v_prediction"} if spread > 0.09 else {}
    return told


def _tokenizers(config: Path) -> dict[str, CLIPTokenizer]:
    """CLIP's own for the public layouts, all of which share it; OpenCLIP differs in the padding only."""
    if config.parent != layouts.FOLDER:
        return {}
    clip = CLIPTokenizer.from_pretrained(layouts.FOLDER / "tokenizer")
    open_clip = CLIPTokenizer.from_pretrained(layouts.FOLDER / "tokenizer", pad_token="!")
    if config.name == "sdxl":
        return {"tokenizer": clip, "tokenizer_2": open_clip}
    return {"tokenizer": open_clip if config.name == "sd21" else clip}


def _check_whole(path: Path, name: str, part: nn.Module) -> None:
    """diffusers leaves some weights that a file lacks without memory, and says nothing."""
    missing = [key for key, parameter in part.named_parameters() if parameter.is_meta]
    if missing:
        raise HollowError(f"{path} lacks weights of its {name}, such as {missing[0]}. Get the full checkpoint.")
