"""Stage 2: train a LoRA on the records of a store; the loop reads top to bottom."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from .activations import Store, digest, schedule_id
from .checkpoint import Checkpoint
from .errors import HollowError
from .lora import ATTENTION, add_lora, load_lora_state, lora_state, named_lora_parameters, snapshot
from .optimizer import Optimizer, OptimizerName
from .progress import Clock, Stop, Watch
from .selective import Choice, Probability, Strategy, Taken, choices, falling, heat_map, taken
from .steps import Part, Step, ZerothOrder, backpropagate, part_loss

CHECKPOINT = "checkpoint.safetensors"

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Stopped = Literal["finished", "stop", "non-finite loss", "non-finite gradient"]


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
    the memory of so many."""
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


@dataclass(frozen=True)
class TrainResult:
    """What came out. After a non-finite loss or gradient, the LoRA of the last finite loss."""

    state: dict[str, Tensor]  # as `lora_state` gives it
    losses: list[float]  # one a step, from the first step on
    stopped: Stopped
    taken: list[Taken]  # of every step its image records, one after the other

    @property
    def steps(self) -> int:
        """Steps done, those of interrupted runs included."""
        return len(self.losses)


def train(
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
    store: Store,
    settings: TrainSettings,
    *,
    folder: Path | str,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> TrainResult:
    """Train a fresh LoRA in `unet`, or go on from the checkpoint in `folder`, and leave it in there.

    `unet` is hollowed at the cut of `store` (Hollowed Net, Sec. 4.3) or, for a store without a cut, whole;
    drop the base before, nothing here needs it. A step minimises the mean loss of `batch` image records
    (Eq. 1) plus `prior_weight` times that of `batch` prior records (Eq. 2), in the way that the strategy
    chooses; "selective" needs a store with low examples. `progress` is called after each
    step, `stop` is asked before each step. Interrupted anywhere and called again, it ends with the same LoRA,
    on a CPU bit by bit, on a GPU but for rounding, as its backward pass is not the same twice; called with more
    `steps`, it goes on, but for "selective", whose schedule ends with the last of them.

    Raises HollowError for a store that is unfinished or does not fit `unet` and `schedule`; for a checkpoint
    that is damaged or of other settings, as going on would give a LoRA of neither and a fresh start would
    overwrite what may have taken hours; and for a full disk. Where memory runs out in a pass, torch's
    OutOfMemoryError is passed on, after a checkpoint; in an update, without a new one. Called again with less around,
    or with smaller settings, it goes on.
    """
    _check(unet, schedule, store, settings)
    path = Path(folder) / CHECKPOINT
    made_for = {"store": store.id} | settings.fixed
    begun = Checkpoint.load(path, made_for) if path.exists() else None
    if begun is not None and len(begun.losses) > settings.steps:
        raise HollowError(
            f"{path} has {len(begun.losses)} steps already, more than the {settings.steps} asked. "
            "Ask for more, or choose another folder."
        )

    # a LoRA in the frozen U-Net, and its optimizer
    unet.eval()  # the records, too, were made without dropout
    if settings.gradient_checkpointing:
        checkpoint_activations(unet, settings.checkpoint_levels)
    if begun is None:
        generator = torch.Generator().manual_seed(_seeds(settings)[0])
        add_lora(unet, settings.rank, settings.lora_alpha, settings.targets, generator=generator)
    else:
        load_lora_state(unet, begun.lora, settings.lora_alpha)
    named = named_lora_parameters(unet)
    parameters = list(named.values())
    for matrix in parameters:
        matrix.data = matrix.data.to(DTYPES[settings.lora_precision])
    optimizer_at = partial(Optimizer, parameters, settings.optimizer, weight_decay=settings.weight_decay)
    zo_learning_rate = settings.zo_learning_rate or settings.learning_rate
    optimizers = {
        "backward": optimizer_at(learning_rate=settings.learning_rate, fused=settings.fused_backward),
        "forward": optimizer_at(learning_rate=zo_learning_rate),  # of zeroth-order steps, with moments of their own
    }
    for way, optimizer in optimizers.items():
        if begun is not None:
            optimizer.load(begun.optimizers[way])

    # what each step does, as only the seed decides: to go on is to skip ahead
    losses = [] if begun is None else begun.losses
    ahead = steps_ahead(store, schedule, settings)
    trained_on = [record for choice in islice(ahead, len(losses)) for record in taken(store, choice)]

    loss_of = partial(part_loss, unet, schedule, store, snr_gamma=settings.snr_gamma)

    def save() -> None:
        moments = {way: optimizer.state() for way, optimizer in optimizers.items()}
        Checkpoint(snapshot(named), moments, losses, loss_scale, made_for).save(path)

    good = snapshot(named)
    loss_scale = (2.0**16 if settings.precision == "fp16" else 1.0) if begun is None else begun.loss_scale
    stopped: Stopped = "finished"
    clock = Clock(len(losses), settings.steps)
    while len(losses) < settings.steps:
        if stop is not None and stop():
            stopped = "stop"
            break

        # the gradient, a part of the records at a time, backwards or from forwards alone
        choice = next(ahead)
        forward_only = choice.kind == "zo-high"
        zeroth_order = ZerothOrder(parameters, choice.seed, settings.zo_epsilon, settings.zo_queries)
        step: Step = zeroth_order if forward_only else backpropagate
        optimizer = optimizers["forward" if forward_only else "backward"]
        before = snapshot(named)
        try:
            with optimizer.watching():
                loss = step(loss_of, _parts(store, choice.weighted, settings.together), loss_scale)
        except torch.cuda.OutOfMemoryError:
            if not optimizer.begun:  # half an update is none to go on from
                save()
            raise
        if not math.isfinite(loss):
            stopped = "non-finite loss"
            break
        good = before

        # the update; fp16 gradients that overflow are left out, and the loss scaled less from then on
        for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
            gradient /= loss_scale
        norm = optimizer.clip(settings.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
        elif loss_scale > 1:
            loss_scale /= 2
        else:
            stopped = "non-finite gradient"
            break
        losses.append(loss)
        trained_on += taken(store, choice)

        # save, then tell
        done = clock(len(losses), loss)
        if settings.save_every and done.step % settings.save_every == 0 and done.step < done.steps:
            save()
        if progress is not None:
            progress(done)

    if stopped in ("finished", "stop"):
        save()
    else:
        load_lora_state(unet, good, settings.lora_alpha)
    return TrainResult(lora_state(unet), losses, stopped, trained_on)


def steps_ahead(store: Store, schedule: DDPMScheduler, settings: TrainSettings) -> Iterator[Choice]:
    """What each step of a training does, from the first on and for ever. Raises HollowError as `choices` does."""
    return choices(
        store,
        settings.strategy,
        batch=settings.batch,
        prior_weight=settings.prior_weight,
        steps=settings.steps,
        timesteps=len(schedule.alphas_cumprod),
        probability=settings.bp_low_probability,
        zo_timesteps=settings.zo_timesteps,
        seeds=_seeds(settings)[1:],
    )


def _seeds(settings: TrainSettings) -> list[int]:
    """For the LoRA's first values, then those of `choices`."""
    seeds: list[int] = torch.randint(2**32, (5,), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return seeds


def _parts(store: Store, weighted: Sequence[tuple[int, float]], together: int) -> list[Part]:
    """`weighted` in order, in parts of up to so many neighbours whose pictures and prompts are of one size."""
    if together == 1:
        return [[each] for each in weighted]
    parts: list[list[tuple[int, float]]] = []
    sizes = None
    for index, weight in weighted:
        latents, conditioning = store.inputs(store.records[index].image)
        before, sizes = sizes, (latents.shape, conditioning.encoder_hidden_states.shape)
        if sizes != before or len(parts[-1]) == together:
            parts.append([])
        parts[-1].append((index, weight))
    return list(parts)


def checkpoint_activations(unet: UNet2DConditionModel, levels: int | None = None) -> None:
    """Let backward passes compute anew what blocks would keep, in so many levels from the outermost; None: in all."""
    unet.enable_gradient_checkpointing()
    if levels is None:
        return
    inner = [*list(unet.down_blocks)[levels:], unet.mid_block, *list(unet.up_blocks)[: len(unet.up_blocks) - levels]]
    for module in (module for block in inner if block is not None for module in block.modules()):
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


def _check(unet: UNet2DConditionModel, schedule: DDPMScheduler, store: Store, settings: TrainSettings) -> None:
    if (dtype := unet.conv_in.weight.dtype) != DTYPES[settings.precision]:
        raise HollowError(
            f"The U-Net is in {str(dtype).removeprefix('torch.')}, but the precision is {settings.precision}. "
            "Load it in that precision, or ask for another."
        )
    if store.missing:
        raise HollowError(f"The store in {store.folder} is not finished. Run precompute again: it goes on.")
    if schedule_id(schedule) != store.fingerprint.schedule:
        raise HollowError(f"The store in {store.folder} was made with another noise schedule. Precompute anew.")
    if (cut := getattr(unet, "cut", None)) != store.cut:
        raise HollowError(
            f"The U-Net has cut {cut}, the store in {store.folder} has cut {store.cut} (None: not hollowed). "
            "Hollow the U-Net at the cut of the store."
        )
    if settings.prior_weight > 0 and store.indices("prior"):
        check_unfused(settings)


def check_unfused(settings: TrainSettings) -> None:
    """Raises HollowError for a fused step, where class pictures are to be trained on."""
    if settings.fused_backward:
        raise HollowError(
            "fused_backward trains on one record a step, but there are pictures of the class too. "
            "Set prior_weight to 0, or turn fused_backward off."
        )
