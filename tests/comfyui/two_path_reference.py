"""What two paths must compute in ComfyUI: the library's two paths in diffusers, put in place of a MODEL's U-Net."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel
from tiny_models import POOLED_WIDTH, SIZE
from torch import Tensor

from hollow_core.lora import file as lora_file
from hollow_core.lora.layers import layers_of_any_lora, load_lora_state, lora_off, set_strength
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.unet import head, hollow


class Reference:
    """Predicts one prompt at a time, and shares no line with the patch."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        lora: Any,
        folder: Path,
        generic: list[list[Any]],
        *,
        strength: float = 1.0,
        refresh: int = 1,
        lora_on_negatives: bool = True,
    ) -> None:
        path = folder / "reference.safetensors"
        comfy.utils.save_torch_file(lora.state, str(path), metadata=lora.metadata)
        loaded = lora_file.load(path, unet)
        load_lora_state(unet, loaded.state, loaded.alpha)
        set_strength(unet, strength)
        self.unet, self.base = unet, head(unet, lora.recipe.cut)
        self.personal = hollow(unet, lora.recipe.cut, timesteps=None)
        [[self.generic, values]] = generic
        self.generic_pooled = values["pooled_output"]
        self.refresh, self.lora_on_negatives = refresh, lora_on_negatives
        self.sigma, self.step = float("inf"), -1
        self.kept: dict[Any, Tensor] = {}

    def patched(self, model: ModelPatcher) -> ModelPatcher:
        self.sampling = model.get_model_object("model_sampling")
        patched = model.clone()
        patched.set_model_unet_function_wrapper(lambda _, call: self.denoise(**call))
        return patched

    def denoise(self, input: Tensor, timestep: Tensor, c: dict[str, Any], cond_or_uncond: list[int]) -> Tensor:
        """In place of `BaseModel.apply_model`; `timestep` is sigma, and kind 0 of prompt is the positive one."""
        if float(timestep[0]) != self.sigma:
            self.sigma, self.step = float(timestep[0]), self.step + 1
        count = len(cond_or_uncond)
        x = self.sampling.calculate_input(timestep, input).chunk(count)
        t = self.sampling.timestep(timestep).float().chunk(count)
        contexts = c["c_crossattn"].chunk(count)
        ys = c["y"].chunk(count) if "y" in c else [None] * count
        uuids = c["transformer_options"]["uuids"]
        predictions = [
            self.predict(*row) for row in zip(x, t, contexts, ys, cond_or_uncond, uuids, strict=True)
        ]  # fmt: skip
        return self.sampling.calculate_denoised(timestep, torch.cat(predictions), input)

    def predict(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None, kind: int, uuid: Any) -> Tensor:
        pooled = None if y is None else y[:, :POOLED_WIDTH]
        own = _conditioning(len(x), context, pooled)
        generic = _conditioning(len(x), self.generic, None if y is None else self.generic_pooled)
        if self.step % self.refresh == 0 or (uuid, kind) not in self.kept:
            with lora_off(layers_of_any_lora(self.unet)):
                self.kept[uuid, kind] = self.base(x, timestep, **(own if kind else generic).kwargs()).sample
        with lora_off(layers_of_any_lora(self.unet)) if kind and not self.lora_on_negatives else nullcontext():
            return self.personal(x, timestep, **own.kwargs(), exit_activation=self.kept[uuid, kind]).sample


def _conditioning(batch: int, context: Tensor, pooled: Tensor | None) -> Conditioning:
    if pooled is None:
        return Conditioning(context.expand(batch, -1, -1))
    sizes = torch.tensor([[8.0 * SIZE, 8.0 * SIZE, 0.0, 0.0, 8.0 * SIZE, 8.0 * SIZE]])
    return Conditioning(context.expand(batch, -1, -1), pooled.expand(batch, -1), sizes.expand(batch, -1))
