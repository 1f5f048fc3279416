"""ComfyUI's CONDITIONING as the library's, with the prompt's text where our own nodes have noted it."""

from typing import Any

import node_helpers
import torch
from torch import Tensor

from ...hollow_core.errors import HollowError

Conditionings = list[list[Any]]  # ComfyUI's: [[embedding (1, tokens, width), {"pooled_output": …}], …]

TEXT = "hollow_text"  # keys that "Split Prompt" notes in a CONDITIONING, and other nodes pass on
IDENTIFIER = "hollow_identifier"


def to_conditioning(what: str, given: Conditionings, *, pooled_width: int, height: int, width: int) -> Any:
    """The `Conditioning` of one prompt; `what` names it in errors.

    `pooled_width` is 0 but for SDXL, which sees a pooled embedding and sizes too. Those that the prompt does
    not name are `height` and `width`, the picture's in pixels. Raises HollowError for a combination of several
    prompts and for one of another model's encoder.
    """
    from ...hollow_core.nets.conditioning import Conditioning

    embedding, values = only(what, given)
    if not pooled_width:
        return Conditioning(_ordinary(embedding))
    pooled = pooled_embedding(what, values)
    original = (values.get("height", height), values.get("width", width))
    crop = (values.get("crop_h", 0), values.get("crop_w", 0))
    target = (values.get("target_height", original[0]), values.get("target_width", original[1]))
    time_ids = torch.tensor([[*original, *crop, *target]], dtype=torch.float32)
    return Conditioning(_ordinary(embedding), _ordinary(pooled), time_ids)


def only(what: str, given: Conditionings) -> tuple[Tensor, dict[str, Any]]:
    """The one embedding (1, tokens, width) of a CONDITIONING, and its values."""
    number = sum(len(embedding) for embedding, _ in given)
    if number != 1:
        raise HollowError(f"The {what} prompt holds {number} prompts. Connect one straight from a text encoder.")
    return given[0][0], given[0][1]


def pooled_embedding(what: str, values: dict[str, Any]) -> Tensor:
    """The pooled embedding (1, width) that SDXL needs. Raises HollowError where the prompt has none."""
    pooled: Tensor | None = values.get("pooled_output")
    if pooled is None:
        raise HollowError(f"The {what} prompt has no pooled embedding, which SDXL needs. Encode it with SDXL's CLIP.")
    return pooled


def encode(clip: Any, text: str, identifier: str) -> Conditionings:
    """`text` as ComfyUI's own CLIP Text Encode gives it, with text and identifier noted for our other nodes.

    Raises HollowError for a checkpoint without a text encoder.
    """
    if clip is None:
        raise HollowError("This checkpoint holds no text encoder. Load one with Load CLIP.")
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(encoded, {TEXT: text, IDENTIFIER: identifier})


def same(one: Conditionings, other: Conditionings) -> bool:
    """Whether the text encoder gave the same of two prompts."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a[0].shape == b[0].shape and torch.equal(a[0], b[0]) for a, b in pairs)


def text_of(given: Conditionings) -> str:
    """The prompt's text, if "Split Prompt" made it; otherwise nothing."""
    return str(given[0][1].get(TEXT, ""))


def identifier_of(given: Conditionings) -> str:
    """The identifier, if "Split Prompt" made the prompt; otherwise nothing, as for a style."""
    return str(given[0][1].get(IDENTIFIER, "")).strip()


def _ordinary(tensor: Tensor) -> Tensor:
    """A copy that autograd may save, unlike one made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().cpu().clone()
