"""How to train: every setting, and which values it may have."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from ..errors import HollowError
from ..files import digest
from ..lora.layers import ATTENTION
from .optimizer import OptimizerName
from .selective import Probability, Strategy, falling, heat_map

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are the paper's (Hollowed Net, Sec. 5.1) but for the rank.

    Raises HollowError for a value that cannot be.
    """

    rank: int = 16
    """Rank of each LoRA; the paper compares 1, 4, 16 and 128."""
    alpha: float | None = None
    """The LoRA counts alpha / rank times; None means alpha = rank."""
    targets: tuple[str, ...] = ATTENTION
    """Ends of the names of the layers that get a LoRA; the attention projections by default."""
    dora: bool = False
    """Train a magnitude for each output of a layer, too (DoRA): for the LoRA in fp32."""
    steps: int = 1000
    """Optimizer steps in all."""
    learning_rate: float = 1e-4
    """AdamW's, constant."""
    weight_decay: float = 1e-2
    """AdamW's."""
    optimizer: OptimizerName = "adamw"
    """AdamW with its states in fp32, or in 8 bits by bitsandbytes: a quarter of their memory, for matrices of at
    least 4096 numbers."""
    batch: int = 1
    """Image records a step; as many of the prior come on top. Costs time, and memory only for what is `together`."""
    together: int = 1
    """How many of a step's records pass the U-Net at once, as a batch: faster where the GPU is not busy with one, for
    the memory of so many. The stages before go by it, too."""
    prior_weight: float = 1.0
    """How much the prior-preservation loss (Eq. 2) counts if the store has prior records; 0 leaves it out."""
    snr_gamma: float | None = None
    """γ of min-SNR weighting, 5 in its paper; None weighs all time steps alike."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm if it is longer; infinity never clips."""
    precision: Precision = "fp32"
    """Of the base's weights and of the arithmetic; the U-Net must be loaded in it."""
    lora_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the LoRA, its gradients and AdamW's states; bf16 halves them, and rounds small updates away."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_levels: int | None = None
    """How many levels of the U do so, from the outermost, where pictures are largest; None means all of them."""
    fused_backward: bool = False
    """Update each matrix in the backward pass as its gradient comes, so that they never all exist at once.
    For one record a step, without clipping, in fp32 or bf16."""
    seed: int = 0
    """Of the LoRA's start and the order of the records."""
    save_every: int = 0
    """Steps from one checkpoint to the next; 0 writes one only at the end or when stopped."""
    strategy: Strategy = "bp"
    """How steps find the gradient: backwards, by MeZO's forward passes ("zo"), or by both ("selective")."""
    selective_gamma: float = 1.0
    """γ of `selective.falling`: how soon ZO-high takes over from BP-low; 0 leaves all to BP-low."""
    probability: Probability | None = None
    """p(t, s) of a BP-low step in place of `selective.falling`."""
    zo_learning_rate: float | None = None
    """AdamW's at zeroth-order steps, which keep moments of their own; None means learning_rate."""
    zo_epsilon: float = 1e-3
    """ε of `ZerothOrder`, as MeZO and ZOODiP have it."""
    zo_queries: int = 2
    """Directions that a zeroth-order step averages, as ZOODiP does; two forward passes each."""
    zo_timesteps: tuple[int, int] | None = None
    """Zeroth-order steps draw from these time steps only, the end excluded: ZOODiP's are (500, 900). None: all."""

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or the rank where it is None."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def fixed(self) -> dict[str, Any]:
        """Those that may not change when a run goes on; the others do not change what a step does, but for rounding
        where `together` is another."""
        free = {"save_every", "together", "gradient_checkpointing", "checkpoint_levels", "fused_backward"}
        if self.strategy != "selective":  # whose steps know how far the training is
            free |= {"steps", "selective_gamma", "probability"}
        if not self.dora:  # so that what was begun before there was any goes on
            free |= {"dora"}
        if self.strategy == "bp":
            free |= {"zo_learning_rate", "zo_epsilon", "zo_queries", "zo_timesteps"}
        fixed = {name: value for name, value in asdict(self).items() if name not in free}
        if "probability" in fixed and self.probability is not None:
            fixed["probability"] = digest(torch.tensor(heat_map(self.probability)))
        return fixed

    @property
    def bp_low_probability(self) -> Probability:
        """p(t, s) of a BP-low step, where the strategy is selective."""
        return falling(self.selective_gamma) if self.probability is None else self.probability

    def __post_init__(self) -> None:
        positive = "It must be above 0."
        for name, possible, advice in [
            ("rank", self.rank >= 1, "It must be at least 1."),
            ("alpha", self.alpha is None or 0 < self.alpha < math.inf, positive),
            ("targets", len(self.targets) > 0, f"Name at least one, such as {ATTENTION[0]}."),
            ("steps", self.steps >= 1, "It must be at least 1."),
            ("learning_rate", 0 < self.learning_rate < math.inf, positive),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "It must be 0 or more."),
            ("optimizer", self.optimizer in get_args(OptimizerName), "Choose adamw or adamw8bit."),
            ("batch", self.batch >= 1, "It must be at least 1."),
            ("together", self.together >= 1, "It must be at least 1."),
            ("prior_weight", 0 <= self.prior_weight < math.inf, "It must be 0 or more."),
            ("snr_gamma", self.snr_gamma is None or 0 < self.snr_gamma < math.inf, positive),
            ("max_grad_norm", self.max_grad_norm > 0, positive),
            ("precision", self.precision in get_args(Precision), "Choose fp32, bf16 or fp16."),
            ("lora_precision", self.lora_precision in ("fp32", "bf16"), "Choose fp32 or bf16."),
            (
                "checkpoint_levels",
                self.checkpoint_levels is None or self.checkpoint_levels >= 1,
                "It must be at least 1; without any, turn gradient checkpointing off.",
            ),
            ("seed", 0 <= self.seed < 2**63, "It must be from 0 to 2⁶³ - 1."),
            ("save_every", self.save_every >= 0, "It must be 0 or more."),
            ("strategy", self.strategy in get_args(Strategy), "Choose bp, zo or selective."),
            ("selective_gamma", 0 <= self.selective_gamma < math.inf, "It must be 0 or more."),
            ("zo_learning_rate", self.zo_learning_rate is None or 0 < self.zo_learning_rate < math.inf, positive),
            ("zo_epsilon", 0 < self.zo_epsilon < math.inf, positive),
            ("zo_queries", self.zo_queries >= 1, "It must be at least 1."),
            (
                "zo_timesteps",
                self.zo_timesteps is None or 0 <= self.zo_timesteps[0] < self.zo_timesteps[1],
                "Give the first time step and the end behind the last, such as (500, 900).",
            ),
        ]:
            if not possible:
                raise HollowError(f"{name} is {getattr(self, name)!r}. {advice}")
        if self.dora and self.lora_precision != "fp32":
            raise HollowError(
                f"dora does not go with lora_precision {self.lora_precision}, which rounds what magnitudes learn away. "
                "Choose fp32."
            )
        for name, possible, advice in [
            (
                "max_grad_norm",
                self.max_grad_norm == math.inf,
                "Set it to infinity: the norm is known too late to clip.",
            ),
            ("batch", self.batch == 1, "Set it to 1: gradients of several records would have to be kept."),
            ("precision", self.precision != "fp16", "Choose bf16 or fp32: an overflow in fp16 is known too late."),
        ]:
            if self.fused_backward and not possible:
                raise HollowError(f"fused_backward does not go with {name} {getattr(self, name)}. {advice}")


def check_unfused(settings: TrainSettings) -> None:
    """Raises HollowError for a fused step, where class pictures are to be trained on."""
    if settings.fused_backward:
        raise HollowError(
            "fused_backward trains on one record a step, but there are pictures of the class too. "
            "Set prior_weight to 0, or turn fused_backward off."
        )
