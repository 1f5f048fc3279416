"""Stage 1 in ComfyUI: LATENT and CONDITIONING in, a finished store out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hollow_core.errors import HollowError
from ..handles import HollowActivations, HollowedModel
from .conditioning import Conditionings, identifier_of, text_of, to_conditioning
from .files import store_folder
from .memory import alone_on_device, clear_device
from .progress import NodeProgress
from .unet import diffusers_unet, noise_schedule

PIXELS = 8  # a latent's width and height in pixels; only SDXL is told the size


def precompute(
    hollowed: HollowedModel,
    latents: Sequence[dict[str, Any]],
    personal: Sequence[Conditionings],
    generic: Sequence[Conditionings],
    class_latents: Sequence[dict[str, Any]],
    class_prompt: Conditionings | None,
    *,
    samples: int,
    seed: int,
    storage: str,
    name: str,
    node_id: str,
) -> HollowActivations:
    """Run the base to the exit for each record that is not stored yet.

    Raises HollowError as `hollow_core.precompute.precompute` does, and ComfyUI's exception on Cancel.
    """
    from ...hollow_core import precompute as stage
    from ...hollow_core.hollow import head

    folder = store_folder(name)
    pictures, class_pictures = _scaled(hollowed, latents), _scaled(hollowed, class_latents)
    examples = _examples(hollowed, pictures, personal, generic, class_pictures, class_prompt or generic[0])
    schedule = noise_schedule(hollowed.model)
    watch = NodeProgress(node_id, "Precompute")
    clear_device()
    unet = diffusers_unet(hollowed.model)
    with alone_on_device(head(unet, hollowed.cut)):
        store = stage.precompute(
            unet,
            schedule,
            examples,
            folder,
            cut=hollowed.cut,
            samples=samples,
            seed=seed,
            dtype=getattr(torch, storage),
            apart=True,
            progress=watch.tell,
            stop=watch.stop,
        )
    watch.finish()
    return HollowActivations(store.folder, text_of(personal[0]), text_of(generic[0]), identifier_of(personal[0]))


def _scaled(hollowed: HollowedModel, given: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Each picture's latents (1, channels, height, width) as the U-Net expects them, as ordinary tensors."""
    pictures = [picture for batch in given for picture in batch["samples"].split(1)]
    with torch.inference_mode(False):
        return [hollowed.model.model.process_latent_in(picture.detach().cpu().float().clone()) for picture in pictures]


def _examples(
    hollowed: HollowedModel,
    pictures: Sequence[Tensor],
    personal: Sequence[Conditionings],
    generic: Sequence[Conditionings],
    class_pictures: Sequence[Tensor],
    class_prompt: Conditionings,
) -> list[Any]:
    from ...hollow_core.precompute import Example

    pairs = {"personal": personal, "generic": generic}
    for name, prompts in pairs.items():
        if len(prompts) not in (1, len(pictures)):
            raise HollowError(
                f"There are {len(prompts)} {name} prompts for {len(pictures)} pictures. "
                "Connect one for all of them, or as many as there are pictures."
            )
    pooled_width = hollowed.model.model.adm_channels

    def example(latents: Tensor, prompts: Mapping[str, Conditionings], kind: str) -> Any:
        height, width = (PIXELS * size for size in latents.shape[-2:])
        encoded = {
            name: to_conditioning(name, prompt, pooled_width=pooled_width, height=height, width=width)
            for name, prompt in prompts.items()
        }
        texts = {f"{name}_prompt": text_of(prompt) for name, prompt in prompts.items()}
        return Example(latents, encoded["personal"], encoded["generic"], **texts, kind=kind)

    of_class = {"personal": class_prompt, "generic": class_prompt}
    return [
        *(
            example(latents, {name: given[number % len(given)] for name, given in pairs.items()}, "image")
            for number, latents in enumerate(pictures)
        ),
        *(example(latents, of_class, "prior") for latents in class_pictures),
    ]
