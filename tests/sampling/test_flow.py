"""A transformer's pictures are those of its own pipeline in diffusers, drawn from the same noise and prompts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor
from torch.nn.functional import interpolate

from hollow_core.errors import HollowError
from hollow_core.lora.file import LoraFile
from hollow_core.lora.layers import add_lora, lora_state, remove_lora
from hollow_core.models.base_model import load
from hollow_core.models.transformer_model import TransformerModel
from hollow_core.nets.families.family import packed, unpacked
from hollow_core.sampling.sample import SampleSettings, draw, encode_guided, sample

SIZE = (96, 64)  # pixels, height and width
LATENTS = (12, 8)
PROMPT, NEGATIVE = "a photo of a dog", "blurred"
FAMILIES = ["flux", "sd3", "z-image", "qwen-image", "krea2"]
ADDED = {"z-image": 1, "krea2": 1}
"""What our scale of guidance is more than that of the pipeline."""
STEPS = {"z-image": 2}
"""At whose noise levels 1 - σ has no rounding, which Z-Image takes a thousand times."""


def theirs(name: str, folder: Path, guidance: float, **how: Any) -> Tensor:
    """Latents (batch, channels, height, width) of the pipeline."""
    kind = diffusers.DiffusionPipeline.from_pretrained(folder)
    kind.set_progress_bar_config(disable=True)
    scale = {"qwen-image": "true_cfg_scale"}.get(name, "guidance_scale")
    negative = {} if name == "flux" else {"negative_prompt": NEGATIVE}
    longest = {"max_sequence_length": 64} if name in ("flux", "sd3", "z-image") else {}
    drawn = kind(
        PROMPT,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS.get(name, 3),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **{scale: guidance - ADDED.get(name, 0)},
        **negative,
        **longest,
        **how,
    ).images
    return drawn if drawn.dim() == 4 else unpacked(drawn, LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_the_pipelines(name: str, guidance: float, transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder(name))
    settings = SampleSettings(STEPS.get(name, 3), guidance, NEGATIVE, size=SIZE)
    ours = draw(model, encode_guided(model, PROMPT, settings), [3], settings)
    torch.testing.assert_close(ours, theirs(name, transformer_folder(name), guidance), rtol=1e-4, atol=1e-4)


def test_latents_are_those_of_anima(transformer_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose pipeline is put together of steps, and resizes a mask, all zeros, by torchvision."""
    resizing = SimpleNamespace(resize=lambda mask, size, interpolation: interpolate(mask, size))
    torchvision = SimpleNamespace(functional=resizing, InterpolationMode=SimpleNamespace(NEAREST=None))
    monkeypatch.setattr(transformer_cosmos, "transforms", torchvision, raising=False)
    folder = transformer_folder("anima")
    pipeline = diffusers.ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    height, width = SIZE
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": height, "width": width, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(**asked, max_sequence_length=64, generator=generator, output="latents")
    model = load(folder)
    settings = SampleSettings(steps=3, guidance=3.0, negative=NEGATIVE, size=SIZE)
    ours = draw(model, encode_guided(model, PROMPT, settings), [3], settings)
    torch.testing.assert_close(ours, expected.squeeze(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_a_picture_is_the_pipelines(name: str, transformer_folder: Callable[[str], Path]) -> None:
    folder = transformer_folder(name)
    settings = SampleSettings(steps=2, guidance=2.0, negative=NEGATIVE, size=SIZE)
    (ours,) = sample(load(folder), [PROMPT], [3], settings, device="cpu")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        **({"guidance_scale": 1.0, "max_sequence_length": 64} if name == "z-image" else {"true_cfg_scale": 2.0}),
    ).images
    assert np.abs(np.asarray(ours, int) - np.asarray(expected, int)).max() <= 1


def test_pictures_drawn_together_are_those_drawn_alone(transformer_folder: Callable[[str], Path]) -> None:
    """Although prompts are of different lengths."""
    model = load(transformer_folder("z-image"))
    prompts = ["a dog", "a dog on the beach at night", "a cat"]
    alone, together = (
        sample(model, prompts, [3, 4, 5], SampleSettings(steps=2, size=SIZE, together=each)) for each in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_a_distilled_network_is_told_the_guidance(transformer_folder: Callable[[str], Path]) -> None:
    """In sampling; in training 1, whatever is asked."""
    model = load(transformer_folder("flux"))
    assert isinstance(model, TransformerModel)
    text = encode_guided(model, PROMPT, SampleSettings(guidance=2.5))
    assert text["negatives"] == []
    assert [prompt.guidance.tolist() for prompt in text["prompts"]] == [[2.5]]
    assert encode_guided(model, PROMPT, SampleSettings())["prompts"][0].guidance.tolist() == [3.5]  # FLUX's usual
    assert model.encode_prompt(PROMPT).guidance is None


def test_a_lora_changes_the_picture_and_leaves_no_trace(transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder("z-image"))
    network = model.network
    add_lora(network.module, 2, targets=network.targets.attention, generator=torch.Generator().manual_seed(0))
    state = {key: torch.full_like(matrix, 0.2) for key, matrix in lora_state(network.module).items()}
    remove_lora(network.module)

    def drawn(lora: LoraFile | None, **how: Any) -> np.ndarray:
        settings = SampleSettings(steps=2, size=SIZE, **how)
        return np.asarray(sample(model, [PROMPT], [3], settings, lora=lora)[0], int)

    plain, lora = drawn(None), LoraFile(state, 2.0, None, {})
    assert np.abs(drawn(lora) - plain).max() > 3
    assert np.array_equal(drawn(lora, strength=0.0), plain)
    assert np.array_equal(drawn(None), plain)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"refresh": 2}, "Z-Image draws on one path, with nothing to refresh"),
        ({"size": (72, 64)}, "Z-Image draws in steps of 16 pixels, but 72 is none"),
    ],
)
def test_what_it_cannot_draw(how: dict[str, Any], sentence: str, transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder("z-image"))
    with pytest.raises(HollowError, match=sentence):
        sample(model, [PROMPT], [3], SampleSettings(steps=1, **{"size": SIZE, **how}))


def test_patches_are_packed_as_in_flux() -> None:
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpacked(packed(latents), (6, 8)), latents)
    theirs = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(packed(latents), theirs)
