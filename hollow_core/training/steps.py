"""What one training step minimises, and how it finds the gradient of the LoRA: backwards, or from forwards alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nets.conditioning import Conditioning
from ..nets.network import Network, Stored
from ..nets.schedule import NoiseSchedule
from ..nets.transfer import room_like, send
from .store import Record, Store

Inputs = tuple[Tensor, Conditioning]  # of a record: latents (1, channels, height, width) and prompt


class Part(NamedTuple):
    """Records that pass the network together, with all that their losses need, in main memory."""

    noisy: Tensor  # (batch, channels, height, width)
    timesteps: list[int]
    conditioning: Conditioning
    stored: Stored  # its tensors (batch, …)
    target: Tensor  # (batch, channels, height, width)
    weights: Tensor  # (batch,)
    mask: Tensor | None = None  # (batch, 1, height, width), of each record 1 on average; None: all 1

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        records: Sequence[Record],
        inputs: Sequence[Inputs],
        weights: Sequence[float],
        *,
        masks: Sequence[Tensor | None] = (),
        snr_gamma: float | None = None,
    ) -> "Part":
        """Records whose latents are of one size and whose prompts have as many tokens, each with its weight; of each,
        if any has one, its mask (1, 1, height, width)."""
        timesteps = [record.timestep for record in records]
        noised = [record.noisy(schedule, latents) for record, (latents, _) in zip(records, inputs, strict=True)]
        targets = [
            schedule.target(latents.float().cpu(), noise, timestep)
            for (latents, _), (_, noise), timestep in zip(inputs, noised, timesteps, strict=True)
        ]
        return cls(
            torch.cat([noisy for noisy, _ in noised]),
            timesteps,
            Conditioning.batch([conditioning for _, conditioning in inputs]),
            {name: torch.cat([record.stored[name] for record in records]) for name in records[0].stored},
            torch.cat(targets),
            torch.tensor([w * schedule.loss_weight(t, snr_gamma) for w, t in zip(weights, timesteps, strict=True)]),
            _masks(masks, inputs[0][0].shape[-2:]),
        )


def _masks(masks: Sequence[Tensor | None], size: torch.Size) -> Tensor | None:
    """Of records together, each 1 on average: so a small part of one picture counts as much as all of another."""
    if all(mask is None for mask in masks):
        return None
    whole = [torch.ones(1, 1, *size) if mask is None else mask for mask in masks]
    return torch.cat([mask / mask.mean().clamp(min=1e-6) for mask in whole])


Loss = Callable[[Part], Tensor]  # Σ weight · loss(record) over a part: a scalar


class Step(Protocol):
    """A way to find the gradient of the loss over all parts: adds it to `.grad` of the parameters."""

    def __call__(self, loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> Tensor:
        """The gradient is `scale` times as large. Returns the sum of the parts' losses, a scalar where they are."""
        ...


def backpropagate(loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> Tensor:
    """A `Step` that goes backward after each part: the peak of memory is one part's, however many there are."""
    terms = []
    for part in parts:
        term = loss(part)
        term.backward(torch.full_like(term, scale))
        terms.append(term.detach())
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class ZerothOrder:
    """A `Step` of forward passes alone: MeZO's estimator (Malladi et al. 2023, arXiv 2305.17333, Algorithm 1).

    For each query z ~ N(0, 1), drawn from its seed wherever it is needed and never kept, two losses L(θ ± ε z)
    give the projected gradient g = (L⁺ − L⁻) / 2ε, and the queries' mean of g z, whose expectation is the
    gradient for ε → 0, is added to `.grad`, for any optimizer. No graph is built: beyond an inference's, the
    peak has a copy of the LoRA and z, and at the end its gradient.

    The LoRA is small, so θ + ε z and θ − ε z are both made from a copy of θ, and so is what is left behind:
    θ bit by bit. (MeZO adds and subtracts in place and keeps no copy, and θ drifts by the rounding of each sum.)
    """

    parameters: Sequence[Tensor]
    """θ: all that is to have a gradient, on one device and in one precision."""
    seed: int
    """Of z; another one each step."""
    epsilon: float = 1e-3
    """ε: how far along z the loss is looked at. MeZO's and ZOODiP's; 1e-4 and 1e-2 are worse (ZOODiP, CVPR 2025)."""
    queries: int = 2
    """Directions z that are averaged, two forward passes each; two are ZOODiP's."""
    strengths: bool = False
    """z is each matrix times one number from N(0, 1): it is found how strong a matrix should be, of some hundred
    numbers in place of a million, for equal passes. A matrix of zeros stays one, so backpropagation has to begin."""

    @torch.no_grad()
    def __call__(self, loss: Loss, parts: Sequence[Part], scale: float = 1.0) -> Tensor:
        """As `Step` says, with the mean of all L⁺ and L⁻ for the sum; θ is untouched also if `loss` raises."""
        parameters = list(self.parameters)
        device = parameters[0].device
        (_, before), (flat, z) = room_like(parameters, device), room_like(parameters, device)
        torch._foreach_copy_(before, parameters)

        def loss_at(query: int, distance: float) -> Tensor:
            self._draw(flat, z, before, query)
            torch._foreach_copy_(parameters, before)
            torch._foreach_add_(parameters, z, alpha=distance)
            return torch.stack([loss(part) for part in parts]).sum()

        try:
            losses = [(loss_at(query, self.epsilon), loss_at(query, -self.epsilon)) for query in range(self.queries)]
        finally:
            torch._foreach_copy_(parameters, before)
        gradient, gradients = room_like(parameters, device)
        gradient.zero_()
        for query, (above, below) in enumerate(losses):
            projected = (above - below) * (scale / (2 * self.epsilon * self.queries))
            self._draw(flat, z, before, query)
            gradient.addcmul_(flat, projected.to(flat.dtype))
        for parameter, mine in zip(parameters, gradients, strict=True):
            parameter.grad = mine if parameter.grad is None else parameter.grad.add_(mine)
        return torch.stack([part for pair in losses for part in pair]).mean()

    def _draw(self, flat: Tensor, z: Sequence[Tensor], before: Sequence[Tensor], query: int) -> None:
        """z of a query, drawn where the parameters are, into its room."""
        # a dry run, on "meta", draws nothing
        generator = None if flat.is_meta else torch.Generator(flat.device).manual_seed(self.seed + query)
        if not self.strengths:
            flat.normal_(generator=generator)
            return
        numbers = flat.new_empty(len(z)).normal_(generator=generator)
        torch._foreach_copy_(list(z), list(before))
        torch._foreach_mul_(list(z), list(numbers.unbind()))


def part_loss(network: Network, part: Part) -> Tensor:
    """Σ weight · ‖ε − ε_θ(z_t, t, E_T(P))‖² over a part (Hollowed Net, Eq. 1; of prior records Eq. 2), a scalar where
    the network is: a `Loss`, once the network is given.

    A record's loss is the mean over its latents, in float32, weighed by its mask if it has one; what takes ε's place,
    the schedule's prediction says.
    """
    predicted = network.predict(part.noisy, part.timesteps, part.conditioning, part.stored)
    target, weights = (send(tensor, predicted.device) for tensor in (part.target, part.weights))
    error = F.mse_loss(predicted, target, reduction="none")
    if part.mask is not None:
        error = error * send(part.mask, predicted.device)
    return torch.dot(weights, error.flatten(1).mean(1))


def read_parts(
    store: Store,
    schedule: NoiseSchedule,
    weighted: Sequence[tuple[int, float]],
    *,
    together: int = 1,
    snr_gamma: float | None = None,
) -> list[Part]:
    """Records of a store with their weights, in order, in parts of up to so many neighbours whose pictures are of one
    size, and whose prompts are alike. Raises HollowError as `Store.record` does."""
    read = []
    for index, weight in weighted:
        record = store.record(index)
        read.append((record, store.inputs(record.image), weight, store.mask(record.image)))
    parts = []
    for _, alike in groupby(read, lambda each: (each[1][0].shape, each[1][1].alike)):
        same = list(alike)
        for first in range(0, len(same), together):
            records, inputs, weights, masks = zip(*same[first : first + together], strict=True)
            parts.append(Part.of(schedule, records, inputs, weights, masks=masks, snr_gamma=snr_gamma))
    return parts


@torch.no_grad()
def held_out_loss(loss: Loss, store: Store, schedule: NoiseSchedule, records: Sequence[int]) -> float:
    """The mean loss of records that are not trained on, one by one. Raises HollowError as `read_parts` does."""
    parts = (read_parts(store, schedule, [(index, 1 / len(records))]) for index in records)
    return torch.stack([loss(part) for (part,) in parts]).sum().item()
