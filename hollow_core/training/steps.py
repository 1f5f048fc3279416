"""What one training step minimises, and how it finds the gradient of the LoRA: backwards, or from forwards alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nets.conditioning import Conditioning
from ..nets.network import Network
from ..nets.schedule import NoiseSchedule
from .store import Record, Store

Part = Sequence[tuple[int, float]]  # records that pass the U-Net together, each with its weight
Loss = Callable[[Part], Tensor]  # Σ weight · loss(record) over a part: a scalar


class Step(Protocol):
    """A way to find the gradient of the loss over all parts: adds it to `.grad` of the parameters."""

    def __call__(self, loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> float:
        """The gradient is `scale` times as large. Returns the sum of the parts' losses."""
        ...


def backpropagate(loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> float:
    """A `Step` that goes backward after each part: the peak of memory is one part's, however many there are."""
    total = 0.0
    for part in parts:
        term = loss(part)
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
    def __call__(self, loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> float:
        """As `Step` says, with the mean of all L⁺ and L⁻ for the sum; θ is untouched also if `loss` raises."""
        before = [parameter.clone() for parameter in self.parameters]

        def loss_at(query: int, distance: float) -> float:
            for parameter, start, z in zip(self.parameters, before, self._directions(query), strict=True):
                parameter.copy_(start).add_(z, alpha=distance)
            return sum(loss(part).item() for part in parts)

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


def part_loss(
    network: Network, schedule: NoiseSchedule, store: Store, part: Part, *, snr_gamma: float | None = None
) -> Tensor:
    """Σ weight · loss over a part of a store's records, a scalar: a `Loss`, once all but the part is given."""
    records = [store.record(index) for index, _ in part]
    inputs = [store.inputs(record.image) for record in records]
    losses = record_losses(network, schedule, records, inputs, snr_gamma=snr_gamma)
    return torch.stack([weight * loss for (_, weight), loss in zip(part, losses, strict=True)]).sum()


def record_losses(
    network: Network,
    schedule: NoiseSchedule,
    records: Sequence[Record],
    inputs: Sequence[tuple[Tensor, Conditioning]],
    *,
    snr_gamma: float | None = None,
) -> list[Tensor]:
    """‖ε − ε_θ(z_t, t, E_T(P))‖² of each record (Hollowed Net, Eq. 1; of a prior record Eq. 2), all of them in one
    pass of the network.

    `inputs` are each record's latents (1, channels, height, width), all of one size, and prompt, all of as many
    tokens. A loss is the mean over the latents, in float32, times `schedule.loss_weight`; what takes ε's place, the
    schedule's prediction says.
    """
    noised = [record.noisy(schedule, latents) for record, (latents, _) in zip(records, inputs, strict=True)]
    predictions = network.predict(
        torch.cat([noisy for noisy, _ in noised]),
        [record.timestep for record in records],
        Conditioning.batch([conditioning for _, conditioning in inputs]),
        {name: torch.cat([record.stored[name] for record in records]) for name in records[0].stored},
    )
    losses = []
    for record, (latents, _), (_, noise), prediction in zip(records, inputs, noised, predictions.split(1), strict=True):
        target = schedule.target(latents.float(), noise, record.timestep)
        loss = F.mse_loss(prediction, target.to(prediction.device))
        losses.append(schedule.loss_weight(record.timestep, snr_gamma) * loss)
    return losses
