"""All figures of one LoRA or of several, ready for JSON, with the memory that the recommended cut saves."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..lora.file import kind_of
from ..memory.planner import Planner
from ..memory.setting import Setting
from ..models.layouts import LAYOUTS
from ..nets.families import family_in
from ..nets.network import Cut
from ..training.settings import TrainSettings
from .blocks import blocks
from .report import SMALL_SHARE, Analysis, sides, spread, suggest


class Saving(NamedTuple):
    """Peak memory of a training in fp32 at batch 1, with LoRA on the attention, in bytes."""

    rank: int
    whole: int
    """Of the whole network."""
    hollowed: int


def figures(analyses: Sequence[Analysis], share: float = SMALL_SHARE, model: str | None = None) -> dict[str, Any]:
    """- `loras`: each as `Analysis.row` gives it
    - `suggestions`: for each of `sides`, what `suggest` recommends for `share`, or None; `training_bytes` are of a
      dry run without GPU, which takes seconds, on `model` (a path), or on the public model that the LoRAs are for; None
      for transformers, whose dry run takes longer than all the rest
    - `spread`: mean and deviation of Eq. 3 over the LoRAs, by block
    """
    config = analyses[0].config
    kind = kind_of(config)
    unet = family_in(config) is None
    planner = Planner(model or kind) if unet and (model or kind in LAYOUTS) else None
    suggestions: list[dict[str, Any] | None] = []
    for side in sides(analyses):
        if (suggestion := suggest(side, share)) is None:
            suggestions.append(None)
            continue
        saved = None if planner is None else saving(planner, side[0], suggestion.cut)._asdict()
        suggestions.append(suggestion._asdict() | {"training_bytes": saved})
    spreads = {block.name: spread([each.block(block) for each in analyses]) for block in blocks(config)}
    return {
        "loras": [analysis.row() for analysis in analyses],
        "suggestions": suggestions,
        "spread": {name: found and found._asdict() for name, found in spreads.items()},
    }


def saving(planner: Planner, analysis: Analysis, cut: Cut) -> Saving:
    """What training a LoRA of the usual rank of this one takes with and without `cut`."""
    rank, _ = Counter(rank for rank, _ in analysis.lora.values()).most_common(1)[0]
    training = TrainSettings(rank=rank)
    whole, hollowed = (planner.peak("train", Setting(cut=k, training=training)).total for k in (None, cut))
    return Saving(rank, whole, hollowed)
