"""Every way of training that a table compares."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from benchmarks import held_out
from hollow_core.demo import pretrain, run, world
from hollow_core.demo.world import Subject
from hollow_core.nets.network import Network, at_cut
from hollow_core.nets.residency import Bits
from hollow_core.nets.unet_layers import layers, leaves_attention, max_cut

Method = Literal["lora", "hollowed", "full", "pruned", "pruned, distilled"]
Wording = Literal["class word", "coarser word", "empty", "personal", "coarser word or personal"]
Learning = Literal["all", "up half", "outside the hollow", "most changed blocks"]

COARSER = "thing"


@dataclass(frozen=True)
class Way:
    """One way of training; what it leaves open is the demo's."""

    method: Method
    cut: int | None = None
    rank: int = run.SETTINGS.rank
    samples: int = run.SAMPLES
    """Records, half of them of the class where there are class pictures."""
    class_images: int = run.CLASS_IMAGES
    generic: Wording = "class word"
    """What stands for "sks cup" in the prompt of the base path, at training and at sampling."""
    called: str | None = None
    """The class word of all prompts; None is what the subject is."""
    learning_rate: float = run.SETTINGS.rate
    bits: Bits | None = None
    """Of a weight of the base."""
    learning: Learning = "all"
    """Which layers have the LoRA, where it is not hollowed."""
    side: int = world.SIZE
    """Of the pictures that are learned; drawn ones are of full size."""

    def kind_of(self, subject: Subject) -> str:
        """The class word by which all prompts call a subject."""
        return self.called or subject.kind

    @property
    def name(self) -> str:
        """As its folder is called: "hollowed-k3-r16-s300"."""
        parts = [
            self.method.replace(", ", "-"),
            None if self.cut is None else f"k{self.cut}",
            None if self.method == "full" else f"r{self.rank}",
            f"s{self.samples}",
            None if self.class_images == run.CLASS_IMAGES else f"c{self.class_images}",
            None if self.generic == "class word" else self.generic.replace(" ", "-"),
            None if self.called is None else f"called-{self.called}",
            None if self.learning_rate == run.SETTINGS.rate else f"lr{self.learning_rate:g}",
            None if self.bits is None else f"{self.bits}bit",
            None if self.learning == "all" else self.learning.replace(" ", "-"),
            None if self.side == world.SIZE else f"{self.side}px",
        ]
        return "-".join(part for part in parts if part)


LORA = Way("lora")
HOLLOWED = Way("hollowed", run.CUT)
FULL = Way("full")
PRUNED = [Way("pruned", run.CUT), Way("pruned, distilled", run.CUT)]
RANKS = (1, 4, 16, 128)
LORA_RANKS = {rank: Way("lora", rank=rank) for rank in RANKS}
HOLLOWED_RANKS = {rank: Way("hollowed", run.CUT, rank=rank) for rank in RANKS}
CALMER = {way: replace(way, learning_rate=2.5e-4) for way in (LORA_RANKS[128], HOLLOWED_RANKS[128])}
"""The demo's learning rate is meant for rank 16; of eight times the rank, an eighth of it."""
_CONFIG = pretrain.new_unet().config
FRESH = Way("lora", samples=2 * held_out.STEPS * run.SETTINGS.batch)
"""A record of its own for each picture in each step, as a trainer without a store has it."""
CUTS = {cut: Way("hollowed", cut) for cut in range(max_cut(_CONFIG) + 1) if leaves_attention(_CONFIG, cut)}
SAMPLES = {samples: Way("hollowed", run.CUT, samples=samples) for samples in (50, 100, 200, 500, 1000)}
WORDINGS: dict[Wording, Way] = {wording: Way("hollowed", run.CUT, generic=wording) for wording in get_args(Wording)}
CALLED_COARSER = Way("hollowed", run.CUT, called=COARSER)
WITHOUT_PRIOR = {LORA: Way("lora", class_images=0), HOLLOWED: Way("hollowed", run.CUT, class_images=0)}

EIGHT_BITS = {way: replace(way, bits=8) for way in (LORA, HOLLOWED)}
LEARNING = {learning: Way("lora", learning=learning) for learning in get_args(Learning)[1:]}
SMALLER = {side: Way("lora", side=side) for side in (3 * world.SIZE // 4, world.SIZE // 2)}

MAIN = [LORA, HOLLOWED, CUTS[6], FULL, CUTS[1], SAMPLES[200], EIGHT_BITS[HOLLOWED], SAMPLES[1000]]
"""Those that all held-out subjects are trained in."""
GIVING_UP = [
    LORA,
    HOLLOWED,
    CUTS[1],
    CUTS[6],
    FULL,
    *EIGHT_BITS.values(),
    LORA_RANKS[1],
    *LEARNING.values(),
    *SMALLER.values(),
]
"""What a user can give up for memory."""
WAYS = list(
    dict.fromkeys(
        [
            *MAIN,
            *GIVING_UP,
            *(way for rank in (128, 1, 4) for way in (LORA_RANKS[rank], HOLLOWED_RANKS[rank])),
            *CALMER.values(),
            FULL,
            *PRUNED,
            *WORDINGS.values(),
            CALLED_COARSER,
            *WITHOUT_PRIOR.values(),
            FRESH,
            *SAMPLES.values(),
            *CUTS.values(),
        ]
    )
)
"""All of them, those first that most tables need."""

QUICK = [LORA, HOLLOWED, FULL, *PRUNED, WORDINGS["coarser word"], WITHOUT_PRIOR[HOLLOWED], CUTS[6]]


def learned(way: Way, network: Network, targets: Sequence[str], most_changed: Collection[str] = ()) -> tuple[str, ...]:
    """Which of the layers whose names end as one of `targets` have a way's LoRA: their names or the ends of them.
    `most_changed` are the names of blocks, such as "3-2"."""
    if way.learning == "all":
        return tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    possible = [
        path
        for path, module in network.module.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f".{path}".endswith(ends)
    ]
    if way.learning == "up half":
        return tuple(path for path in possible if path.startswith("up_blocks."))
    if way.learning == "outside the hollow":
        left = {path for path, _ in at_cut(network, run.CUT, None).module.named_modules()}
        return tuple(path for path in possible if path in left)
    inside = tuple(
        f"{module}." for layer in layers(network.config) if layer.name in most_changed for module in layer.modules
    )
    return tuple(path for path in possible if path.startswith(inside))
