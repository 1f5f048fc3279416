"""What a LoRA file says of itself: kohya's `ss_*`, Stability's `modelspec.*`, and our own `hollow.*`.

A1111, Forge, ComfyUI's managers and InvokeAI file it under its base model by the first two, and show its trigger words
and thumbnail; two-path sampling reads the third. See github.com/Stability-AI/ModelSpec (1.0.0) and kohya's
sd-scripts, train_network.py.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from ..data.prompts import Subject, generic_prompt, personal_prompt
from ..errors import HollowError
from ..nets.families import FAMILIES
from ..nets.network import Cut, read_cut
from .privacy import without_paths

# The values that kohya's trainer writes.
_BASE_VERSION = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURE = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_SGM = "https://github.com/Stability-AI/generative-models"
_TRANSFORMERS = {family.name: family for family in FAMILIES.values()}

# How those begin in files of others.
_FAMILY = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd21": ("sd_v2", "stable-diffusion-v2"),
    "sdxl": ("sdxl", "stable-diffusion-xl"),
}
_TEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}  # what InvokeAI goes by, too
_TEXT_IN = re.compile(
    r"(down_block|up_block|mid_block|input_block|output_block|middle_block).*attn2[._](processor[._])?to_[kv](_lora\.down|\.lora_down|\.lora\.down|\.lora_A)"
)

# Names of folders and runs on the trainer's disk, and what would no longer be true of other bytes.
_PRIVATE = {
    "ss_config_file",
    "ss_dataset_dirs",
    "ss_datasets",
    "ss_reg_dataset_dirs",
    "ss_session_id",
    "ss_training_comment",
}
_STALE = ("sshs_", "modelspec.hash_", "lora_adapter_metadata", "format")
_THUMBNAIL = 256  # pixels, what modelspec recommends


class Recipe(NamedTuple):
    """How a LoRA was trained, as far as sampling on two paths needs it; stored under `hollow.*`."""

    cut: Cut | None
    """The paper's k, or of a transformer (n, m); None for an ordinary LoRA on the whole network."""
    identifier: str
    class_word: str
    personal_prompt: str
    generic_prompt: str
    prediction_type: str = "epsilon"
    """The base model's: "epsilon", "v_prediction" or "flow"."""

    @property
    def two_paths(self) -> bool:
        """Whether it is sampled on two paths, as a hollowed U-Net's is; a transformer's LoRA is used as it is."""
        return isinstance(self.cut, int)


def recipe_for(cut: Cut | None, identifier: str, class_word: str, prediction_type: str) -> Recipe:
    """The recipe of a training under the usual prompts, "a photo of a sks dog" and the same without its identifier.

    Without a class word, which only captions of a style or a concept go without, the prompts are empty."""
    personal = personal_prompt(identifier, class_word) if class_word.strip(" ,") else ""
    return Recipe(cut, identifier, class_word, personal, generic_prompt(personal, identifier), prediction_type)


def describe(title: str, layout: str, rank: int, alpha: float, recipe: Recipe, *, dora: bool = False) -> dict[str, str]:
    """What kohya's trainer and the modelspec standard write, as far as tools read it, and our own."""
    trigger = Subject(recipe.identifier, recipe.class_word).called
    return {
        **_common(title, layout, recipe.prediction_type),
        **kohya_network(rank, alpha, dora=dora),
        "ss_tag_frequency": json.dumps({recipe.class_word: {trigger: 1}}),
        "modelspec.trigger_phrase": trigger,
        **{f"hollow.{field}": json.dumps(value) for field, value in recipe._asdict().items()},
    }


def describe_converted(metadata: Mapping[str, str], title: str, layout: str) -> dict[str, str]:
    """What of another file's metadata goes into its conversion, and what every file says.

    `layout` is the network's, as the shapes tell; what names another base model is left out, too. So are paths on
    somebody's disk (kohya's lists of folders, and what `privacy.without_paths` finds), the trainer's comment, and
    hashes of the old bytes. An author's name and a licence stay: they were meant to be read.
    """
    told = metadata.get("modelspec.prediction_type") or metadata.get("ss_v_parameterization", "")
    prediction = "v_prediction" if told in ("v", "True") else "epsilon"
    public = {key: value for key, value in metadata.items() if key not in _PRIVATE and not key.startswith(_STALE)}
    true = {key: value for key, value in without_paths(public).items() if not _is_false(key, value, layout)}
    return _common(title, layout, prediction) | true


def _is_false(key: str, value: str, layout: str) -> bool:
    """Whether an entry of another file names another base model than it is for."""
    if key in ("ss_base_model_version", "modelspec.architecture"):
        return layout_told({key: value}) not in ("", layout)
    if key == "ss_v2":
        return (value == "True") != (layout == "sd21")
    return key == "modelspec.implementation" and value == _SGM and layout != "sdxl"


def kohya_network(rank: int, alpha: float, *, dora: bool = False, by_input: bool = False) -> dict[str, str]:
    """kohya's words for what a file holds; a DoRA is made with LyCORIS there, as kohya's own network knows none. Its
    magnitudes are of outputs, or `by_input`."""
    described = {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }
    if dora:  # as kohya keeps what --network_args says: all of them words
        described["ss_network_args"] = json.dumps(
            {"algo": "lora", "dora_wd": "True", "wd_on_output": str(not by_input)}
        )
    return described


def thumbnail(picture: Image.Image) -> dict[str, str]:
    """A small JPEG of `picture` as modelspec has it, without anything else that the picture's file held."""
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.info.clear()  # a camera's comment, for one
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return {"modelspec.thumbnail": "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()}


def layout_of(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]] | None = None) -> str:
    """ "sd15", "sd21", "sdxl" or the name of a family of transformers, as a file tells: of U-Nets by the width of the
    text that its cross-attention takes in, where the shapes of its tensors are given, else by its metadata. Raises
    HollowError where neither does."""
    for key, shape in (shapes or {}).items():
        if _TEXT_IN.search(key) and len(shape) > 1 and shape[1] in _TEXT_WIDTH:
            return _TEXT_WIDTH[shape[1]]
    if told := layout_told(metadata):
        return told
    version = metadata.get("ss_base_model_version", "")[:80]
    raise HollowError(f"The LoRA's base model is {version or 'not named'}. Give the model that it belongs to.")


def layout_told(metadata: Mapping[str, str]) -> str:
    """As `layout_of`, by the metadata alone; "" where they tell none."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for layout, (kohya, modelspec) in _FAMILY.items():
        if version.startswith(kohya) or architecture.startswith(modelspec):
            return layout
    for name, family in _TRANSFORMERS.items():
        begins = tuple(map(_letters, filter(None, (family.name, family.version, family.architecture))))
        if any(_letters(said).startswith(begins) for said in (version, architecture)):
            return name
    return ""


def recipe_of(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that `describe` wrote; None in another tool's file, and in one whose recipe is damaged."""
    try:
        told = {field: json.loads(metadata[f"hollow.{field}"]) for field in Recipe._fields}
        recipe = Recipe(**told | {"cut": read_cut(told["cut"])})
    except (KeyError, ValueError, RecursionError):
        return None
    cut, *words = recipe
    pair = isinstance(cut, tuple) and len(cut) == 2 and all(type(end) is int for end in cut)
    whole = (cut is None or type(cut) is int or pair) and all(isinstance(word, str) for word in words)
    return recipe if whole else None


def _letters(name: str) -> str:
    """ "FLUX.1", "flux-1-dev" and "flux1" begin with the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _common(title: str, layout: str, prediction: str) -> dict[str, str]:
    described = {
        "ss_v2": str(layout == "sd21"),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": _SGM if layout == "sdxl" else "diffusers",
        "modelspec.title": title,
    }
    if (family := _TRANSFORMERS.get(layout)) is not None:  # the standard has no word for flow matching
        described["modelspec.architecture"] = f"{family.architecture}/lora"
        return described | ({"ss_base_model_version": family.version} if family.version else {})
    velocity = prediction == "v_prediction"
    if prediction != "sample":  # of which the standard knows nothing
        described["modelspec.prediction_type"] = "v" if velocity else "epsilon"
    if layout in _BASE_VERSION:
        described["ss_base_model_version"] = _BASE_VERSION[layout]
        architecture = "stable-diffusion-v2-768-v" if layout == "sd21" and velocity else _ARCHITECTURE[layout]
        described["modelspec.architecture"] = f"{architecture}/lora"
    return described
