"""Trains the embedded transformer from nothing on the CPU: `python -m hollow_core.demo.pretrain_transformer --out DIR`.

It is a small Z-Image, with the embedded U-Net's text encoder and autoencoder, and the U-Net is its teacher: what that
sees in a noisy picture is a target with far less variance than the picture's own noise, so that a tenth of the U-Net's
training gives a usable one. Goes on from its last checkpoint; DIR is a pipeline of diffusers all the while.
"""

import argparse
import copy
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..files import read_json, read_safetensors, write_json, write_safetensors
from . import language, pretrain, run

BATCH = 12  # small: with so quiet a target, more steps teach more than larger ones
STEPS = 7_000
PEAK = 2e-3
# The content of the message and nothing else: ZImagePipeline speaks to a chat model.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-pretrain-transformer"), help="folder for the model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} pictures (default {STEPS})")
    options = parser.parse_args()
    out: Path = options.out
    begin(out)
    started = time.monotonic()
    figures = train(out, options.steps)
    pretrain.note(out, "transformer", {**figures, "seconds": round(time.monotonic() - started)})


def begin(out: Path) -> None:
    """All parts but the transformer, and the index by which ZImagePipeline finds them."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(run.MODEL / part, out / part, dirs_exist_ok=True)
    # transformers before 5 finds CLIP's weights under this name only, and that from 5 on finds them so, too
    words = out / "text_encoder" / "model.safetensors"
    weights, metadata = read_safetensors(words)
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    write_safetensors(words, prefixed, metadata)
    settings = out / "tokenizer" / "tokenizer_config.json"
    write_json(settings, {**read_json(settings), "chat_template": CHAT_TEMPLATE})
    # sequence lengths tell the native size: 64 tokens of 8×8 pixels
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, base_image_seq_len=16, max_image_seq_len=64)
    scheduler.save_pretrained(out / "scheduler")
    write_json(
        out / "model_index.json",
        {
            "_class_name": ZImagePipeline.__name__,
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        },
    )


def new_transformer() -> ZImageTransformer2DModel:
    """Twelve blocks of width 128 on 64 image and 32 text tokens; four million parameters."""
    transformer = ZImageTransformer2DModel(
        in_channels=pretrain.LATENT_CHANNELS,
        dim=128,
        n_layers=12,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=pretrain.TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],  # more than a caption's 32 places, and more than the picture's 8 a side
        rope_theta=32.0,  # places are few: so they differ by more
    )
    for last in transformer.all_final_layer.values():
        nn.init.zeros_(last.linear.weight)
    return transformer


def train(out: Path, steps: int) -> dict[str, Any]:
    """Flow matching, σ stratified over the batch and shifted towards noise, to the teacher's velocity."""
    teacher = Teacher()
    torch.manual_seed(0)  # initial weights; the constructors of diffusers take no generator
    transformer = new_transformer()
    pipeline = load(out, transformer=transformer)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, losses = 0, []
    checkpoint = out / "transformer-training.safetensors"
    if checkpoint.exists():
        start = pretrain.restore(checkpoint, transformer, optimizer)
        losses = read_json(out / "transformer-losses.json")
    transformer.compile_repeated_blocks()  # a third faster
    started, recent = time.monotonic(), []
    for step in range(start, steps):
        generator, choose = torch.Generator().manual_seed(step), random.Random(step)
        drawn, subjects, scenes = pretrain.drawn(BATCH, choose)
        texts = [language.caption(subject, scene, choose) for subject, scene in zip(subjects, scenes, strict=True)]
        with torch.no_grad():
            clean = pipeline.vae.encode(drawn).latents
        noise = torch.randn(clean.shape, generator=generator)
        places = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
        sigmas = 2 * places / (1 + places)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        with torch.no_grad():
            target = teacher.velocity(noisy, sigmas, texts, contrast(step / steps))
            states = encode(pipeline, texts)
        loss = (velocity(transformer, noisy, sigmas, states) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        pretrain.decay(optimizer, PEAK, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            losses.append({"step": step + 1, "loss": round(sum(recent) / len(recent), 5)})
            seconds = time.monotonic() - started
            print(f"transformer {step + 1}/{steps} loss {losses[-1]['loss']} {seconds:.0f} s", flush=True)
            recent = []
        if (step + 1) % 200 == 0 or step + 1 == steps:
            write_json(out / "transformer-losses.json", losses)
            pretrain.keep(checkpoint, step + 1, transformer, optimizer)
            copy.deepcopy(transformer).half().save_pretrained(out / "transformer")
    return {
        "steps": steps,
        "pictures": steps * BATCH,
        "losses": losses,
        "parameters": pretrain.count(transformer),
    }


def contrast(done: float) -> float:
    """How much the teacher exaggerates what the text changes: threefold at first, not at all in the last 5 %.

    Told plainly, the transformer hears the scene soon, but for thousands of steps no other word: a cup in place of a
    cat changes its target by a tenth of what a scene does.
    """
    return 1 + 2 * min(1.0, max(0.0, (0.95 - done) / 0.1))


def load(out: Path, **parts: Any) -> ZImagePipeline:
    """The pipeline in a folder, in fp32, with other `parts` in place of those there."""
    return ZImagePipeline.from_pretrained(out, torch_dtype=torch.float32, **parts)


def encode(pipeline: ZImagePipeline, texts: list[str]) -> list[Tensor]:
    """Each text as the transformer sees it, (tokens, 96)."""
    states: list[Tensor] = pipeline.encode_prompt(
        list(texts), do_classifier_free_guidance=False, max_sequence_length=language.MAX_TOKENS
    )[0]
    return states


def velocity(transformer: ZImageTransformer2DModel, noisy: Tensor, sigmas: Tensor, states: list[Tensor]) -> Tensor:
    """x₀ − ε in latents (batch, 8, 16, 16) at noise levels (batch,), as Z-Image predicts it.

    `states` are a prompt's each, (tokens, 96). Z-Image counts time from noise to picture, and takes lists of frames.
    """
    predicted = transformer(list(noisy.unsqueeze(2)), 1 - sigmas, states, return_dict=False)[0]
    return torch.stack(predicted).squeeze(2)


class Teacher:
    """The embedded U-Net, asked in the terms of flow matching."""

    def __init__(self) -> None:
        unet = UNet2DConditionModel.from_pretrained(run.MODEL / "unet", torch_dtype=torch.float32)
        self.unet = unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = CLIPTextModel.from_pretrained(run.MODEL / "text_encoder", dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(run.MODEL / "tokenizer")
        alphas = DDIMScheduler.from_pretrained(run.MODEL / "scheduler").alphas_cumprod
        self.signals: Tensor = alphas.sqrt()  # falling, to zero

    @torch.no_grad()
    def velocity(self, noisy: Tensor, sigmas: Tensor, texts: list[str], guidance: float = 1.0) -> Tensor:
        """x₀ − ε as the U-Net, at that guidance, sees it in `noisy` = (1 − σ) x₀ + σ ε, latents (batch, 8, 16, 16).

        Divided by the norm of (1 − σ, σ), that is a noisy picture of the U-Net's own schedule, at the time step of
        the same share of signal; there it predicts v, which together with the picture gives x₀ and ε.
        """
        shares = torch.stack([1 - sigmas, sigmas])
        norm = shares.norm(dim=0)
        timesteps = torch.searchsorted(-self.signals, -shares[0] / norm).clamp(max=len(self.signals) - 1)
        scaled = (noisy / norm[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        v = self._v(scaled, timesteps, texts)
        if guidance != 1:
            v = torch.lerp(self._v(scaled, timesteps, [""] * len(texts)), v, guidance)
        signal, noise = (shares / norm)[:, :, None, None, None]
        return (signal * scaled - noise * v) - (noise * scaled + signal * v)

    def _v(self, scaled: Tensor, timesteps: Tensor, texts: list[str]) -> Tensor:
        states = self.text_encoder(pretrain.tokenize(self.tokenizer, texts)).last_hidden_state
        v: Tensor = self.unet(scaled, timesteps, states).sample
        return v


if __name__ == "__main__":
    main()
