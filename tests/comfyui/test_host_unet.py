"""What a MODEL predicts and is made of: read off it, or refused before anything trains."""

from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_model_advanced as advanced
from hollow_pack.hollow_core.errors import HollowError
from hollow_pack.nodes import hollow_unet
from hollow_pack.nodes.host.unet import noise_schedule, unet_config
from tiny_models import CPU, tiny_config, tiny_model

EDM = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}  # as Playground v2.5 carries them
COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}


def marked(**markers: torch.Tensor) -> ModelPatcher:
    """A MODEL as ComfyUI makes it of an SDXL checkpoint with these keys beside the weights."""
    return ModelPatcher(tiny_config("sdxl").get_model(markers, device=CPU).eval(), CPU, CPU)


def refusal(model: ModelPatcher) -> str:
    with pytest.raises(HollowError) as refused:
        noise_schedule(model)
    with pytest.raises(HollowError, match="This MODEL samples by"):  # so that no other node has it
        hollow_unet.HollowUNet.execute(model, 3)
    return str(refused.value)


@pytest.mark.parametrize(
    ("sampling", "prediction"), [("eps", "epsilon"), ("v_prediction", "v_prediction"), ("x0", "sample")]
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_what_a_patch_says_is_taken(sampling: str, prediction: str, zero_snr: bool) -> None:
    (model,) = advanced.ModelSamplingDiscrete().patch(tiny_model("sd15"), sampling, zero_snr)
    schedule = noise_schedule(model)
    assert schedule.prediction.name == prediction
    assert len(schedule) == 1000
    assert (float(schedule.numbers[-1]) < 1e-6) == zero_snr


def test_what_a_checkpoint_says_is_taken() -> None:
    assert noise_schedule(marked()).prediction.name == "epsilon"
    assert noise_schedule(marked(v_pred=torch.empty(0))).prediction.name == "v_prediction"


@pytest.mark.parametrize(
    ("markers", "name"), [(EDM, "ModelSamplingContinuousEDM and EDM"), (COSXL, "ModelSamplingContinuousEDM and V_PRED")]
)
def test_a_checkpoint_of_edm_is_refused_by_name(markers: dict[str, torch.Tensor], name: str) -> None:
    said = refusal(marked(**markers))
    assert f"This MODEL samples by {name}" in said
    assert said.endswith("Load another, such as SD1.5, SD2.1 or SDXL base.")


@pytest.mark.parametrize(
    ("node", "settings", "name"),
    [
        ("ModelSamplingDiscrete", ("lcm", False), "ModelSamplingDiscreteDistilled and LCM"),
        ("ModelSamplingDiscrete", ("img_to_img", False), "ModelSamplingDiscrete and IMG_TO_IMG"),
        ("ModelSamplingContinuousEDM", ("v_prediction", 120.0, 0.002), "ModelSamplingContinuousEDM and V_PREDICTION"),
        ("ModelSamplingContinuousEDM", ("edm", 120.0, 0.002), "ModelSamplingContinuousEDM and EDM"),
        ("ModelSamplingContinuousEDM", ("edm_playground_v2.5", 120.0, 0.002), "ModelSamplingContinuousEDM and EDM"),
        ("ModelSamplingContinuousEDM", ("eps", 120.0, 0.002), "ModelSamplingContinuousEDM and EPS"),
        ("ModelSamplingContinuousV", ("v_prediction", 500.0, 0.03), "ModelSamplingContinuousV and V_PREDICTION"),
        ("ModelSamplingStableCascade", (2.0,), "StableCascadeSampling and EPS"),
        ("ModelSamplingSD3", (3.0,), "ModelSamplingDiscreteFlow and CONST"),
    ],
)
def test_a_patch_of_another_sampling_is_refused_by_name(node: str, settings: tuple[Any, ...], name: str) -> None:
    (model,) = getattr(advanced, node)().patch(tiny_model("sd15"), *settings)
    said = refusal(model)
    assert f"This MODEL samples by {name}" in said
    assert said.endswith("Take the sampling patch before it out.")


def test_another_packs_sampling_is_judged_by_what_it_does() -> None:
    """Not by its name: one that only calls itself noise prediction is refused, one that is it, taken."""
    from comfy.model_sampling import EPS, ModelSamplingDiscrete

    class Same(EPS):
        pass

    class Halved(EPS):
        def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            return super().calculate_denoised(sigma, output / 2, given)

    for kind in (Same, Halved):
        model = tiny_model("sd15")
        both = type("ModelSamplingAdvanced", (ModelSamplingDiscrete, kind), {})
        model.add_object_patch("model_sampling", both(model.model.model_config))
        if kind is Same:
            assert noise_schedule(model).prediction.name == "epsilon"
        else:
            assert "samples by ModelSamplingDiscrete and Halved" in refusal(model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"transformer_depth_middle": -1}, "lacks middle_block.1."),  # SSD-1B
        ({"transformer_depth_middle": 1}, "lacks middle_block.1.transformer_blocks.1."),
        ({"transformer_depth_output": [0, 0, 0, 2, 1, 1, 2, 2, 2]}, "has output_blocks."),
    ],
)
def test_a_unet_of_other_layers_is_refused(changes: dict[str, Any], sentence: str) -> None:
    whole = tiny_config("sdxl").unet_config
    config = comfy.supported_models.SSD1B(whole | changes)
    model = ModelPatcher(config.get_model({}, device=CPU), CPU, CPU)
    with pytest.raises(HollowError) as refused:
        unet_config(model)
    assert f"This SSD1B {sentence}" in str(refused.value)
    assert "unlike SD1.5, SD2.1 and SDXL, which training knows. Load one of these." in str(refused.value)
