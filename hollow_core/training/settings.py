"""How to train: every setting, and which values it may have."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from ..errors import HollowError
from ..files import digest
from ..lora.layers import ATTENTION
from ..seeds import SEEDS
from .optimizer import ALL_AT_ONCE, USUAL_RATES, OptimizerName
from .rates import LRSchedule
from .selective import Probability, Strategy, falling, heat_map

Precision = Literal["fp32", "bf16", "fp16"]
LATER = ("dora", "lr_schedule", "warmup", "ema", "zo_strengths")
"""Settings that older checkpoints do not name; so nor does `TrainSettings.fixed` where they are as usual."""
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
    learning_rate: float | None = None
    """The optimizer's, at its highest; None means its usual one, of `USUAL_RATES`: see `rate`."""
    lr_schedule: LRSchedule = "constant"
    """How it goes along the training, by diffusers' schedule of this name: see `rate_factor`."""
    warmup: int = 0
    """Steps over which it rises from 0 first."""
    weight_decay: float = 1e-2
    """The optimizer's: times the learning rate, how much of the LoRA a step takes away."""
    optimizer: OptimizerName = "adamw"
    """AdamW with its states in fp32, or in 8 bits by bitsandbytes: a quarter of their memory, for matrices of at
    least 4096 numbers; or one of the package pytorch-optimizer, as `Optimizer` has them."""
    ema: float | None = None
    """Decay of an average over the steps, such as 0.99, which is given out in the LoRA's place. It takes a copy of the
    LoRA in fp32. None gives out the LoRA of the last step."""
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
    validate_every: int = 50
    """Steps from one look at the held-out pictures to the next, if there are any; 0 looks before the
    first and after the last only."""
    strategy: Strategy = "bp"
    """How steps find the gradient: backwards, by MeZO's forward passes ("zo"), or by both ("selective")."""
    selective_gamma: float = 1.0
    """γ of `selective.falling`: how soon ZO-high takes over from BP-low; 0 leaves all to BP-low."""
    probability: Probability | None = None
    """p(t, s) of a BP-low step in place of `selective.falling`."""
    zo_learning_rate: float | None = None
    """The optimizer's at zeroth-order steps, which keep moments of their own; None means learning_rate."""
    zo_epsilon: float = 1e-3
    """ε of `ZerothOrder`, as MeZO and ZOODiP have it."""
    zo_queries: int = 2
    """Directions that a zeroth-order step averages, as ZOODiP does; two forward passes each."""
    zo_strengths: bool = False
    """A zeroth-order step looks for how strong each matrix should be, one number a matrix; where steps were taken back
    before, as with "selective": see `ZerothOrder`."""
    zo_timesteps: tuple[int, int] | None = None
    """Zeroth-order steps draw from these time steps only, the end excluded: ZOODiP's are (500, 900). None: all."""

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or the rank where it is None."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def rate(self) -> float:
        """`learning_rate`, or the optimizer's usual one where it is None."""
        return USUAL_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def fixed(self) -> dict[str, Any]:
        """Those that may not change when a run goes on; the others do not change what a step does, but for rounding
        where `together` is another."""
        free = {"save_every", "validate_every", "together", "fused_backward"}
        free |= {"gradient_checkpointing", "checkpoint_levels"}
        if self.strategy != "selective":  # whose steps know how far the training is
            free |= {"selective_gamma", "probability"}
            if self.lr_schedule == "constant":  # the others know it, too
                free.add("steps")
        if self.strategy == "bp":
            free |= {"zo_learning_rate", "zo_epsilon", "zo_queries", "zo_strengths", "zo_timesteps"}
        free |= {each.name for each in fields(self) if each.name in LATER and getattr(self, each.name) == each.default}
        fixed = {name: value for name, value in asdict(self).items() if name not in free} | {"learning_rate": self.rate}
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
            ("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, positive),
            ("lr_schedule", self.lr_schedule in get_args(LRSchedule), f"Choose {_one_of(LRSchedule)}."),
            ("warmup", 0 <= self.warmup < self.steps, f"It must be 0 or more, and less than the {self.steps} steps."),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "It must be 0 or more."),
            ("optimizer", self.optimizer in get_args(OptimizerName), f"Choose {_one_of(OptimizerName)}."),
            ("ema", self.ema is None or 0 < self.ema < 1, "It must be between 0 and 1, such as 0.99."),
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
            ("seed", 0 <= self.seed < SEEDS, "It must be from 0 to 2^64 - 1."),
            ("save_every", self.save_every >= 0, "It must be 0 or more."),
            ("validate_every", self.validate_every >= 0, "It must be 0 or more."),
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
        if self.zo_strengths and self.strategy == "zo":
            raise HollowError(
                "zo_strengths does not go with strategy zo: a LoRA begins with matrices of zeros, which no strength "
                "changes. Choose selective, or leave it out."
            )
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
            ("optimizer", self.optimizer not in ALL_AT_ONCE, "Choose another: it needs all gradients at once."),
        ]:
            if self.fused_backward and not possible:
                raise HollowError(f"fused_backward does not go with {name} {getattr(self, name)}. {advice}")
        for name, possible, advice in [
            (
                "strategy",
                self.strategy != "selective" or self.optimizer not in ALL_AT_ONCE,
                "Choose another of both: each kind of steps would know of its own alone.",
            ),
            (
                "lr_schedule",
                self.lr_schedule == "constant" or self.optimizer != "schedulefree",
                "Choose constant: that one needs no schedule.",
            ),
            (
                "ema",
                self.ema is None or self.optimizer != "schedulefree",
                "Leave it out: that averages by itself.",
            ),
        ]:
            if not possible:
                raise HollowError(f"{name} {getattr(self, name)} does not go with optimizer {self.optimizer}. {advice}")
        if self.optimizer == "prodigy" and (low := min(self.rate, self.zo_learning_rate or math.inf)) < 0.1:
            raise HollowError(
                f"The learning rate {low:g} is too low for prodigy, which finds the rate itself and takes this for a "
                "factor of it. Set it to 1, or leave it out (0 in the node)."
            )


def _one_of(names: Any) -> str:
    """The names that a Literal allows, as a sentence has them."""
    *most, last = get_args(names)
    return f"{', '.join(most)} or {last}"


def check_unfused(settings: TrainSettings) -> None:
    """Raises HollowError for a fused step, where class pictures are to be trained on."""
    if settings.fused_backward:
        raise HollowError(
            "fused_backward trains on one record a step, but there are pictures of the class too. "
            "Set prior_weight to 0, or turn fused_backward off."
        )
