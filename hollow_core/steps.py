"""What one training step minimises, and how it finds the gradient of the LoRA: backwards, or from forwards alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from .activations import Record
from .hollow import Conditioning

Loss = Callable[[int], Tensor]  # of the record with this index: a scalar


class Step(Protocol):
    """A way to find the gradient of Σ weight · loss(record): adds it to `.grad` of the parameters."""

    def __call__(self, loss: Loss, weighted: Sequence[tuple[int, float]], scale: float = 1.0) -> float:
        """`weighted` holds (record, weight); the gradient is `scale` times as large. Returns the sum."""
        ...


def backpropagate(loss: Loss, weighted: Sequence[tuple[int, float]], scale: float = 1.0) -> float:
    """A `Step` that goes backward after each record: the peak of memory is one record's at any batch size."""
    total = 0.0
    for record, weight in weighted:
        term = weight * loss(record)
        (scale * term).backward()
        total += term.item()
    return total


@dataclass(frozen=True)
class ZerothOrder:
    """A `Step` of forward passes alone: MeZO's estimator (Malladi et al. 2023, arXiv 2305.17333, Algorithm 1).

    For each query z ~ N(0, 1), drawn from its seed wherever it is needed and never kept, two losses L(θ ± ε z)
    give the projected gradient g = (L⁺ − L⁻) / 2ε, and the queries' mean of g z, whose expectation is the
    gradient for ε → 0, is added to `.grad`, for any optimizer. No graph is built: beyond an inference's, the
    peak has a copy of the LoRA, its gradient, and one matrix of z.

    The LoRA is small, so θ + ε z and θ − ε z are both made from a copy of θ, and so is what is left behind:
    θ bit by bit. (MeZO adds and subtracts in place and keeps no copy, and θ drifts by the rounding of each sum.)
    """

    parameters: Sequence[Tensor]
    """θ: all that is to have a gradient."""
    seed: int
    """Of z; another one each step."""
    epsilon: float = 1e-3
    """ε: how far along z the loss is looked at. MeZO's and ZOODiP's; 1e-4 and 1e-2 are worse (ZOODiP, CVPR 2025)."""
    queries: int = 2
    """Directions z that are averaged, two forward passes each; two are ZOODiP's."""

    @torch.no_grad()
    def __call__(self, loss: Loss, weighted: Sequence[tuple[int, float]], scale: float = 1.0) -> float:
        """As `Step` says, with the mean of all L⁺ and L⁻ for the sum; θ is untouched also if `loss` raises."""
        before = [parameter.clone() for parameter in self.parameters]

        def loss_at(query: int, distance: float) -> float:
            for parameter, start, z in zip(self.parameters, before, self._directions(query), strict=True):
                parameter.copy_(start).add_(z, alpha=distance)
            return sum(weight * loss(record).item() for record, weight in weighted)

        try:
            losses = [(loss_at(query, self.epsilon), loss_at(query, -self.epsilon)) for query in range(self.queries)]
        finally:
            for parameter, start in zip(self.parameters, before, strict=True):
                parameter.copy_(start)
        for query, (above, below) in enumerate(losses):
            projected = (above - below) / (2 * self.epsilon)
            for parameter, z in zip(self.parameters, self._directions(query), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(z, alpha=scale * projected / self.queries)
        return sum(above + below for above, below in losses) / (2 * self.queries)

    def _directions(self, query: int) -> Iterator[Tensor]:
        """z of a query, one tensor for each parameter, drawn where the parameters are."""
        device = self.parameters[0].device
        # a dry run, on "meta", draws nothing
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(self.seed + query)
        for parameter in self.parameters:
            yield torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)


def record_loss(
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
    record: Record,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    snr_gamma: float | None = None,
) -> Tensor:
    """‖ε − ε_θ(z_t, t, E_T(P))‖² of one record (Hollowed Net, Eq. 1; of a prior record Eq. 2), a scalar.

    The mean over the latents (1, 4, height, width), in float32; under v-prediction of v in place of ε.
    `snr_gamma` turns on `min_snr_weight`. The U-Net is hollowed if the record has an exit activation.
    """
    noisy, noise = record.noisy(schedule, latents)
    prediction = predict(unet, record, noisy, conditioning)
    target = training_target(schedule, record.timestep, latents.float(), noise)
    loss = F.mse_loss(prediction, target.to(prediction.device))
    return loss if snr_gamma is None else min_snr_weight(schedule, record.timestep, snr_gamma) * loss


def predict(unet: UNet2DConditionModel, record: Record, noisy: Tensor, conditioning: Conditioning) -> Tensor:
    """What the U-Net makes of `noisy` latents (1, 4, height, width) at a record's time step and exit; in float32."""
    weight = unet.conv_in.weight
    exit_activation = {} if record.exit_activation is None else {"exit_activation": record.exit_activation}
    prediction: Tensor = unet(
        noisy.to(weight.device, weight.dtype),
        record.timestep,
        **conditioning.to(weight.device, weight.dtype).kwargs(),
        **exit_activation,
    ).sample
    return prediction.float()


def training_target(schedule: DDPMScheduler, timestep: int, latents: Tensor, noise: Tensor) -> Tensor:
    """What the U-Net is to predict for clean `latents` and their `noise`, both (1, 4, height, width)."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, torch.tensor([timestep]))
    return noise if schedule.config.prediction_type == "epsilon" else latents


def min_snr_weight(schedule: DDPMScheduler, timestep: int, gamma: float) -> float:
    """The min-SNR-γ weight of a time step (Hang et al. 2023, arXiv 2303.09556, Sec. 3.4).

    min(SNR, γ) for a U-Net that predicts the sample, over SNR for epsilon, over SNR + 1 for v.
    """
    alpha_cumprod = schedule.alphas_cumprod[timestep].item()
    snr = alpha_cumprod / (1 - alpha_cumprod)
    over = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[schedule.config.prediction_type]
    return min(snr, gamma) / over
