"""Stage 1 in ComfyUI: LATENT and CONDITIONING in, a finished store out."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...hollow_core.errors import HollowError
from ..handles import HollowActivations, HollowedModel
from .conditioning import Conditionings, identifier_of, same, text_of, to_conditioning
from .files import store_folder
from .memory import alone_on_device, clear_device, free_bytes
from .plan import PIXELS, planner_of, setting_of
from .progress import NodeProgress, say
from .unet import frozen_network, noise_schedule

if TYPE_CHECKING:
    from ...hollow_core.training.store import Store

Picture = tuple[Tensor, Tensor | None]
"""Latents (1, channels, height, width) as ComfyUI has them, and a mask of `_masks`."""

WORDS = {  # what users know of a store's fingerprint
    "schedule": "noise schedule",
    "dtype": "storage",
    "kinds": "pictures",
    "latents": "pictures",
    "embeddings": "prompts",
}


def precompute(
    hollowed: HollowedModel,
    latents: Sequence[dict[str, Any]],
    personal: Sequence[Conditionings],
    generic: Sequence[Conditionings],
    class_latents: Sequence[dict[str, Any]],
    class_prompts: Sequence[Conditionings],
    low_latents: Sequence[dict[str, Any]] = (),
    low_class_latents: Sequence[dict[str, Any]] = (),
    *,
    samples: int,
    seed: int,
    storage: str,
    name: str,
    together: int,
    hold_out: int = 0,
    node_id: str,
) -> tuple[HollowActivations, str]:
    """Run the base to the exit for each record that is not stored yet; with what was done, in words.

    `personal` and `generic` hold one prompt for all pictures or one for each, `class_prompts` also one for each batch
    of `class_latents`. The low ones are those of the same pictures at a lower resolution, or none. Every `hold_out`-th
    picture is not learned, its loss is looked at; 0 holds out none.
    Raises HollowError as `hollow_core.training.precompute.precompute` does and where it needs more memory than is
    free, where another ComfyUI works in the same folder, and ComfyUI's exception on Cancel.
    """
    from ...hollow_core.lock import holding
    from ...hollow_core.memory.remedy import check_fits, memory_told
    from ...hollow_core.nets.residency import stream_middle
    from ...hollow_core.training import precompute as stage

    if low_class_latents and not class_latents:
        raise HollowError("There are small class pictures without the large ones. Connect class latents, too.")
    folder = store_folder(name)
    of_class = _prompt_of_each(class_latents, class_prompts)
    examples = [
        *_personal_examples(hollowed, latents, personal, generic, hold_out),
        *_class_examples(hollowed, class_latents, of_class),
    ]
    if low_latents:
        examples += _low(_personal_examples(hollowed, low_latents, personal, generic, hold_out))
    examples += _low(_class_examples(hollowed, low_class_latents, of_class))
    schedule = noise_schedule(hollowed.model)
    watch = NodeProgress(node_id, "Precompute")
    clear_device(hollowed.model)
    planner, free = planner_of(hollowed.model), partial(free_bytes, hollowed.model)
    setting = setting_of(hollowed, [example.latents for example in examples])
    setting = planner.eased(replace(setting, training=replace(setting.training, together=together)), free())
    check_fits(planner, setting, free(), ["precompute"])
    device = comfy.model_management.get_torch_device()
    network = frozen_network(hollowed, device)
    if setting.stream_middle:
        stream_middle(network, hollowed.cut, device)
    made_by = stage.model_id(network)  # here, as from the GPU it takes longer
    base = network.base(hollowed.cut).module
    with holding(folder), memory_told(lambda: planner, "precompute", setting, free), alone_on_device(base):
        store = stage.precompute(
            network,
            schedule,
            examples,
            folder,
            cut=hollowed.cut,
            samples=samples,
            seed=seed,
            dtype=getattr(torch, storage),
            together=together,
            made_by=made_by,
            apart=True,
            progress=watch.tell,
            stop=watch.stop,
        )
    watch.finish()
    records = len(store.records)
    told = f"{records} records in output/hollow/{name}:\n{watch.made(records)}."
    if watch.new == records and (changed := _changed(store)):
        told += f" Changed: {', '.join(changed)}."
    say(told, node_id)
    identifiers = dict.fromkeys(filter(None, map(identifier_of, personal)))
    words = text_of(personal[0]), text_of(generic[0]), ", ".join(identifiers)
    return HollowActivations(store.folder, *words), told


def _changed(store: "Store") -> list[str]:
    """What sets a store apart from the nearest of those beside it; empty where it is the only one."""
    from ...hollow_core.training.store import Store

    this, differences = asdict(store.fingerprint), []
    for index in store.folder.parent.glob("*/store.json"):
        with suppress(HollowError):  # a damaged one is no reason to end
            other = asdict(Store.open(index.parent).fingerprint)
            names = [WORDS.get(name, name) for name in this if this[name] != other[name]]
            differences.append(list(dict.fromkeys(names)))
    return min(filter(None, differences), key=len, default=[])


def _personal_examples(
    hollowed: HollowedModel,
    latents: Sequence[dict[str, Any]],
    personal: Sequence[Conditionings],
    generic: Sequence[Conditionings],
    hold_out: int,
) -> list[Any]:
    pictures = _pictures(latents)
    if not pictures:
        raise HollowError("There are no pictures to learn from. Connect four or five of your subject.")
    for name, prompts in (("personal", personal), ("generic", generic)):
        if len(prompts) not in (1, len(pictures)):
            raise HollowError(
                f"There are {len(prompts)} {name} prompts for {len(pictures)} pictures. "
                "Connect one for all of them, or as many as there are pictures."
            )
    for number in range(max(len(personal), len(generic))):
        seen, base_sees = personal[number % len(personal)], generic[number % len(generic)]
        if (identifier := identifier_of(seen)) and same(seen, base_sees):
            raise HollowError(
                f"The personal prompt {text_of(seen)!r} is to the text encoder the same as the generic one, so nothing "
                f"of the subject could be learned. Write {identifier!r} into it, near the front, or leave the "
                "identifier of Split Prompt empty for a style."
            )
    if hold_out == 1 or hold_out > len(pictures):
        raise HollowError(
            f"hold_out is {hold_out}, and there are {len(pictures)} pictures. Give 0 to hold out none, or a number "
            "from 2 up to that of the pictures."
        )
    kinds = [
        "held-out image" if hold_out and number % hold_out == 0 else "image" for number, _ in enumerate(pictures, 1)
    ]
    return [
        _example(hollowed, picture, personal[number % len(personal)], generic[number % len(generic)], kind)
        for number, (picture, kind) in enumerate(zip(pictures, kinds, strict=True))
    ]


def _low(examples: list[Any]) -> list[Any]:
    """As twins of those that are learned."""
    return [replace(example, kind=f"low {example.kind}") for example in examples if example.kind in ("image", "prior")]


def _prompt_of_each(latents: Sequence[dict[str, Any]], prompts: Sequence[Conditionings]) -> list[Conditionings]:
    """The prompt of each class picture."""
    sizes = [len(batch["samples"]) for batch in latents]
    if len(prompts) == 1:
        return [prompts[0]] * sum(sizes)
    if len(prompts) == len(sizes):
        return [prompt for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]
    if len(prompts) == sum(sizes) or not sizes:
        return [*prompts]
    raise HollowError(
        f"There are {len(prompts)} prompts for {sum(sizes)} class pictures in {len(sizes)} batches. "
        "Connect to class_prompt the one that made them all, or one for each batch."
    )


def _class_examples(
    hollowed: HollowedModel, latents: Sequence[dict[str, Any]], prompts: Sequence[Conditionings]
) -> list[Any]:
    return [
        _example(hollowed, picture, prompt, prompt, "prior")
        for picture, prompt in zip(_pictures(latents), cycle(prompts), strict=False)
    ]


def _pictures(latents: Sequence[dict[str, Any]]) -> list[Picture]:
    return [(each[None], mask) for batch in latents for each, mask in zip(batch["samples"], _masks(batch), strict=True)]


def _masks(batch: dict[str, Any]) -> list[Tensor | None]:
    """Of each picture of a LATENT how much each of its latents counts, (1, 1, height, width) in 0…1; None: all alike.

    As ComfyUI has it: of any size, and in turn where there are fewer than pictures. Raises HollowError for black ones.
    """
    samples, given = batch["samples"], batch.get("noise_mask")
    if given is None:
        return [None] * len(samples)
    with torch.inference_mode(False):
        whole = given.detach().cpu().float().clone().reshape(-1, 1, *given.shape[-2:])
        masks = F.interpolate(whole, samples.shape[-2:], mode="area").clamp(0, 1).split(1)
    for number, mask in enumerate(masks, start=1):
        if not mask.any():
            raise HollowError(
                f"Mask {number} of {len(masks)} is black all over. Paint white what is to be learned, or leave it out."
            )
    return [None if mask.min() == 1 else mask for mask, _ in zip(cycle(masks), samples, strict=False)]


def _example(
    hollowed: HollowedModel, picture: Picture, personal: Conditionings, generic: Conditionings, kind: str
) -> Any:
    """One picture's `Example`, of ordinary tensors; its latents (1, channels, height, width) as the U-Net expects."""
    from ...hollow_core.training.precompute import Example

    given, mask = picture
    height, width = (PIXELS * size for size in given.shape[-2:])
    pooled_width = hollowed.model.model.adm_channels
    encoded = {
        what: to_conditioning(what, prompt, pooled_width=pooled_width, height=height, width=width)
        for what, prompt in (("personal", personal), ("generic", generic))
    }
    with torch.inference_mode(False):
        latents = hollowed.model.model.process_latent_in(given.detach().cpu().float().clone())
    return Example(
        latents,
        **encoded,
        personal_prompt=text_of(personal),
        generic_prompt=text_of(generic),
        kind=kind,
        mask=mask,
    )
