"""What a base model learned to predict, and at which noise, as its files tell it: a folder by its scheduler, a single
file by markers that other tools write.

A LoRA that is trained on another prediction than its base was is wasted, and shows it at the end only. So what is not
known to be epsilon, v-prediction, sample or, of transformers, flow matching is refused by its name.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..errors import HollowError
from ..files import read_json
from ..nets.schedule import FLOW_TIMESTEPS, PREDICTIONS

_DDPM: Mapping[str, Any] = {}
"""DDPMScheduler's own defaults."""
_SD: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
"""Those of classes that came with Stable Diffusion, where they differ."""

DIFFUSION: Mapping[str, Mapping[str, Any]] = {
    "DDIMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _DDPM,
    "DPMSolverMultistepScheduler": _DDPM,
    "DPMSolverSDEScheduler": _SD,
    "DPMSolverSinglestepScheduler": _DDPM,
    "EulerAncestralDiscreteScheduler": _DDPM,
    "EulerDiscreteScheduler": _DDPM,
    "HeunDiscreteScheduler": _SD,
    "KDPM2AncestralDiscreteScheduler": _SD,
    "KDPM2DiscreteScheduler": _SD,
    "LMSDiscreteScheduler": _DDPM,
    "PNDMScheduler": _DDPM,
    "SASolverScheduler": _DDPM,
    "UniPCMultistepScheduler": _DDPM,
}
"""diffusers' samplers of what DDPM trains, each with its own defaults: they differ in their steps, not in the noise."""

FLOW: Mapping[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "shift",
    "FlowMatchHeunDiscreteScheduler": "shift",
    "DEISMultistepScheduler": "flow_shift",
    "DPMSolverMultistepScheduler": "flow_shift",
    "DPMSolverSinglestepScheduler": "flow_shift",
    "SASolverScheduler": "flow_shift",
    "UniPCMultistepScheduler": "flow_shift",
}
"""Those of flow matching, each with its name for the shift of noise levels."""

_WORDS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v_pred"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
"""How metadata call a prediction."""


def diffusion_scheduler(folder: Path, told: Mapping[str, Any], model: Path) -> DDPMScheduler:
    """That of a diffusers folder with a U-Net, in the form in which all of its kind are alike: betas and a prediction
    type. What is `told` elsewhere, by a single file or a person, counts more than its config.

    Raises HollowError for a scheduler of another kind, and for a prediction type of the `model` that is unknown.
    """
    config, classes = _config(folder)
    for name in classes:
        if name not in DIFFUSION:
            raise _another(folder, name)
    for key, usual in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
        if (value := config.get(key) or usual) != usual:
            raise _another(folder, f"{classes[0]} with {key} {value!r}")
    config = {**DIFFUSION[classes[0]], **config, **told}
    if (kind := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
        raise HollowError(
            f"{model} is said to predict {kind!r}, which Hollow does not know of a U-Net: it knows "
            f"{', '.join(PREDICTIONS)}. Take another model, or give --prediction-type where you know better."
        )
    try:
        scheduler = DDPMScheduler.from_config(config)
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise HollowError(
            f"The scheduler of {folder} has a config that DDPM has not ({error}). Get it again."
        ) from error
    if not ((scheduler.betas >= 0) & (scheduler.betas <= 1)).all():
        raise HollowError(f"The scheduler of {folder} has betas that are not from 0 to 1. Get its config again.")
    return scheduler


def flow_scheduler(folder: Path, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """That of a diffusers folder with a transformer, as Euler's, which tells how noise levels are shifted; by `shift`
    where the folder has none. Raises HollowError for one that is not of flow matching."""
    usual: dict[str, Any] = {"shift": shift or 1.0}
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        return FlowMatchEulerDiscreteScheduler.from_config(usual)
    config, classes = _config(folder)
    for name in classes:
        if name not in FLOW:
            raise _another(folder, name, transformer=True)
    name, kind = classes[0], config.get("prediction_type", "epsilon")
    if name in DIFFUSION and kind != "flow_prediction":
        raise _another(folder, f"{name} with prediction_type {kind!r}", transformer=True)
    for key, expected in (("invert_sigmas", False), ("num_train_timesteps", FLOW_TIMESTEPS)):
        if (value := config.get(key) or expected) != expected:
            raise _another(folder, f"{name} with {key} {value!r}", transformer=True)
    if (told := config.get(FLOW[name])) is not None:
        usual["shift"] = told
    return FlowMatchEulerDiscreteScheduler.from_config({**config, **usual})


def told_by_file(path: Path, keys: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a single file tells of its noise schedule, which is little or nothing, as `diffusion_scheduler` takes it.

    The empty tensors "v_pred" and "ztsnr" are ComfyUI's, and others write them, too; "prediction_type" is modelspec's
    word, "predict_key" ComfyUI's, "ss_…" are kohya's. Raises HollowError for the markers of EDM, which Playground v2.5
    and CosXL carry.
    """
    if edm := sorted(key for key in keys if key.startswith("edm_")):
        raise HollowError(
            f"{path} holds {edm[0]}, so it learned at the noise levels of EDM, as Playground v2.5 and CosXL did, but "
            "Hollow trains U-Nets on DDPM's noise alone. Take another model, such as SDXL base."
        )
    told: dict[str, Any] = {}
    if "ztsnr" in keys or metadata.get("ss_zero_terminal_snr") == "True":
        told["rescale_betas_zero_snr"] = True
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if "v_pred" in keys:
        told["prediction_type"] = "v_prediction"
    elif said:
        told["prediction_type"] = _WORDS.get(said.strip().lower().replace("-", "_"), said)
    elif velocity := metadata.get("ss_v_parameterization"):
        told["prediction_type"] = "v_prediction" if velocity == "True" else "epsilon"
    return told


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Of the scheduler, and what classes it and the pipeline's index name, which should be one."""
    file, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    config, listed = read_json(file), read_json(index).get("scheduler") if index.exists() else None
    if not isinstance(config, dict):
        raise HollowError(f"{file} is no config of a scheduler. Get it again.")
    named = config.get("_class_name"), listed[1] if isinstance(listed, list) and len(listed) > 1 else None
    classes = [str(name) for name in dict.fromkeys(named) if name] or ["of no class"]
    return {"_class_name": classes[0], **config}, classes


def _another(folder: Path, scheduler: str, *, transformer: bool = False) -> HollowError:
    """What is said of a scheduler that samples what Hollow does not train."""
    if transformer:
        trains, such = "transformers on flow matching", "FlowMatchEulerDiscreteScheduler"
    else:
        trains, such = "U-Nets on DDPM's noise", "DDIMScheduler or EulerDiscreteScheduler"
    return HollowError(
        f"{folder} has the scheduler {scheduler}, but Hollow trains {trains} alone, which {such} would sample. Take "
        "the base model, not one that was distilled or made for another kind of noise."
    )
