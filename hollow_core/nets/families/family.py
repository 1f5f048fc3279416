"""What Hollow knows of a family of transformers: facts, and two functions that speak its language. Needs no torch."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..unet_layers import ATTENTION

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.patches import Place
    from ..conditioning import Conditioning

BOTH_STREAMS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The projections of attention where image and text have their own."""

Streams = Literal["image", "two", "image first", "text first"]
"""What passes a block: the image's tokens alone; image and text side by side; or both joined in one sequence."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks.

    A block takes its stream first, or the image's and then the text's, by position or as `hidden_states` and
    `encoder_hidden_states`. It gives back the same, of two streams the text's first.
    """

    path: str
    """Of the list in diffusers' network."""
    streams: Streams


@dataclass(frozen=True)
class Family:
    """A family of transformers, by diffusers' own class."""

    name: str
    """Short, for files and the command."""
    title: str
    """For people."""
    network: str
    """The name of diffusers' class."""
    pipelines: tuple[str, ...]
    """As model_index.json names the pipelines of text to image."""
    blocks: tuple[Blocks, ...]
    """In the order in which they run."""
    refiners: tuple[str, ...] = ()
    """Lists of blocks before all others, which go with the front: what they make is in the state that is stored."""
    kept: tuple[str, ...] = ()
    """Layers that stay as they are where others are quantised or streamed: small, and at both ends."""
    attention: tuple[str, ...] = ATTENTION
    """Ends of the names of the layers that usually get a LoRA."""
    feed_forward: tuple[str, ...] = ()
    """Those of the layers between."""
    dialects: tuple[str, ...] = ("comfy", "diffusers", "peft")
    """How its LoRA files can be written; the first is what ComfyUI and diffusers both read, with nothing left over."""
    original: tuple[tuple[str, str], ...] = ()
    """(diffusers, original) names of a block's layers, where the original network, which is ComfyUI's and kohya's,
    has others; "*" is the block's number. Layers of one original name are its parts, from the first output on."""
    version: str = ""
    """What kohya's trainers write as ss_base_model_version."""
    architecture: str = ""
    """Of modelspec, without "/lora"."""
    shift: float | None = 3.0
    """Of the noise levels where the scheduler does not tell: above 1 draws more of the noisy ones."""
    multiple: int = 1
    """Of which image and text, where they are joined, each have a number of tokens; the network pads them."""
    prompt_tokens: int = 512
    """Of a usual prompt, or what prompts are padded to."""
    guidance: float = 4.0
    """Usual scale of classifier-free guidance in sampling, 1 for none, or of what a distilled network is told."""
    resolution: int = 1024
    """Native side of a picture in pixels, where no config tells."""
    distilled_mu: float | None = None
    """What shifts the noise levels of a pipeline that calls itself distilled, whatever the size of the picture."""
    own_steps: bool = False
    """The noise levels of sampling are the scheduler's own, not evenly from 1 to 1 / steps before the shift."""
    text_encoders: tuple[str, ...] = ("text_encoder",)
    """What makes of a prompt what the network sees, by the pipeline's names."""
    tokenizers: tuple[str, ...] = ("tokenizer",)
    """The last one's tokens are counted."""
    max_tokens: int = 512
    """Of a prompt at most, as the pipeline's `max_sequence_length`."""
    encoding: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline's `encode_prompt` is told beside the prompt."""
    encoded: tuple[str, ...] = ("prompt",)
    """What it gives back, in order: "prompt", "pooled", "mask" of the tokens that count, or anything else."""
    source: str = ""
    """Where these facts are from."""

    encode: "Callable[[Family, Mapping[str, Any], str, Any, int], Conditioning]" = field(
        default_factory=lambda: encoded_by_pipeline
    )
    """What the network sees of a prompt: (family, the pipeline's parts, prompt, device, tokens at most)."""
    guided: "Callable[[Tensor, Tensor, float], Tensor]" = lambda seen, unseen, scale: unseen + scale * (seen - unseen)
    """Classifier-free guidance: (velocity for the prompt, for the negative one, scale) → velocity."""
    called: "Callable[[Any, Place | None], Any]" = lambda network, place: network
    """What is called in a network's place: a view of it, where it cannot be called as it is, or where it would not know
    the place of a crop."""
    arguments: "Callable[[Mapping[str, Any], Tensor, Tensor, Conditioning], dict[str, Any]]" = lambda *_: {}
    """Of the network's forward: (config, latents (batch, channels, height, width), σ (batch,), prompt) → by name."""
    velocity: "Callable[[Mapping[str, Any], Any, tuple[int, int]], Tensor]" = lambda _, out, size: out
    """ε − x₀ (batch, channels, height, width), of what forward gives: (config, output, (height, width))."""
    width: Callable[[Mapping[str, Any]], int] = lambda config: (
        config["num_attention_heads"] * config["attention_head_dim"]
    )
    """Of a token inside."""
    channels: Callable[[Mapping[str, Any]], int] = lambda config: config["in_channels"]
    """Of the latents."""
    text_shape: Callable[[Mapping[str, Any]], tuple[int, ...]] = lambda config: (config["joint_attention_dim"],)
    """Of a prompt's token."""
    pooled_width: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    """Of the pooled prompt, where there is one."""


def renamed(ours: str, theirs: str, layers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """For `Family.original`, of the blocks in our list and in theirs."""
    return tuple((f"{ours}.*.{layer}", f"{theirs}.*.{original}") for layer, original in layers)


def encoded_by_pipeline(
    family: Family, parts: Mapping[str, Any], text: str, device: Any, tokens: int
) -> "Conditioning":
    """What the family's own pipeline in diffusers makes of a prompt, without tokens that do not count."""
    import diffusers

    from ..conditioning import Conditioning

    pipeline = getattr(diffusers, family.pipelines[0])(**parts)
    given = pipeline.encode_prompt(text, device=device, max_sequence_length=tokens, **family.encoding)
    found = dict(zip(family.encoded, given, strict=False))
    prompt, mask = found["prompt"][0], found.get("mask")
    return Conditioning((prompt if mask is None else prompt[mask[0].bool()])[None], found.get("pooled"))


def told_guidance(config: Mapping[str, Any], sigmas: "Tensor", prompt: "Conditioning") -> "Tensor | None":
    """What a network distilled for guidance is told, (batch,): 1, where the prompt says nothing. None for others,
    which are told nothing."""
    if not config["guidance_embeds"]:
        return None
    return sigmas.new_ones(len(sigmas)) if prompt.guidance is None else prompt.guidance


def packed(latents: "Tensor") -> "Tensor":
    """(batch, channels, height, width) → (batch, height/2 · width/2, channels · 4): patches of 2×2, as FLUX has."""
    return latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: "Tensor", size: tuple[int, int]) -> "Tensor":
    """The inverse of `packed`, for latents of height × width."""
    height, width = size
    patches = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_ids(latents: "Tensor", place: "Place | None") -> "Tensor":
    """(height/2 · width/2, 3): where each patch is, as (0, row, column), in the whole of which they are a crop."""
    import torch

    first = (0, 0) if place is None else (place.row, place.column)
    rows, columns = (
        torch.arange(start, start + side // 2, device=latents.device)
        for start, side in zip(first, latents.shape[-2:], strict=True)
    )
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.nn.functional.pad(places, (1, 0)).float()


def of_crop(codes: "Tensor", place: "Place", size: tuple[int, int]) -> "Tensor":
    """Of position codes of a whole (…, rows · columns, width), those of a crop of height × width tokens."""
    height, width = size
    grid = codes.unflatten(-2, (place.rows, place.columns))
    return grid[..., place.row : place.row + height, place.column : place.column + width, :].flatten(-3, -2)


def with_method(network: Any, name: str, method: str, instead: Callable[..., Any]) -> Any:
    """A view of a network, whose module of this name has another method; the network itself stays as it is."""
    view, module = copy.copy(network), copy.copy(getattr(network, name))
    setattr(module, method, instead)
    view._modules = {**network._modules, name: module}
    return view
