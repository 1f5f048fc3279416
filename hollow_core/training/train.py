"""Stage 2: train a LoRA on the records of a store; the loop reads top to bottom."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import HollowError
from ..lora.layers import add_lora, lora_state, named_lora_parameters, snapshot
from ..nets.network import Network
from ..nets.schedule import NoiseSchedule
from ..nets.transfer import Copies
from ..progress import Clock, Stop, Watch
from .ahead import one_ahead
from .averages import Averages
from .checkpoint import LOSS_SCALE, Checkpoint, damaged_checkpoint
from .optimizer import Optimizer
from .rates import rate_factor
from .selective import Choice, Taken, choices, taken
from .settings import DTYPES, TrainSettings, check_unfused
from .steps import Part, Step, ZerothOrder, backpropagate, held_out_loss, part_loss, read_parts
from .store import Store

CHECKPOINT = "checkpoint.safetensors"

Stopped = Literal["finished", "stop", "non-finite loss", "non-finite gradient"]


@dataclass(frozen=True)
class TrainResult:
    """What came out. After a non-finite loss or gradient, the LoRA of the last finite loss, not averaged."""

    state: dict[str, Tensor]  # as `lora_state` gives it, and as it is to be used
    losses: list[float]  # one a step, from the first step on
    stopped: Stopped
    taken: list[Taken]  # of every step its image records, one after the other
    validation: list[tuple[int, float]] = field(default_factory=list)
    """After so many steps, the mean loss of the held-out records, each time of the same time steps and noise."""
    trouble: str = ""
    """After a non-finite loss or gradient: what is not finite, and what to do, in two sentences."""

    @property
    def steps(self) -> int:
        """Steps done, those of interrupted runs included."""
        return len(self.losses)


def train(
    network: Network,
    schedule: NoiseSchedule,
    store: Store,
    settings: TrainSettings,
    *,
    folder: Path | str,
    progress: Watch | None = None,
    stop: Stop | None = None,
    saved: Callable[[int, dict[str, Tensor]], object] | None = None,
) -> TrainResult:
    """Train a fresh LoRA in `network`, or go on from the checkpoint in `folder`, and leave it in there.

    `network` is hollowed at the cut of `store` (Hollowed Net, Sec. 4.3) or, for a store without a cut, whole;
    drop the base before, nothing here needs it. A step minimises the mean loss of `batch` image records
    (Eq. 1) plus `prior_weight` times that of `batch` prior records (Eq. 2), in the way that the strategy
    chooses; "selective" needs a store with low examples. `progress` is called after each
    step, and inside its `as_used` the LoRA is as it would be given out then; `stop` is asked before each step; `saved`
    gets the number of steps and the LoRA as it would be given out whenever a checkpoint was saved by `save_every`, and
    after the last step.
    Interrupted anywhere and called again, it ends with the same LoRA, on a CPU bit by bit, on a GPU but for rounding,
    as its backward pass is not the same twice; called with more `steps`, it goes on, but for "selective" and for
    learning rates that fall, whose schedules end with the last of them.

    Raises HollowError for a store that is unfinished, damaged or does not fit `network` and `schedule`; for a
    checkpoint that is damaged or of other settings, as going on would give a LoRA of neither and a fresh start would
    overwrite what may have taken hours; and for a full disk. Where memory runs out in a pass, torch's
    OutOfMemoryError is passed on, after a checkpoint; in an update, without a new one. Called again with less around,
    or with smaller settings, it goes on.
    """
    _check(network, schedule, store, settings)
    path = Path(folder) / CHECKPOINT
    made_for = {"store": store.id} | settings.fixed
    begun = Checkpoint.load(path, made_for) if path.exists() else None
    if begun is not None and len(begun.losses) > settings.steps:
        raise HollowError(
            f"{path} has {len(begun.losses)} steps already, more than the {settings.steps} asked. "
            "Ask for more, or choose another folder."
        )

    # a LoRA in the frozen network, and its optimizer
    module = network.module
    module.eval()  # the records, too, were made without dropout
    if settings.gradient_checkpointing:
        network.checkpoint(settings.checkpoint_levels)
    add_lora(
        module,
        settings.rank,
        settings.lora_alpha,
        settings.targets,
        within=network.within,
        dora=settings.dora,
        generator=torch.Generator().manual_seed(_seeds(settings)[0]),
    )
    named = named_lora_parameters(module)
    parameters = list(named.values())
    if begun is not None:
        if {key: tensor.shape for key, tensor in begun.lora.items()} != {key: p.shape for key, p in named.items()}:
            raise damaged_checkpoint(path, "its LoRA lacks a matrix, or has one of another shape")
        for key, matrix in named.items():
            matrix.data.copy_(begun.lora[key])
    for matrix in parameters:
        matrix.data = matrix.data.to(DTYPES[settings.lora_precision])
    optimizer_at = partial(Optimizer, parameters, settings.optimizer, weight_decay=settings.weight_decay)
    zo_learning_rate = settings.zo_learning_rate or settings.rate
    optimizers = {
        "backward": optimizer_at(learning_rate=settings.rate, fused=settings.fused_backward),
        "forward": optimizer_at(learning_rate=zo_learning_rate),  # of zeroth-order steps, with moments of their own
    }
    averages = Averages(parameters, [*optimizers.values()], settings.ema)
    if begun is not None:
        misfits = [optimizer.misfit(begun.optimizers[way]) for way, optimizer in optimizers.items()]
        for misfit in filter(None, [*misfits, averages.misfit(begun.averages)]):
            raise damaged_checkpoint(path, misfit)
        for way, optimizer in optimizers.items():
            optimizer.load(begun.optimizers[way])
        averages.load(begun.averages)

    # what each step does, as only the seed decides: to go on is to skip ahead
    losses = [] if begun is None else begun.losses
    ahead = steps_ahead(store, schedule, settings)
    trained_on = [record for choice in islice(ahead, len(losses)) for record in taken(store, choice)]

    factor_of_rate = rate_factor(settings.lr_schedule, settings.steps, settings.warmup)
    loss_of = partial(part_loss, network)

    def read(choice: Choice) -> list[Part]:
        return read_parts(store, schedule, choice.weighted, together=settings.together, snr_gamma=settings.snr_gamma)

    def save() -> None:
        moments = {way: optimizer.state() for way, optimizer in optimizers.items()}
        state = averages.state()
        Checkpoint(snapshot(named), moments, state, losses, loss_scale, made_for, validation).save(path)

    def give_out() -> None:
        if saved is not None:
            with averages.as_used():
                saved(len(losses), lora_state(module))

    # held-out pictures, always at the same time steps and noise
    validation = [] if begun is None else begun.validation
    held_out = store.indices("held-out image")

    def validate() -> None:
        if held_out and (not validation or validation[-1][0] != len(losses)):
            with averages.as_used():
                validation.append((len(losses), held_out_loss(loss_of, store, schedule, held_out)))

    before, good = Copies(parameters), Copies(parameters)  # of a step's start, and of the last finite loss's
    good.take()
    loss_scale = (LOSS_SCALE if settings.precision == "fp16" else 1.0) if begun is None else begun.loss_scale
    stopped: Stopped = "finished"
    trouble = ""
    validate()
    if settings.save_every and losses and len(losses) % settings.save_every == 0 and len(losses) < settings.steps:
        give_out()  # again: a kill may have come between
    clock = Clock(len(losses), settings.steps)
    left = islice(ahead, settings.steps - len(losses))
    for choice, parts in one_ahead(read, left):
        if stop is not None and stop():
            stopped = "stop"
            break

        # the gradient, a part of the records at a time, backwards or from forwards alone
        forward_only = choice.kind == "zo-high"
        zeroth_order = ZerothOrder(
            parameters, choice.seed, settings.zo_epsilon, settings.zo_queries, settings.zo_strengths
        )
        step: Step = zeroth_order if forward_only else backpropagate
        optimizer = optimizers["forward" if forward_only else "backward"]
        optimizer.set_rate(factor_of_rate(len(losses)))
        before.take()
        try:
            with optimizer.watching():
                loss_there = step(loss_of, parts, loss_scale)
        except torch.cuda.OutOfMemoryError:
            if not optimizer.begun:  # half an update is none to go on from
                save()
            raise
        # where Python waits for the device, once a step
        loss, scaled_norm = torch.stack([loss_there, optimizer.norm()]).tolist()
        if not math.isfinite(loss):
            stopped, trouble = "non-finite loss", _trouble(store, choice, losses, settings)
            break
        good, before = before, good

        # the update; fp16 gradients that overflow are left out, and the loss scaled less from then on
        if math.isfinite(norm := scaled_norm / loss_scale):
            optimizer.step(min(settings.max_grad_norm / (norm + 1e-6), 1.0) / loss_scale)
            averages.follow()
        elif loss_scale > 1:
            loss_scale /= 2
        else:
            stopped, trouble = "non-finite gradient", _trouble(store, choice, losses, settings)
            break
        losses.append(loss)
        trained_on += taken(store, choice)

        # look, save, then tell
        step_number = len(losses)
        if settings.validate_every and step_number % settings.validate_every == 0:
            validate()
        if settings.save_every and step_number % settings.save_every == 0 and step_number < settings.steps:
            save()
            give_out()
        if progress is not None:
            held_out_now = validation[-1][1] if validation else None
            now = {"validation": held_out_now, "learning_rate": optimizer.rate, "as_used": averages.as_used}
            progress(clock(step_number, loss, **now))

    if stopped in ("finished", "stop"):
        if stopped == "finished":  # who stops a run may not wait long
            validate()
        save()
        averages.use()
        if saved is not None and settings.save_every and stopped == "finished":
            saved(len(losses), lora_state(module))
    else:
        good.give_back()
    return TrainResult(lora_state(module), losses, stopped, trained_on, validation, trouble)


def steps_ahead(store: Store, schedule: NoiseSchedule, settings: TrainSettings) -> Iterator[Choice]:
    """What each step of a training does, from the first on and for ever. Raises HollowError as `choices` does."""
    return choices(
        store,
        settings.strategy,
        batch=settings.batch,
        prior_weight=settings.prior_weight,
        steps=settings.steps,
        timesteps=len(schedule),
        probability=settings.bp_low_probability,
        zo_timesteps=settings.zo_timesteps,
        seeds=_seeds(settings)[1:],
    )


def _seeds(settings: TrainSettings) -> list[int]:
    """For the LoRA's first values, then those of `choices`."""
    seeds: list[int] = torch.randint(2**32, (5,), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return seeds


def _trouble(store: Store, choice: Choice, losses: Sequence[float], settings: TrainSettings) -> str:
    """What is not finite in a step after `losses`: one of its records, the network by itself, or what was learned."""
    for index, _ in choice.weighted:
        record = store.record(index)
        latents, prompt = store.inputs(record.image)
        if not all(tensor.isfinite().all() for tensor in record.stored.values()):
            return (
                f"Record {index} in {store.file_of(index)} is not finite. Delete that file and run again: it is made "
                "anew, and the rest is kept."
            )
        if not all(tensor is None or tensor.isfinite().all() for tensor in (latents, *prompt)):
            return f"Example {record.image} in {store.folder} is not finite. Delete that folder and run again."
    other = "" if settings.precision == "fp32" else ", or take the precision fp32"
    if not losses:
        return (
            "The records are finite, but the network makes of them what is not, before anything is learned. "
            f"Check the model{other}."
        )
    return f"The records are finite, the training is not: it went too far. Lower the learning rate{other}."


def _check(network: Network, schedule: NoiseSchedule, store: Store, settings: TrainSettings) -> None:
    if (dtype := network.dtype) != DTYPES[settings.precision]:
        raise HollowError(
            f"The U-Net is in {str(dtype).removeprefix('torch.')}, but the precision is {settings.precision}. "
            "Load it in that precision, or ask for another."
        )
    if store.missing:
        raise HollowError(f"The store in {store.folder} is not finished. Run precompute again: it goes on.")
    if schedule.id != store.fingerprint.schedule:
        raise HollowError(f"The store in {store.folder} was made with another noise schedule. Precompute anew.")
    if (cut := network.cut) != store.cut:
        raise HollowError(
            f"The U-Net has cut {cut}, the store in {store.folder} has cut {store.cut} (None: not hollowed). "
            "Hollow the U-Net at the cut of the store."
        )
    store.check(schedule)
    if settings.prior_weight > 0 and store.indices("prior"):
        check_unfused(settings)
