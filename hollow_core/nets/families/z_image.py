"""Z-Image: image and text in one sequence, behind a refiner of each; predicts x₀ − ε at the time 1 − σ."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .family import Blocks, Family, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.patches import Place
    from ..conditioning import Conditioning


def _called(network: Any, place: "Place | None") -> Any:
    """Image tokens are counted from 0 on; those that fill up their number have no place."""
    if place is None:
        return network

    def patchify_and_embed(*given: Any) -> tuple[Any, ...]:
        import torch

        images, texts, sizes, image_ids, text_ids, image_pads, text_pads = network.patchify_and_embed(*given)
        moved = [
            torch.stack([ids[:, 0], ids[:, 1] + place.row * ~pads, ids[:, 2] + place.column * ~pads], dim=1)
            for ids, pads in zip(image_ids, image_pads, strict=True)
        ]
        return images, texts, sizes, moved, text_ids, image_pads, text_pads

    view = copy.copy(network)
    view.patchify_and_embed = patchify_and_embed
    return view


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    return {
        "x": list(latents.unsqueeze(2).unbind(0)),
        "t": 1 - sigmas,
        "cap_feats": list(prompt.encoder_hidden_states.unbind(0)),
    }


def _velocity(config: Mapping[str, Any], out: "Sequence[Tensor]", size: tuple[int, int]) -> "Tensor":
    import torch

    return -torch.stack(list(out)).squeeze(2)


_LAYERS = (
    ("attention.to_q", "attention.qkv"),
    ("attention.to_k", "attention.qkv"),
    ("attention.to_v", "attention.qkv"),
    ("attention.to_out.0", "attention.out"),
)

Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    network="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline",),
    blocks=(Blocks("layers", "image first"),),
    refiners=("noise_refiner", "context_refiner"),
    kept=("all_x_embedder", "cap_embedder", "t_embedder", "all_final_layer"),
    feed_forward=("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    multiple=32,
    original=tuple(
        pair for blocks in ("layers", "noise_refiner", "context_refiner") for pair in renamed(blocks, blocks, _LAYERS)
    ),
    version="z_image",
    architecture="Z-Image",
    prompt_tokens=64,
    guidance=6.0,  # ZImagePipeline's 5, which it adds to 1
    encoding={"do_classifier_free_guidance": False},
    source="diffusers 0.42, ZImageTransformer2DModel and ZImagePipeline",
    called=_called,
    arguments=_arguments,
    velocity=_velocity,
    width=lambda config: config["dim"],
    text_shape=lambda config: (config["cap_feat_dim"],),
)
