"""What hollowing is compared with: all weights trained, and a U-Net whose middle is gone for good (BK-SDM)."""

import math
import random
from functools import partial
from itertools import islice
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hollow_core.demo import language, pretrain
from hollow_core.errors import HollowError
from hollow_core.models.base_model import BaseModel, encode_prompt
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.schedule import NoiseSchedule
from hollow_core.nets.unet import UNet, hollow
from hollow_core.nets.unet_layers import exit_shape
from hollow_core.training.settings import TrainSettings
from hollow_core.training.steps import backpropagate, part_loss, read_parts
from hollow_core.training.store import Store
from hollow_core.training.train import steps_ahead

FULL_LEARNING_RATE = 0.1
"""Of full fine-tuning over the LoRA's: the paper has 1e-5 and 1e-4."""


class Diverged(HollowError):
    """A training ended with numbers that are none."""


def finetune(unet: UNet2DConditionModel, schedule: NoiseSchedule, store: Store, settings: TrainSettings) -> list[float]:
    """Full fine-tuning on the records on which a LoRA would train, with its settings but for the learning rate; the
    loss of each step. Raises Diverged where one is not finite."""
    unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=FULL_LEARNING_RATE * settings.rate, weight_decay=settings.weight_decay
    )
    losses = []
    for choice in islice(steps_ahead(store, schedule, settings), settings.steps):
        parts = read_parts(store, schedule, choice.weighted, together=len(choice.weighted))
        losses.append(backpropagate(partial(part_loss, UNet(unet)), parts).item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"Full fine-tuning ended with a non-finite loss at step {len(losses)}.")
        nn.utils.clip_grad_norm_(unet.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    unet.requires_grad_(False)
    return losses


def pruned(unet: UNet2DConditionModel, cut: int) -> UNet2DConditionModel:
    """A view of `unet` without what `cut` removes, and without anything in its place: the last layer on the way down
    hands over to the first that is left on the way up. Where their channels differ, a 1×1 convolution of ones on the
    diagonal is between them."""
    view: Any = hollow(unet, cut, timesteps=None)
    view.__class__ = UNet2DConditionModel
    del view.cut
    side = unet.config.sample_size
    last = [module for block in view.down_blocks for module in (*block.resnets, *(block.downsamplers or []))][-1]
    view._modules["mid_block"] = _Bridge(last.out_channels, exit_shape(unet.config, cut, side, side)[0])
    return view


class _Bridge(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        same = channels == out_channels
        self.between = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, bias=False)
        if isinstance(self.between, nn.Conv2d):
            nn.init.dirac_(self.between.weight)

    def forward(self, sample: Tensor, emb: Tensor) -> Tensor:
        found: Tensor = self.between(sample)
        return found


def distill(small: UNet2DConditionModel, base: BaseModel, steps: int, seed: int = 0, batch: int = 24) -> None:
    """Re-train a pruned U-Net on freshly drawn pictures to predict what the whole one does, as BK-SDM is after pruning
    (but for so many steps only)."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    small.requires_grad_(True)
    optimizer = torch.optim.AdamW(small.parameters(), lr=5e-4, weight_decay=0.01)
    for _ in range(steps):
        noisy, timesteps, states = _drawn(base, choose, generator, batch)
        with torch.no_grad():
            expected = base.unet(noisy, timesteps, states).sample
        loss = nn.functional.mse_loss(small(noisy, timesteps, states).sample, expected)
        loss.backward()
        nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    small.requires_grad_(False)


@torch.no_grad()
def strays(small: UNet2DConditionModel, base: BaseModel, seed: int = 1, batches: int = 8, batch: int = 24) -> float:
    """How far a pruned U-Net's predictions are from the whole one's, mean square, on fresh pictures."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        inputs = _drawn(base, choose, generator, batch)
        found.append(nn.functional.mse_loss(small(*inputs).sample, base.unet(*inputs).sample).item())
    return sum(found) / batches


@torch.no_grad()
def _drawn(
    base: BaseModel, choose: random.Random, generator: torch.Generator, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, time steps and embedded captions of fresh pictures."""
    pictures, subjects, scenes = pretrain.drawn(batch, choose)
    assert base.vae is not None
    clean: Tensor = base.vae.encode(pictures).latents * base.vae.config.scaling_factor
    texts = [language.caption(subject, scene, choose) for subject, scene in zip(subjects, scenes, strict=True)]
    timesteps = torch.randint(1000, (batch,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    prompts = Conditioning.batch([encode_prompt(base, text) for text in texts])
    return base.scheduler.add_noise(clean, noise, timesteps), timesteps, prompts.encoder_hidden_states
