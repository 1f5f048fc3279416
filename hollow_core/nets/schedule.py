"""The noise schedule: how noisy latents are made, and what a network is to predict of them.

At time step t, z_t = α_t z + σ_t ε for clean latents z and noise ε. A schedule keeps one number a time step; what it
says of α_t and σ_t, what is predicted, and how its error counts, a kind of prediction knows. Another kind is another
class here, in `PREDICTIONS`, or, of flow matching, `FLOW`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import HollowError
from ..files import digest


class PredictionKind(ABC):
    """What a network predicts. The numbers are ᾱ_t, as diffusers' `alphas_cumprod`: α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t)."""

    name: ClassVar[str]
    """As diffusers' `prediction_type` has it."""
    learns_from_noise: ClassVar[bool] = True
    """Whether there is something to learn where the latents are nothing but noise."""

    def scales(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of a time step's number."""
        return number**0.5, (1 - number) ** 0.5

    def snr(self, number: float) -> float:
        """α_t² / σ_t²."""
        return number / (1 - number)

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What is to be predicted of z_t."""

    @abstractmethod
    def clean(self, noisy: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """z, as a prediction for z_t has it."""

    @abstractmethod
    def error(self, snr: float) -> float:
        """How large the squared error of a prediction is where that of z is 1."""


class Epsilon(PredictionKind):
    """The noise ε."""

    name = "epsilon"
    learns_from_noise = False

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def clean(self, noisy: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (noisy - sigma * predicted) / alpha

    def error(self, snr: float) -> float:
        return snr


class Velocity(PredictionKind):
    """v = α_t ε − σ_t z (Salimans and Ho 2022, arXiv 2202.00512)."""

    name = "v_prediction"

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * latents

    def clean(self, noisy: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noisy - sigma * predicted

    def error(self, snr: float) -> float:
        return snr + 1


class Sample(PredictionKind):
    """The clean latents z."""

    name = "sample"

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return latents

    def clean(self, noisy: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return predicted

    def error(self, snr: float) -> float:
        return 1.0


class Flow(PredictionKind):
    """ε − z on the straight way from z to ε (Lipman et al. 2022, arXiv 2210.02747). The numbers are σ_t, and
    α_t = 1 − σ_t."""

    name = "flow"

    def scales(self, number: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - number, number

    def snr(self, number: float) -> float:
        return ((1 - number) / number) ** 2 if number else math.inf

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - latents

    def clean(self, noisy: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noisy - sigma * predicted

    def error(self, snr: float) -> float:
        return (1 + snr**0.5) ** 2


PREDICTIONS: dict[str, PredictionKind] = {kind.name: kind for kind in (Epsilon(), Velocity(), Sample())}
"""Of diffusion, by diffusers' names."""

FLOW = Flow()

FLOW_TIMESTEPS = 1000
"""σ = t / 1000, as diffusers' schedulers of flow matching have it."""

Density = Literal["uniform", "logit-normal"]
"""How often each time step is drawn: all alike, or those of middling noise more (Esser et al. 2024, arXiv 2403.03206,
Sec. 3.1)."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Every time step's number, and what is predicted. Latents and noise are (batch, channels, height, width)."""

    prediction: PredictionKind
    numbers: Tensor
    """(time steps,), in float32 on the CPU."""
    density: Density = "uniform"
    """Of the time steps that are drawn, before they are shifted."""
    shift: float = 1.0
    """s of s σ / (1 + (s − 1) σ), to which a drawn σ is shifted: above 1, more noise."""

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """That of a diffusers scheduler with ᾱ_t. Raises HollowError for a prediction type that is unknown."""
        name = scheduler.config.prediction_type
        if name not in PREDICTIONS:
            *others, last = PREDICTIONS
            raise HollowError(f"The prediction type {name!r} is unknown. Use {', '.join(others)} or {last}.")
        return cls(PREDICTIONS[name], scheduler.alphas_cumprod)

    @classmethod
    def flow(cls, *, density: Density = "logit-normal", shift: float = 1.0) -> "NoiseSchedule":
        """That of flow matching: the time steps 1 to 1000 have σ = t / 1000; 0, which has no noise, is never drawn."""
        return cls(FLOW, torch.arange(FLOW_TIMESTEPS + 1) / FLOW_TIMESTEPS, density, shift)

    def __len__(self) -> int:
        """How many time steps there are."""
        return len(self.numbers)

    @property
    def id(self) -> str:
        """A name for what training needs of it: the kind of prediction, every number, and how they are drawn."""
        drawn = "" if (self.density, self.shift) == ("uniform", 1.0) else f" {self.density} {self.shift:g}"
        return f"{self.prediction.name} {digest(self.numbers)}{drawn}"

    def noise(self, timestep: int) -> float:
        """How far a time step is from 0, clean, to 1, noise: t / T, of flow matching σ."""
        return timestep / (len(self) - 1)

    def drawn(self, places: Tensor, of: int) -> Tensor:
        """The time steps at `places` from 0 to `of`, of all that are drawn: evenly spread places give them as the
        density has them."""
        if self.prediction is not FLOW:
            return (places * len(self) / of).long().clamp(max=len(self) - 1)
        share = places / of
        sigma = share if self.density == "uniform" else torch.special.ndtri(share).sigmoid()
        shifted = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return (shifted * FLOW_TIMESTEPS).round().long().clamp(1, FLOW_TIMESTEPS)

    def noisy(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """z_t = α_t z + σ_t ε."""
        alpha, sigma = self._scales(timestep)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """What the network is to predict for clean `latents` and their `noise`."""
        return self.prediction.target(latents, noise, *self._scales(timestep))

    def clean(self, noisy: Tensor, predicted: Tensor, timestep: int) -> Tensor:
        """The clean latents, as a prediction for `noisy` ones has them."""
        return self.prediction.clean(noisy, predicted, *self._scales(timestep))

    def loss_weight(self, timestep: int, snr_gamma: float | None) -> float:
        """The min-SNR-γ weight of a time step (Hang et al. 2023, arXiv 2303.09556, Sec. 3.4); 1 for γ None.

        min(SNR, γ) for a network that predicts the sample, over SNR for epsilon, over SNR + 1 for v.
        """
        if snr_gamma is None:
            return 1.0
        snr = self.prediction.snr(self.numbers[timestep].item())
        return min(snr, snr_gamma) / self.prediction.error(snr)

    def check(self) -> None:
        """Raises HollowError where it cannot be trained on."""
        if not self.prediction.learns_from_noise and self.prediction.snr(self.numbers[-1].item()) < 1e-6:
            raise HollowError(
                f"A schedule with zero terminal SNR cannot train on {self.prediction.name}: at its last step the "
                "latents are nothing but the noise that is asked for. Set the prediction type to v_prediction."
            )

    def _scales(self, timestep: int) -> tuple[Tensor, Tensor]:
        return self.prediction.scales(self.numbers[timestep])
