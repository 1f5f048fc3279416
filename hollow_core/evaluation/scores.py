"""DINO, CLIP-I and CLIP-T: is it the subject, and is it what the prompt says (Hollowed Net, Sec. 5.1).

Defined by DreamBooth (arXiv 2208.12242, Sec. 4.1): DINO and CLIP-I are the mean cosine over all pairs of a real and
a generated picture, of features of DINO ViT-S/16 and CLIP ViT-B/32; CLIP-T is the mean cosine between a generated
picture and its prompt. Pictures are prepared as both models' authors publish it, which is not what the hub's
preprocessor of DINO does (github.com/google/dreambooth/issues/3):

- DINO: shorter side to 256 pixels, bicubic, the middle 224, ImageNet's mean and deviation; the feature is the class
  token (github.com/facebookresearch/dino, eval_knn.py).
- CLIP: shorter side to 224 pixels, bicubic, the middle 224, CLIP's own mean and deviation
  (github.com/openai/CLIP, clip.py).
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from ..data.picture_file import open_picture
from ..errors import HollowError
from ..files import read_json, read_safetensors, write_safetensors
from ..models import layouts
from ..models.single_file import quiet

DINO = "facebook/dino-vits16"
CLIP = "openai/clip-vit-base-patch32"
# Where the hub keeps them as safetensors; on their main branch they are pickles, which are never read.
REVISIONS = {DINO: "refs/pr/1", CLIP: "refs/pr/15"}
SIDE = 224  # pixels


class Preparation(NamedTuple):
    """How a model wants its pictures."""

    shorter_side: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


FOR_DINO = Preparation(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FOR_CLIP = Preparation(SIDE, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Score(NamedTuple):
    """Of one picture, or the mean of many; 1 is the most."""

    dino: float
    clip_i: float
    clip_t: float | None
    """None where there is no prompt."""


class Features(NamedTuple):
    """Unit vectors of n pictures."""

    dino: Tensor  # (n, 384)
    clip: Tensor  # (n, 512)


class Scorers:
    """Both models; `load` makes one."""

    def __init__(self, dino: ViTModel, clip: CLIPModel, batch: int = 32) -> None:
        self.dino, self.clip, self.batch = dino.eval(), clip.eval(), batch
        # every CLIP of OpenAI's has this one
        self.tokenizer = CLIPTokenizer.from_pretrained(layouts.FOLDER / "tokenizer")

    def to(self, device: torch.device | str) -> "Scorers":
        """Both models to `device`, in place."""
        for model in (self.dino, self.clip):
            torch.nn.Module.to(model, device)
        return self

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return next(self.dino.parameters()).device

    @torch.no_grad()
    def features(self, pictures: Iterable[Image.Image]) -> Features:
        """Of whole, upright RGB pictures of any sizes. Raises HollowError where there is none."""
        dino, clip = [], []
        for few in _batches(pictures, self.batch):
            pixels = torch.stack([prepare(picture, FOR_DINO) for picture in few]).to(self.device)
            dino.append(self.dino(pixel_values=pixels).last_hidden_state[:, 0])
            pixels = torch.stack([prepare(picture, FOR_CLIP) for picture in few]).to(self.device)
            clip.append(self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output))
        if not dino:
            raise HollowError("There are no pictures to score. Give at least one.")
        return Features(*(F.normalize(torch.cat(parts).float().cpu(), dim=1) for parts in (dino, clip)))

    @torch.no_grad()
    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (prompts, 512); what is behind the 77th token is not read."""
        vectors = []
        for few in _batches(prompts, self.batch):
            tokens = self.tokenizer(few, padding=True, truncation=True, max_length=77, return_tensors="pt")
            text = self.clip.text_model(**tokens.to(self.device)).pooler_output
            vectors.append(self.clip.text_projection(text))
        return F.normalize(torch.cat(vectors).float().cpu(), dim=1)

    def cached_features(self, paths: Sequence[Path], cache: Path | None) -> Features:
        """Of picture files, those in the safetensors file `cache` from there, where the rest is added.

        The cache knows pictures and models by their content. Raises HollowError for a file that is no picture.
        """
        if cache is None:
            return self.features(map(open_picture, paths))
        known = read_safetensors(cache)[0] if cache.exists() else {}
        names = [hashlib.sha256(self.digest.encode() + path.read_bytes()).hexdigest() for path in paths]
        new = {name: path for name, path in zip(names, paths, strict=True) if f"{name}.dino" not in known}
        if new:
            features = self.features(map(open_picture, new.values()))
            for kind, vectors in features._asdict().items():
                known |= {f"{name}.{kind}": vector.clone() for name, vector in zip(new, vectors, strict=True)}
            write_safetensors(cache, known)
        return Features(*(torch.stack([known[f"{name}.{kind}"] for name in names]) for kind in Features._fields))

    @cached_property
    def digest(self) -> str:
        """Of both models' weights: scores with another one are not to be compared."""
        digest = hashlib.sha256()
        for model in (self.dino, self.clip):
            for weight in model.state_dict().values():
                digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load(dino: str = DINO, clip: str = CLIP) -> Scorers:
    """Both models on the CPU, each from a local folder, or by its name on the hub from the hub's cache on this disk.

    Nothing is downloaded. Raises HollowError where a model is in neither place, or of another kind.
    """
    return Scorers(_load(ViTModel, dino, "vit"), _load(CLIPModel, clip, "clip"))


def prepare(picture: Image.Image, how: Preparation) -> Tensor:
    """A picture as a model takes it (3, 224, 224): scaled, never squashed, and its middle cut out."""
    short = min(picture.size)
    width, height = (int(side * how.shorter_side / short) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    picture = picture.crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (how.mean, how.deviation))
    return (pixels - mean) / deviation


def score(references: Features, pictures: Features, prompts: Tensor | None = None) -> list[Score]:
    """Of each picture, against all references, and against its prompt in `prompts` (pictures, 512).

    As each picture meets all references, the mean of these is the mean over all pairs.
    """
    dino, clip_i = (
        (ours @ theirs.T).mean(1).tolist() for ours, theirs in zip(pictures, references, strict=True)
    )  # (pictures, references) before the mean
    clip_t = [None] * len(dino) if prompts is None else (pictures.clip * prompts).sum(1).tolist()
    return [Score(*values) for values in zip(dino, clip_i, clip_t, strict=True)]


def among(references: Features) -> Score | None:
    """The same of the references among themselves, no picture against itself: what to expect of real pictures.

    None for a single one.
    """
    count = len(references.dino)
    if count < 2:
        return None
    dino, clip_i = (((kind @ kind.T).sum().item() - count) / (count * (count - 1)) for kind in references)
    return Score(dino, clip_i, None)


def mean(scores: Sequence[Score]) -> Score:
    """The mean of each kind; None for CLIP-T where not every picture has one."""
    clip_t = [each.clip_t for each in scores if each.clip_t is not None]
    return Score(
        fmean(each.dino for each in scores),
        fmean(each.clip_i for each in scores),
        fmean(clip_t) if len(clip_t) == len(scores) else None,
    )


def read_prompts(path: Path, pictures: Sequence[Path]) -> list[str]:
    """The prompt of each picture, from JSON by the files' names, or from a text with a prompt a line in their order.

    JSON is {"NAME": "PROMPT"}, with or without suffix, as CustomConcept101 has it, or what `hollow sample --json`
    prints. A text may have fewer lines than there are pictures if each stands for equally many of them, one after
    the other. Raises HollowError where a picture has no prompt.
    """
    if path.suffix.lower() == ".json":
        return _prompts_by_name(path, read_json(path), pictures)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HollowError(f"{path} is no readable text. Save the prompts as UTF-8, one a line.") from error
    return split_prompts(text, len(pictures))


def split_prompts(text: str, pictures: int) -> list[str]:
    """A prompt for each of so many pictures, from a text with one a line for each, or for equally many in a row.

    Raises HollowError where they do not come out even.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or pictures % len(lines):
        raise HollowError(
            f"There are {len(lines)} prompts for {pictures} pictures. Write one a line for each picture, in the order "
            "of their names, or for equally many one after the other."
        )
    return [line for line in lines for _ in range(pictures // len(lines))]


def _prompts_by_name(path: Path, data: Any, pictures: Sequence[Path]) -> list[str]:
    if isinstance(data, list):
        data = {Path(entry["file"]).name: entry["prompt"] for entry in data}
    known = {**data} if isinstance(data, dict) else {}
    prompts = []
    for picture in pictures:
        prompt = known.get(picture.name, known.get(picture.stem))
        if not isinstance(prompt, str):
            raise HollowError(f'{path} has no prompt for {picture.name}. Add "{picture.name}": "its prompt".')
        prompts.append(prompt)
    return prompts


def _load(kind: Any, name: str, model_type: str) -> Any:
    folder = _folder(name)
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise HollowError(f"{folder} holds a model of type {found!r}, not {model_type!r}. Give the folder of one.")
    extra = {"add_pooling_layer": False} if kind is ViTModel else {}
    try:
        with quiet():
            return kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, **extra
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise HollowError(f"{folder} cannot be loaded ({error}). Get its files again.") from error


def _folder(name: str) -> Path:
    """Where config.json and model.safetensors of a model lie: a folder, or the hub's cache in any revision."""
    folders = [Path(name)]
    with suppress(ValueError):
        repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
        folders += sorted(repository.glob("snapshots/*"))
    for folder in folders:
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    advice = "Check the name, or give the folder that holds both."
    if name in REVISIONS:
        get = f"hf download {name} config.json model.safetensors --revision {REVISIONS[name]}"
        advice = f"Nothing is downloaded unasked; run once: {get}"
    raise HollowError(
        f"There are no config.json and model.safetensors of {name}, neither in a folder of this name nor in the hub's "
        f"cache {constants.HF_HUB_CACHE}. {advice}"
    )


def _batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    few: list[Any] = []
    for item in items:
        few.append(item)
        if len(few) == size:
            yield few
            few = []
    if few:
        yield few
