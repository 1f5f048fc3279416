"""A base model with a transformer, from a diffusers folder: `Model` for every family of `nets.families`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..errors import HollowError
from ..files import read_json
from ..nets.conditioning import Conditioning
from ..nets.families import FAMILIES, Family
from ..nets.schedule import NoiseSchedule
from ..nets.transformer import Transformer
from . import vae
from .model import Outlines, TimestepSampling, maker_of, without_data
from .schedulers import flow_scheduler
from .single_file import quiet

NETWORK = "transformer"
"""The network's folder."""


@dataclass
class TransformerModel:
    """The parts of a base model with a transformer; a `Model`."""

    module: Any
    """The network, of diffusers' class."""
    vae: Any
    """AutoencoderKL, AutoencoderTiny, or one of pictures as films of one frame, as Qwen-Image and Wan have it."""
    encoders: dict[str, nn.Module]
    """What makes of words what the network sees, by their names in the pipeline; empty once set free."""
    tokenizers: tuple[Any, ...]
    """In the order of `Family.tokenizers`; an outline has none."""
    scheduler: FlowMatchEulerDiscreteScheduler
    """It tells how noise levels are shifted."""
    resolution: int
    """The native side of a picture in pixels."""
    pixels_per_latent: int
    """To a side."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What model_index.json tells beside the parts."""

    def __post_init__(self) -> None:
        """Raises HollowError for a VAE that does not fit the network, as one for fills or edits takes more."""
        if self.module is None or self.vae is None:
            return
        made, taken = vae.latent_channels(self.vae.config), self.family.channels(self.network.config)
        if made != taken:
            raise HollowError(
                f"The VAE makes latents of {made} channels, but this {self.family.title} takes {taken}. Take the plain "
                "model, whole."
            )

    @property
    def network(self) -> Transformer:
        """The transformer, for what knows no kind of network."""
        return Transformer(self.module)

    @property
    def family(self) -> Family:
        """What is known of its kind."""
        return self.network.family

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """Empty once set free."""
        return tuple(self.encoders.values())

    @property
    def large_encoders(self) -> tuple[nn.Module, ...]:
        """All: they are as large as the network."""
        return self.text_encoders

    @property
    def layout(self) -> str:
        """The family's name."""
        return self.family.name

    @property
    def latent_side(self) -> int:
        """The native side of a picture in latents."""
        return self.resolution // self.pixels_per_latent

    @property
    def usual_guidance(self) -> float:
        """The family's."""
        return self.family.guidance

    @property
    def distilled(self) -> bool:
        """Whether the network is told the scale of guidance, and so needs no negative prompt."""
        return bool(self.network.config.get("guidance_embeds"))

    @property
    def schedule(self) -> NoiseSchedule:
        """As `schedule_for` gives it, for the native size and as usual."""
        return self.schedule_for(None, self.resolution)

    def schedule_for(self, sampling: TimestepSampling | None, side: int) -> NoiseSchedule:
        """Flow matching, its time steps drawn as `sampling` says: None shifts them as the model is for pictures of
        about `side` squared pixels."""
        if sampling == "uniform":
            return NoiseSchedule.flow(density="uniform")
        latents = side // self.pixels_per_latent
        return NoiseSchedule.flow(shift=1.0 if sampling == "logit-normal" else self.shift(latents, latents))

    def shift(self, height: int, width: int) -> float:
        """Of noise levels, for latents of height × width: as the scheduler tells, else the family's."""
        config = self.scheduler.config
        if config.use_dynamic_shifting:
            mu = self.mu(height, width)
            return math.exp(mu) if config.time_shift_type == "exponential" else mu
        return float(config.shift)

    def mu(self, height: int, width: int) -> float:
        """What a scheduler that shifts by the number of the picture's tokens is told of it: on a line through two
        points."""
        config, family = self.scheduler.config, self.family
        if self.options.get("is_distilled") and family.distilled_mu is not None:
            return family.distilled_mu
        steep = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + steep * (height * width // 4 - config.base_image_seq_len))

    def outlines(self) -> Outlines:
        """What gives models of the same parts, of tensors without data; it keeps nothing of the weights."""
        assert self.vae is not None
        makers = [maker_of(part) for part in (self.module, self.vae, *self.text_encoders)]
        others = replace(self, module=None, vae=None, encoders=dict.fromkeys(self.encoders, nn.Identity()))

        def give(dtype: torch.dtype) -> TransformerModel:
            module, pictures, *encoders = without_data(makers, dtype)
            named = dict(zip(others.encoders, encoders, strict=True))
            return replace(others, module=module, vae=pictures, encoders=named)

        return give

    @torch.no_grad()
    def encode_prompt(self, text: str, size: tuple[int, int] | None = None) -> Conditioning:
        """What the network sees of a prompt, whatever the `size` of the picture: what the family's own pipeline makes
        of it, without tokens that a mask leaves out. Encoders without data are handed as many tokens as there may be.
        Raises HollowError where they were set free."""
        if not self.encoders:
            raise HollowError("The text encoder was set free already. Encode all prompts before free_encoders.")
        family, weight = self.family, next(self.text_encoders[0].parameters())
        if weight.is_meta:
            for encoder in self.text_encoders:
                if isinstance(encoder, PreTrainedModel):
                    ids = torch.zeros(1, family.max_tokens, dtype=torch.long, device=weight.device)
                    encoder(input_ids=ids[:, : getattr(encoder.config, "max_position_embeddings", None)])
            return self.network.inputs(2, 2)[1]
        parts = {
            **dict.fromkeys((*family.text_encoders, "vae")),
            **self.encoders,
            **dict(zip(family.tokenizers, self.tokenizers, strict=True)),
            NETWORK: self.module,
            "scheduler": self.scheduler,
            **self.options,
        }
        tokens = min(family.max_tokens, self.tokenizers[-1].model_max_length)
        with quiet():
            return family.encode(family, parts, text, weight.device, tokens)

    def tokens(self, text: str) -> list[list[int]]:
        """Those of a prompt that are read, by each text encoder; without what a family says around it."""
        most = self.family.max_tokens
        return [
            list(tokenizer(text, truncation=True, max_length=min(most, tokenizer.model_max_length)).input_ids)
            for tokenizer in self.tokenizers
        ]

    def encode_guided(self, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
        """The prompt, which tells a distilled network of the guidance, and the negative one that another needs; as
        lists, since prompts are of different lengths."""
        seen = self.encode_prompt(prompt)
        if self.distilled:
            told = torch.tensor([guidance], dtype=torch.float32, device=seen.encoder_hidden_states.device)
            return {"prompts": [seen._replace(guidance=told)], "negatives": []}
        return {"prompts": [seen], "negatives": [self.encode_prompt(negative)] if guidance > 1 else []}

    def batch_guided(self, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One list of each."""
        return {name: [each for text in texts for each in text[name]] for name in texts[0]}

    def free_encoders(self) -> None:
        """Let go of VAE and text encoders."""
        self.vae, self.encoders = None, {}


def load_transformer(folder: Path, dtype: torch.dtype) -> TransformerModel:
    """The model in a diffusers folder, onto the CPU. Raises HollowError where the installed diffusers is too old for
    it, and for weights that are missing or no safetensors."""
    model = _assembled(folder, partial(_loaded, folder, dtype=dtype))
    index = _index(folder)
    missing = [name for name in model.family.tokenizers if not (folder / name).exists()]
    if missing:
        raise HollowError(f"{folder} lacks its {missing[0]}. Get the whole {model.family.title}.")
    kinds = [_kind(folder, *index[name][:2]) for name in model.family.tokenizers]
    with quiet():
        found = [kind.from_pretrained(folder / name) for name, kind in zip(model.family.tokenizers, kinds, strict=True)]
    return replace(model, tokenizers=tuple(found))


def outline_transformer(folder: Path, dtype: torch.dtype) -> TransformerModel:
    """What `load_transformer` gives, of tensors that hold no data and without tokenizers; only configs are read. Raises
    HollowError as it does, but does not see whether weights are missing."""
    return _assembled(folder, partial(_outlined, folder, dtype=dtype))


def family_at(folder: Path) -> Family | None:
    """That of the pipeline that a diffusers folder holds; None for one that is of no family."""
    name = _index(folder).get("_class_name")
    return next((family for family in FAMILIES.values() if name in family.pipelines), None)


def _assembled(folder: Path, part: Callable[[str, type[Any]], Any]) -> TransformerModel:
    """Of what `part` gives for a name in the pipeline and its class."""
    index, family = _index(folder), family_at(folder)
    assert family is not None
    kinds = {name: _kind(folder, *entry[:2]) for name, entry in index.items() if _names_part(entry) and entry[0]}
    missing = [name for name in (NETWORK, "vae", *family.text_encoders[:1], *family.tokenizers) if name not in kinds]
    if missing:
        raise HollowError(f"{folder} lacks its {missing[0]}. Get the whole {family.title}.")
    scheduler = flow_scheduler(folder, family.shift)
    with quiet():
        network, pictures = part(NETWORK, kinds[NETWORK]), part("vae", kinds["vae"])
        per_latent = vae.pixels_per_latent(pictures.config)
        own_side = network.config.get("sample_size")
        return TransformerModel(
            module=network,
            vae=pictures,
            encoders={name: part(name, kinds[name]) for name in family.text_encoders if name in kinds},
            tokenizers=(),
            scheduler=scheduler,
            resolution=own_side * per_latent if own_side else min(family.resolution, _largest(scheduler, per_latent)),
            pixels_per_latent=per_latent,
            options={name: value for name, value in index.items() if not (_names_part(value) or name.startswith("_"))},
        )


def _index(folder: Path) -> dict[str, Any]:
    """What the pipeline is made of: a class, and library and class of each part by name."""
    files = [folder / name for name in ("model_index.json", "modular_model_index.json")]
    return next((read_json(file) for file in files if file.exists()), {})


def _names_part(entry: Any) -> bool:
    """Whether what an index has under a name is a part: library and class, both None where it is left out."""
    return isinstance(entry, list) and len(entry) > 1 and all(isinstance(each, str | None) for each in entry[:2])


def _kind(folder: Path, library: str, name: str) -> Any:
    """The class of a part. Raises HollowError where what is installed has none of that name."""
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if found is None and "Tokenizer" in name:  # versions of transformers call them otherwise
        return transformers.AutoTokenizer
    if found is None:
        raise HollowError(f"{folder} needs {library} with {name}, which this installation has not. Update {library}.")
    return found


def _loaded(folder: Path, name: str, kind: Any, *, dtype: torch.dtype) -> nn.Module:
    files = [file.name for file in (folder / name).glob("*.safetensors")]
    only_half = bool(files) and all(".fp16." in file for file in files)
    try:
        part, told = kind.from_pretrained(
            str(folder / name),  # as configs keep it
            torch_dtype=dtype,
            variant="fp16" if only_half else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HollowError(f"{folder / name} does not load: {reason} … Check that it is whole.") from error
    missing = sorted(told["missing_keys"]) or [key for key, weight in part.named_parameters() if weight.is_meta]
    if missing:
        raise HollowError(f"{folder / name} lacks weights, such as {missing[0]}. Get the whole model.")
    loaded: nn.Module = part.eval().requires_grad_(False)
    return loaded


def _outlined(folder: Path, name: str, kind: Any, *, dtype: torch.dtype) -> nn.Module:
    if not (folder / name / "config.json").exists():
        raise HollowError(f"{folder / name} lacks its config.json. Get the whole model.")
    if issubclass(kind, ConfigMixin):
        maker = partial(kind.from_config, kind.load_config(folder / name))
    else:
        maker = partial(kind, kind.config_class.from_pretrained(folder / name))
    outlined: nn.Module = without_data([maker], dtype)[0]
    return outlined


def _largest(scheduler: FlowMatchEulerDiscreteScheduler, pixels_per_latent: int) -> int:
    """Side of the largest picture, in patches of 2×2 latents, for which a scheduler is made."""
    return math.isqrt(scheduler.config.max_image_seq_len) * 2 * pixels_per_latent
