"""The whole road: pictures in, a LoRA file out. Each stage leaves on disk what it made, so a stopped run goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from .data.folders import check_outside
from .errors import HollowError
from .lock import holding
from .lora import file as lora_file
from .lora.dialects import check_dora
from .lora.file import Written
from .lora.layers import ATTENTION, lora_paths
from .lora.metadata import recipe_for
from .memory.meter import Meter, free_bytes
from .memory.planner import Planner
from .memory.remedy import memory_told
from .memory.setting import Setting
from .models.base_model import free_encoders, outlines
from .models.model import Model
from .nets.network import Network, at_cut
from .nets.residency import stream_middle
from .progress import Progress, Stop, Stopped, Watch
from .request import Request, check_heard, low_examples, make_examples, patch_examples
from .sampling.prior import class_latents
from .training.curve import save_losses
from .training.place import STORE, place
from .training.precompute import model_id, plan_for, precompute
from .training.selective import save_schedule
from .training.settings import DTYPES
from .training.store import Store
from .training.train import TrainResult, train

LOSS_FILE = "loss.png"
SCHEDULE_FILE = "schedule.png"


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    file: Path | None
    """The LoRA; None if the run was stopped before training."""
    result: TrainResult | None
    store: Store | None
    meter: Meter
    written: Written | None = None
    """What reading the LoRA back found."""


def personalize(
    load: Callable[[], Model],
    request: Request,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, Progress], object] | None = None,
    stop: Stop | None = None,
    placed: Callable[[Path], object] | None = None,
) -> Outcome:
    """Encode, precompute, train and save into `folder`; called again after any interruption, it goes on.

    Called with other settings, pictures or captions, it leaves what is there: class pictures and records that still fit
    are used again, and the LoRA comes into a folder of its own inside `folder`, see `training.place`. `placed` is told
    which folder that is, before training. No other process gets into `folder` meanwhile.

    On the way to NAME.safetensors there are NAME-000200.safetensors and so on, whenever a checkpoint is saved, and one
    of the last step, which more steps leave there; the last few are kept. The course of the loss is left there as a
    picture; by the strategy selective also its schedule, with the steps that were taken.

    `load` gives the base model, on the CPU, and keeps no reference to it. Its parts visit `device` in turn: VAE,
    text encoders, the U-Net up to the exit, and what is left of it; the whole U-Net only to draw class pictures. What
    no later stage needs leaves memory: the encoders before precomputing, the middle before training. `progress`
    is called with the name of the stage, "class pictures", "precompute" or "train". Raises HollowError as
    the stages do, and where memory runs out, saying what to change.
    """
    request.check()
    pictures = (*request.images, *request.class_pictures, *request.held_out)
    check_outside(folder, *(picture.path.parent for picture in pictures if picture.path is not None))
    with holding(folder):
        return _walk(load, request, folder, device, progress, stop, placed)


def _walk(
    load: Callable[[], Model],
    request: Request,
    folder: Path,
    device: torch.device | str,
    progress: Callable[[str, Progress], object] | None,
    stop: Stop | None,
    placed: Callable[[Path], object] | None,
) -> Outcome:
    setting = request.planned
    training = setting.training
    meter = Meter(torch.device(device))

    def watch(stage: str) -> Watch | None:
        return None if progress is None else lambda done: progress(stage, done)

    with meter.stage("encode"):
        model = load()
        check_cut(setting, model.network)
        check_lora(setting, model.network)
        check_heard(model, request)
        schedule = model.schedule_for(setting.timestep_sampling, request.resolution)
        schedule.check()
        torch.nn.Module.to(model.network.module, DTYPES[training.precision])  # without diffusers' advice
        told = partial(
            memory_told,
            cache(partial(Planner, outlines(model))),
            setting=setting,
            free=partial(free_bytes, torch.device(device)),
        )
        made_by = model_id(model.network) if setting.class_images or setting.base_bits is None else ""
        setting.keep_small(model, device)
        with told("encode", going_on=(folder / STORE).exists()):
            drawn: list[Tensor] = []
            if setting.class_images:
                drawn = class_latents(
                    model,
                    request.drawn,
                    request.class_folder or folder / "class",
                    made_by=made_by,
                    base_bits=setting.base_bits if request.class_folder is None else None,
                    seed=training.seed if request.class_folder is None else 0,
                    together=training.together,
                    device=device,
                    progress=watch("class pictures"),
                    stop=stop,
                )
                if len(drawn) < setting.class_images:
                    return Outcome(None, None, None, meter)
            records = None
            try:
                examples = make_examples(model, request, drawn, device, stop)
                if setting.patches is not None:
                    records = plan_for(examples, setting.samples, schedule, training.seed)
                    examples, records = patch_examples(model, request, examples, records, drawn, device, stop=stop)
                elif training.strategy == "selective":
                    examples += low_examples(model, request, examples, drawn, device, stop)
            except Stopped:
                return Outcome(None, None, None, meter)
        free_encoders(model)
        if setting.base_bits is not None:  # other weights, then
            made_by = model_id(model.network)

    with meter.stage("precompute"), told("precompute"):
        if setting.cut is not None:
            if setting.stream_middle and not setting.streaming:
                stream_middle(model.network, setting.cut, device)
            model.network.base(setting.cut).module.to(device)
        store = precompute(
            model.network,
            schedule,
            examples,
            folder / STORE,
            cut=setting.cut,
            samples=setting.samples,
            seed=training.seed,
            dtype=setting.store_dtype or model.network.record_dtype,
            together=training.together,
            made_by=made_by,
            beside=True,
            records=records,
            progress=watch("precompute"),
            stop=stop,
        )
    if store.missing:
        return Outcome(None, None, store, meter)

    folder = place(folder, store, training, request.name)
    if placed is not None:
        placed(folder)
    config, layout = model.network.config, model.layout
    network = at_cut(model.network, setting.cut, {record.timestep for record in store.records})
    del model  # here the middle leaves memory
    recipe = recipe_for(setting.cut, *request.subject, schedule.prediction.name)
    picture = request.images[0].picture if request.thumbnail else None
    alpha = training.lora_alpha

    def write(file: Path, state: dict[str, Tensor]) -> Written:
        return lora_file.save(file, state, config, alpha=alpha, layout=layout, recipe=recipe, picture=picture)

    def write_along(step: int, state: dict[str, Tensor]) -> None:
        if request.keep:
            file = folder / f"{request.name}-{step:06}.safetensors"
            write(file, state)
            lora_file.keep_last(file, request.keep)

    with holding(folder), meter.stage("train"), told("train"):
        network.module.to(device)
        result = train(
            network,
            schedule,
            store,
            training,
            folder=folder,
            progress=watch("train"),
            stop=stop,
            saved=write_along,
        )

    file = folder / f"{request.name}.safetensors"
    written = write(file, result.state)
    if result.losses:
        held_out = {"held out": result.validation} if result.validation else {}
        save_losses(folder / LOSS_FILE, {"training": result.losses}, held_out)
    if training.strategy == "selective" and result.stopped == "finished":
        save_schedule(folder / SCHEDULE_FILE, training.bp_low_probability, result.taken, len(schedule))
    return Outcome(file, result, store, meter, written)


def check_lora(setting: Setting, network: Network) -> None:
    """Raises HollowError where the LoRA would find no layer at its cut, or no file could hold it."""
    training, left = setting.training, at_cut(network, setting.cut, None)
    if training.dora:
        check_dora(network.config)
    lora_file.check_writable(lora_paths(left.module, training.targets, network.within), network.config)


def check_cut(setting: Setting, network: Network) -> None:
    """Raises HollowError for a cut that is none, and for one that leaves nothing to train a LoRA on."""
    if setting.cut is None:
        return
    network.check_cut(setting.cut)
    if not network.leaves_attention(setting.cut) and set(setting.training.targets) <= set(ATTENTION):
        least, *_, most = (cut for cut in network.cuts() if network.leaves_attention(cut))
        raise HollowError(
            f"Cut {setting.cut} leaves no attention to put a LoRA on. Choose a cut from {least} to {most}."
        )
