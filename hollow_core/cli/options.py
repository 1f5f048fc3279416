"""Options that several commands take, and what their values mean."""

import re
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import HollowError

if TYPE_CHECKING:
    from ..memory.setting import Setting
    from ..nets.network import Cut, Network
    from ..nets.residency import Bits

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
ModelPath = Annotated[
    Path, typer.Argument(help="A .safetensors checkpoint of SD 1.x, 2.x or SDXL, or a diffusers folder.")
]


class Precision(str, Enum):
    """How weights are kept and computed with."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Strategy(str, Enum):
    """How training steps find the gradient."""

    bp = "bp"
    zo = "zo"
    selective = "selective"


class LoraPrecision(str, Enum):
    """How the LoRA is kept."""

    fp32 = "fp32"
    bf16 = "bf16"


class BaseBits(str, Enum):
    """How many bits a weight of the base may take."""

    off = "off"
    eight = "8"
    four = "4"


class Layers(str, Enum):
    """Where in the U-Net there is a LoRA."""

    attention = "attention"
    all = "all"


class OptimizerKind(str, Enum):
    """What updates the LoRA."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"
    prodigy = "prodigy"
    adafactor = "adafactor"
    lion = "lion"
    schedulefree = "schedulefree"


class LRSchedule(str, Enum):
    """How the learning rate goes along a training."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"


class TimestepSampling(str, Enum):
    """How a model of flow matching draws time steps."""

    shifted = "shifted"
    logit_normal = "logit-normal"
    uniform = "uniform"


class Prediction(str, Enum):
    """What a model's U-Net predicts."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


# The groups of `--help`.
PICTURES = "Pictures"
PROMPTS = "Captions and prompts"
LORA = "LoRA"
TRAINING = "Training"
CLASS_PICTURES = "Class pictures"
MEMORY = "Memory"
ZEROTH_ORDER = "Zeroth order"
FILES = "Files"
MODEL = "Model and device"

UNLESS_CHOSEN = "off, unless chosen to fit"

Patches = Annotated[
    int | None,
    typer.Option(
        help="Side in pixels of square patches that are learned in place of whole pictures, or of selective's small ones: of much noise the whole made small, of little noise a small crop at its own size, which may miss the subject. (default: none)",
        rich_help_panel=PICTURES,
    ),
]
LayersOption = Annotated[
    Layers,
    typer.Option(
        help="attention: the four projections of self- and cross-attention, as in the paper. all: convolutions and feed-forward too, which learn more in fewer steps, in a file several times as large.",
        rich_help_panel=LORA,
    ),
]
Dora = Annotated[
    bool,
    typer.Option(
        help="Train DoRA, a magnitude for each output of a layer, too: slower, and in fp32.",
        show_default="off",
        rich_help_panel=LORA,
    ),
]
LoraPrecisionOption = Annotated[
    LoraPrecision,
    typer.Option(
        help="Of the LoRA, its gradients and AdamW's states; bf16 halves them and rounds small updates away.",
        rich_help_panel=LORA,
    ),
]
Optimizer = Annotated[
    OptimizerKind,
    typer.Option(
        help="AdamW with states in fp32, or in 8 bits by bitsandbytes: a quarter of their memory. prodigy finds its rate itself, for twice the memory; adafactor takes nearly none, lion half; schedulefree gives out an average. These four need pytorch-optimizer.",
        rich_help_panel=TRAINING,
    ),
]
FusedBackward = Annotated[
    bool,
    typer.Option(
        help="Update each matrix as its gradient comes, so that gradients never all exist; needs --max-grad-norm inf and no class images.",
        show_default="off",
        rich_help_panel=MEMORY,
    ),
]
BaseBitsOption = Annotated[
    BaseBits,
    typer.Option(
        help="Quantise the base model's weights to 8 or 4 bits: a quarter or an eighth of the memory of fp32.",
        show_default=UNLESS_CHOSEN,
        rich_help_panel=MEMORY,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        help="Keep the weights of network and text encoders in main memory and bring each to the GPU when it is needed: slower.",
        show_default=UNLESS_CHOSEN,
        rich_help_panel=MEMORY,
    ),
]
StreamMiddle = Annotated[
    bool,
    typer.Option(
        help="The same for what the cut takes out, while precomputing: then it takes no more than training.",
        show_default=UNLESS_CHOSEN,
        rich_help_panel=MEMORY,
    ),
]
TiledVae = Annotated[
    bool,
    typer.Option(
        help="Encode and decode pictures in overlapping tiles of half the side: less memory for large ones.",
        show_default=UNLESS_CHOSEN,
        rich_help_panel=MEMORY,
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        help="Recompute activations: less memory, a third more time.",
        show_default=UNLESS_CHOSEN,
        rich_help_panel=MEMORY,
    ),
]
CheckpointLevels = Annotated[
    int | None,
    typer.Option(
        help="With --checkpointing: how many levels of the U recompute, from the outermost, or quarters of a transformer. (default: all, unless chosen to fit)",
        rich_help_panel=MEMORY,
    ),
]
Together = Annotated[
    int,
    typer.Option(
        help="How many of a step's records, those of the class included, pass the U-Net at once, how many while precomputing (8 at most), and how many class pictures are drawn: faster, for the memory of so many.",
        show_default="1, unless chosen to fit",
        rich_help_panel=MEMORY,
    ),
]
UnetOnly = Annotated[
    bool, typer.Option(help="Leave out what the file has for text encoders, and embeddings.", show_default="off")
]
PredictionType = Annotated[
    Prediction | None,
    typer.Option(
        help="What the U-Net predicts, where the model does not tell. (default: as it tells)", rich_help_panel=MODEL
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)", rich_help_panel=MODEL)
]

Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)")]
DinoModel = Annotated[
    str | None,
    typer.Option(help="DINO's folder, or its name in the hub's cache. (default: facebook/dino-vits16)"),
]
ClipModel = Annotated[
    str | None,
    typer.Option(help="CLIP's folder, or its name in the hub's cache. (default: openai/clip-vit-base-patch32)"),
]


def setting_of(
    *,
    network: "Network",
    optimizer: OptimizerKind,
    lora_precision: LoraPrecision,
    checkpointing: bool,
    layers: Layers,
    base_bits: BaseBits,
    stream: bool,
    stream_middle: bool,
    tiled_vae: bool,
    resolution: int | None,
    samples: int,
    class_images: int,
    cut: str | None = None,
    low_resolution: int | None = None,
    timestep_sampling: TimestepSampling | None = None,
    patches: int | None = None,
    **training: Any,
) -> "Setting":
    """What the options say of a network; `training` are those that `TrainSettings` calls by the same name."""
    from ..memory.setting import Setting
    from ..nets.network import at_cut
    from ..training.settings import TrainSettings

    hollowed = network.usual_cut if cut is None else cut_of(cut, network)
    targets = at_cut(network, hollowed, None).targets
    return Setting(
        cut=hollowed,
        resolution=resolution,
        samples=samples,
        class_images=class_images,
        base_bits=bits_of(base_bits),
        streaming=stream,
        stream_middle=stream_middle,
        tiled_vae=tiled_vae,
        low_resolution=low_resolution,
        timestep_sampling=None if timestep_sampling is None else timestep_sampling.value,
        patches=patches,
        training=TrainSettings(
            targets=targets.attention if layers is Layers.attention else targets.all,
            optimizer=optimizer.value,
            lora_precision=lora_precision.value,
            gradient_checkpointing=checkpointing,
            **training,
        ),
    )


def outline_of(model: str, prediction_type: Prediction | None) -> Any:
    """`outline` of the model, as the options say, to be called in a precision."""
    from ..models.base_model import outline

    return partial(outline, model, prediction_type=_told(prediction_type))


def _told(prediction_type: Prediction | None) -> str | None:
    return None if prediction_type is None else prediction_type.value


def load_model(path: Path, precision: str, prediction_type: Prediction | None, prompt_chunks: int = 1) -> Any:
    """`load`, as the options say."""
    from ..models.base_model import load, read_in_chunks
    from ..training.settings import DTYPES

    model = load(path, DTYPES[Precision(precision).value], prediction_type=_told(prediction_type))
    if prompt_chunks != 1:
        read_in_chunks(model, prompt_chunks)
    return model


def cut_of(asked: str, network: "Network") -> "Cut | None":
    """3, or 4,6 of a transformer's front and back; of 50% the cut nearest to this share of the network's parameters;
    None for -1. Raises HollowError for anything else."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", asked):
        if not 0 < (share := float(match[1])) < 100:
            raise HollowError(f"There is no cut of {asked}. Give a share between 10% and 80%.")
        return network.nearest_cut(share / 100)
    try:
        numbers = tuple(int(number) for number in asked.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2) or min(numbers) < -1:
        raise HollowError(
            f"{asked!r} is no cut. Give a number such as 3 for a U-Net, two such as 4,6 for a transformer, or a share "
            "such as 50%."
        )
    if -1 in numbers:
        return None
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def cut_as_option(cut: "Cut | None") -> int | str:
    """As `cut_of` reads it; numbers stay numbers, as files of runs have them."""
    from ..nets.network import cut_in_words

    return -1 if cut is None else cut_in_words(cut) if isinstance(cut, tuple) else cut


def bits_of(asked: BaseBits) -> "Bits | None":
    """The number, None for none."""
    bits: dict[BaseBits, Bits | None] = {BaseBits.off: None, BaseBits.eight: 8, BaseBits.four: 4}
    return bits[asked]


def device_of(asked: str | None) -> str:
    """The one that was asked for, else the GPU if there is one. Raises HollowError where this PyTorch has none of it."""
    import torch

    if asked is not None:
        with suppress(RuntimeError):  # of a name that is none
            device = torch.device(asked)
            count = getattr(getattr(torch, device.type, None), "device_count", lambda: 0)
            if (device.index or 0) < count():
                return asked
        raise HollowError(
            f"There is no device {asked!r} for PyTorch {torch.__version__} here. Choose cuda, mps or cpu."
        )
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
