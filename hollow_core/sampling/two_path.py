"""Sampling on two paths with a diffusers pipeline (Hollowed Net, section 4.3).

At every denoising step the base path runs first, without the LoRA and on the generic prompt, up to the exit.
The personal path, hollowed and with the LoRA, takes its activation from there and predicts the noise.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..errors import HollowError
from ..lora.layers import layers_of_any_lora, lora_off, lora_strength
from ..nets.conditioning import Conditioning
from ..nets.unet import head, hollow

Pipeline = TypeVar("Pipeline")


@contextmanager
def two_path(
    pipeline: Pipeline, *, cut: int | None, generic: Conditioning, strength: float = 1.0, refresh: int = 1
) -> Iterator[Pipeline]:
    """While inside, `pipeline` (of the SD or SDXL family, with any scheduler) predicts on two paths.

    Its U-Net carries the LoRA, put there by `load_lora_state` or by `pipeline.load_lora_weights`. `cut` is
    the one it was trained for, None for an ordinary LoRA, which takes the ordinary path. `generic` is the prompt
    without the identifier: one for all pictures, or one for each prompt of a batch; the negative prompt stands
    for itself. `strength` multiplies how strong the LoRA is set, or each of several; 1 leaves it. `refresh` runs the
    base path at every n-th time step only and uses its activation again between (as DeepCache does).
    Afterwards the U-Net and its LoRA are as before. Raises HollowError for a cut out of range, a refresh below
    1, a strength that is no finite number, and a generic prompt that does not fit the pipeline's prompts.
    """
    check_paths(strength, refresh)
    host: Any = pipeline
    unet = host.unet
    with lora_strength(unet, strength):
        if cut is not None:
            host.unet = _view(unet, _TwoPaths(host, cut, generic, refresh))
        try:
            yield pipeline
        finally:
            host.unet = unet


def check_paths(strength: float, refresh: int) -> None:
    """Raises HollowError for a strength that is no finite number, and for a refresh below 1."""
    if not math.isfinite(strength):
        raise HollowError(f"The strength of a LoRA cannot be {strength}. Take 1 for as trained, 0 for none.")
    if refresh < 1:
        raise HollowError(f"The base path cannot run every {refresh} steps. Choose a refresh of at least 1.")


class TwoPathUNet(UNet2DConditionModel):
    """The view of a U-Net that `two_path` puts in its place."""

    paths: "_TwoPaths"

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """`UNet2DConditionModel.forward`, on two paths."""
        return self.paths.predict(sample, timestep, encoder_hidden_states, **kwargs)


class _TwoPaths:
    """Both paths, and what is kept between the steps of one run."""

    def __init__(self, pipeline: Any, cut: int, generic: Conditioning, refresh: int) -> None:
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.base, self.personal = head(self.unet, cut), hollow(self.unet, cut, timesteps=None)
        self.lora_layers = layers_of_any_lora(self.unet)  # to look for them takes as long as to launch a small U-Net
        self.generic, self.refresh = generic, refresh
        self.run: Any = None
        """The time steps of the present run: every run of a pipeline sets new ones."""
        self.numbers: list[float] = []
        """The same, read from the device once."""
        self.step, self.timestep = 0, float("nan")
        self.exit_activation: Tensor | None = None

    def predict(self, sample: Tensor, timestep: Tensor | float, prompts: Tensor, **kwargs: Any) -> Any:
        self._count(timestep)
        due = self.step % self.refresh == 0
        if due or self.exit_activation is None or len(self.exit_activation) != len(sample):
            self.exit_activation = self._run_base(sample, timestep, prompts, **kwargs)
        # a copy, as FreeU for one writes into it
        return self.personal(sample, timestep, prompts, exit_activation=self.exit_activation.clone(), **kwargs)

    def _count(self, timestep: Tensor | float) -> None:
        """Count time steps, not calls: schedulers of second order call twice at one, and each call of a step
        that is due deserves an activation of its own."""
        timesteps = self.pipeline.scheduler.timesteps
        begins = timesteps is not self.run
        if begins:
            self.run, self.numbers, self.step, self.exit_activation = timesteps, timesteps.tolist(), 0, None
        now = self._number(timestep)
        if not begins and now != self.timestep:
            self.step += 1
        self.timestep = now

    def _number(self, timestep: Tensor | float) -> float:
        """Of one of the run's time steps, found by its place, as to read it is to wait for the device."""
        if isinstance(timestep, Tensor) and timestep.dtype == self.run.dtype and self.run.is_contiguous():
            mine, theirs = timestep.untyped_storage(), self.run.untyped_storage()
            place = timestep.storage_offset() - self.run.storage_offset()
            if mine.data_ptr() == theirs.data_ptr() and 0 <= place < len(self.numbers):
                return self.numbers[place]
        return float(torch.as_tensor(timestep).flatten()[0])

    def _run_base(self, sample: Tensor, timestep: Tensor | float, prompts: Tensor, **kwargs: Any) -> Tensor:
        kwargs["return_dict"] = True
        self.generic = self.generic.to(prompts.device, prompts.dtype)
        prompts = self._with_generic(prompts, self.generic.encoder_hidden_states)
        added = kwargs.get("added_cond_kwargs")
        if added and "text_embeds" in added:
            if self.generic.text_embeds is None:
                raise HollowError("The generic prompt lacks SDXL's pooled embedding. Encode it with this model.")
            pooled = self._with_generic(added["text_embeds"], self.generic.text_embeds)
            kwargs["added_cond_kwargs"] = {**added, "text_embeds": pooled}
        with lora_off(self.lora_layers):
            return self.base(sample, timestep, prompts, **kwargs).sample

    def _with_generic(self, prompts: Tensor, generic: Tensor) -> Tensor:
        """`prompts` (batch, …) with the generic prompt in place of the positive rows.

        Under classifier-free guidance the first half of the batch is negative.
        """
        negative = len(prompts) // 2 if self.pipeline.do_classifier_free_guidance else 0
        positive = len(prompts) - negative
        if positive % len(generic) or generic.shape[1:] != prompts.shape[1:]:
            raise HollowError(
                f"The generic prompt has shape {tuple(generic.shape)}, which does not fit {positive} prompts of "
                f"{tuple(prompts.shape[1:])}. Encode one with this model, or as many as there are prompts."
            )
        rows = generic.repeat_interleave(positive // len(generic), dim=0)
        return torch.cat([prompts[:negative], rows])


def _view(unet: UNet2DConditionModel, paths: _TwoPaths) -> TwoPathUNet:
    view = copy.copy(unet)
    view.__class__ = TwoPathUNet
    view.paths = paths
    # What model offloading has put around the U-Net belongs around its view.
    for name in ("forward", "_old_forward", "_hf_hook"):
        view.__dict__.pop(name, None)
    if hasattr(unet, "_hf_hook"):
        add_hook_to_module(view, unet._hf_hook)
    return view
