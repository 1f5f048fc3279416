"""What a model learned to predict: known by its scheduler or markers, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from hollow_core.errors import HollowError
from hollow_core.models.schedulers import DIFFUSION, diffusion_scheduler, flow_scheduler, told_by_file
from hollow_core.nets.schedule import PREDICTIONS

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def folder_of(folder: Path, scheduler: Any, listed: str | None = None) -> Path:
    """With this config of a scheduler, and the class that the pipeline's index lists."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "StableDiffusionPipeline"} | ({"scheduler": ["diffusers", listed]} if listed else {})
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def refusal(asked: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(HollowError) as refused:
        asked(*given)
    return str(refused.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, of numpy
@pytest.mark.parametrize("name", [name for name in DIFFUSION if name != "DPMSolverSDEScheduler"])  # which is optional
@pytest.mark.parametrize("config", [{}, BETAS])
def test_every_sampler_of_ddpm_has_the_noise_that_diffusers_gives_it(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    """Where a config leaves betas out, too: each class has its own."""
    folder = folder_of(tmp_path, {"_class_name": name, "prediction_type": "v_prediction", **config})
    found = diffusion_scheduler(folder, {}, folder)
    theirs = getattr(diffusers, name)(**config)
    torch.testing.assert_close(found.alphas_cumprod, theirs.alphas_cumprod)
    assert found.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_a_prediction_type_is_taken_as_told(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, {"_class_name": "EulerDiscreteScheduler", "prediction_type": kind, **BETAS})
    assert diffusion_scheduler(folder, {}, folder).config.prediction_type == kind
    assert diffusion_scheduler(folder, {"prediction_type": "sample"}, folder).config.prediction_type == "sample"


OTHERS = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and name not in DIFFUSION)


@pytest.mark.parametrize("name", [*OTHERS, "MyOwnScheduler"])
def test_any_other_scheduler_is_refused_by_name(tmp_path: Path, name: str) -> None:
    expected = f"has the scheduler {name}, but Hollow trains U-Nets on DDPM's noise alone"
    folder = folder_of(tmp_path, {"_class_name": name})
    assert expected in refusal(diffusion_scheduler, folder, {}, folder)
    folder = folder_of(tmp_path, {"_class_name": "DDIMScheduler"}, listed=name)
    assert expected in refusal(diffusion_scheduler, folder, {"prediction_type": "epsilon"}, folder)
    folder = folder_of(tmp_path, {}, listed=name)
    assert expected in refusal(diffusion_scheduler, folder, {}, folder)


def test_the_refused_are_those_that_papers_call_otherwise() -> None:
    """So that the list above is not empty of what people have."""
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler"} <= {*OTHERS}
    assert {"CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler"} <= {*OTHERS}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"timestep_type": "continuous"}, "has the scheduler EulerDiscreteScheduler with timestep_type 'continuous'"),
        ({"use_flow_sigmas": True}, "has the scheduler EulerDiscreteScheduler with use_flow_sigmas True"),
        ({"prediction_type": "flow_prediction"}, "is said to predict 'flow_prediction', which Hollow does not know of"),
        ({"prediction_type": "velocity"}, "it knows epsilon, v_prediction, sample. Take another model, or give"),
        ({"beta_schedule": "exp"}, "has a config that DDPM has not (exp is not implemented"),
        ({"beta_start": "small"}, "has a config that DDPM has not ("),
        ({"beta_end": 1.5}, "has betas that are not from 0 to 1"),
    ],
)
def test_a_known_sampler_with_other_noise_is_refused(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    folder = folder_of(tmp_path, {"_class_name": "EulerDiscreteScheduler", **config})
    assert sentence in refusal(diffusion_scheduler, folder, {}, folder)


def test_a_folder_without_a_schedulers_config(tmp_path: Path) -> None:
    assert "scheduler_config.json cannot be read" in refusal(diffusion_scheduler, tmp_path, {}, tmp_path)
    folder = folder_of(tmp_path, ["DDIMScheduler"])
    assert "is no config of a scheduler. Get it again" in refusal(diffusion_scheduler, folder, {}, folder)
    folder = folder_of(tmp_path, {"beta_start": 0.1})
    assert "has the scheduler of no class, but Hollow" in refusal(diffusion_scheduler, folder, {}, folder)


@pytest.mark.parametrize(
    ("keys", "metadata", "told"),
    [
        ([], {}, {}),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        (
            ["v_pred"],
            {"modelspec.prediction_type": "epsilon"},
            {"prediction_type": "v_prediction"},
        ),  # as ComfyUI has it
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "V-Prediction"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "x0"}, {"prediction_type": "sample"}),
        ([], {"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.predict_key": "epsilon"}, {"prediction_type": "epsilon"}),
        ([], {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ([], {"ss_v_parameterization": "False"}, {"prediction_type": "epsilon"}),
        ([], {"ss_zero_terminal_snr": "True"}, {"rescale_betas_zero_snr": True}),
        ([], {"modelspec.prediction_type": "rectified flow"}, {"prediction_type": "rectified flow"}),
    ],
)
def test_what_markers_of_a_single_file_mean(keys: list[str], metadata: dict[str, str], told: dict[str, Any]) -> None:
    assert told_by_file(Path("m.safetensors"), ["first_stage_model.a", *keys], metadata) == told


def test_a_word_for_a_prediction_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"_class_name": "DDIMScheduler"})
    told, model = {"prediction_type": "rectified flow"}, Path("my.safetensors")
    assert "my.safetensors is said to predict 'rectified flow'" in refusal(diffusion_scheduler, folder, told, model)


@pytest.mark.parametrize("keys", [["edm_mean", "edm_std"], ["edm_vpred.sigma_max"], ["edm_vpred.sigma_min", "v_pred"]])
def test_markers_of_edm_are_refused_by_name(keys: list[str]) -> None:
    assert f"m.safetensors holds {keys[0]}, so it learned at the noise levels of EDM" in refusal(
        told_by_file, Path("m.safetensors"), keys, {}
    )


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}, 2.5),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 3.0),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0}, 2.0),
        (
            {
                **{"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
                **{"use_flow_sigmas": True, "flow_shift": 4.0},
            },
            4.0,
        ),
    ],
)
def test_schedulers_of_flow_matching_tell_their_shift(tmp_path: Path, config: dict[str, Any], shift: float) -> None:
    assert flow_scheduler(folder_of(tmp_path, config), 3.0).config.shift == shift


def test_without_a_scheduler_a_transformer_has_its_familys_shift(tmp_path: Path) -> None:
    assert flow_scheduler(tmp_path, 3.0).config.shift == 3.0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler with prediction_type 'epsilon'"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
            "FlowMatchEulerDiscreteScheduler with invert_sigmas True",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500},
            "FlowMatchEulerDiscreteScheduler with num_train_timesteps 500",
        ),
    ],
)
def test_a_transformer_on_anything_else_is_refused_by_name(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    said = refusal(flow_scheduler, folder_of(tmp_path, config), 1.0)
    assert f"has the scheduler {named}, but Hollow trains transformers on flow matching alone" in said


def test_ddpm_itself_stays_as_it_is(tmp_path: Path) -> None:
    """Zero terminal SNR and betas one by one come through."""
    betas = torch.linspace(1e-4, 0.02, 10).tolist()
    told = {"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 10}
    found = diffusion_scheduler(folder_of(tmp_path, told | {"rescale_betas_zero_snr": True}), {}, tmp_path)
    theirs = DDPMScheduler(num_train_timesteps=10, trained_betas=betas, rescale_betas_zero_snr=True)
    assert torch.equal(found.alphas_cumprod, theirs.alphas_cumprod)
