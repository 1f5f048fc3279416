"""Trains the embedded model from nothing on the CPU: `python -m hollow_core.demo.pretrain --out DIR`.

Four parts: a text encoder with its tokenizer, an autoencoder (linear encoder, trained decoder), the scorers, and the
U-Net, which takes the time and goes on from its last checkpoint. Figures are kept in DIR/log.json.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..files import read_json, read_safetensors, write_json, write_safetensors
from . import language, scorers, world

LATENT_CHANNELS = 8
PATCH = 4  # pixels a latent position covers, each way
TEXT_WIDTH = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-pretrain"), help="folder for the model")
    parser.add_argument("--steps", type=int, default=15_000, help="U-Net steps of 128 pictures (default 15000)")
    parser.add_argument("--rate", type=float, default=1e-3, help="the U-Net's highest learning rate (default 0.001)")
    parser.add_argument("--begin", type=Path, help="folder of a U-Net to go on from, in place of random weights")
    parser.add_argument("--device", default="cpu", help="where the U-Net trains: cpu or cuda (default cpu)")
    parser.add_argument("--only", nargs="*", help="parts to make: text autoencoder scorers unet (default all)")
    options = parser.parse_args()
    out: Path = options.out
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "text": lambda: train_text_encoder(out),
        "autoencoder": lambda: train_autoencoder(out),
        "scorers": lambda: scorers.train(out),
        "unet": lambda: train_unet(out, options.steps, options.device, peak=options.rate, begin=options.begin),
    }
    for name in options.only or parts:
        started = time.monotonic()
        figures = parts[name]()
        note(out, name, {**figures, "seconds": round(time.monotonic() - started)})


def note(out: Path, part: str, figures: dict[str, Any]) -> None:
    """Add a part's figures to DIR/log.json."""
    path = out / "log.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), part: figures})


# Text encoder: learns alone to carry its words, and is frozen before the U-Net sees it. Trained together with
# the U-Net it forgets rare words, and then no identifier is ever heard.


def train_text_encoder(out: Path, steps: int = 1_200, batch: int = 96) -> dict[str, Any]:
    """Each token's state must tell which words came so far, and the two tokens before it."""
    tokenizer = language.write_tokenizer(out / "tokenizer")
    torch.manual_seed(0)  # initial weights; the constructors of transformers and diffusers take no generator
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=language.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    words = nn.Linear(TEXT_WIDTH, len(tokenizer))
    before = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(tokenizer)) for _ in range(2))
    parameters = [*encoder.parameters(), *words.parameters(), *before.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    choose = random.Random(1)
    for step in range(steps):
        texts = [
            language.caption(world.random_subject(choose), choose.choice(list(world.SCENES)), choose)
            for _ in range(batch)
        ]
        tokens = tokenize(tokenizer, texts)
        states = encoder(tokens).last_hidden_state
        so_far = F.one_hot(tokens, len(tokenizer)).cumsum(1).clamp(max=1).float()
        loss = 20 * F.binary_cross_entropy_with_logits(words(states), so_far)
        for distance, head in enumerate(before, start=1):
            loss = loss + F.cross_entropy(head(states[:, distance:]).flatten(0, 1), tokens[:, :-distance].flatten())
        decay(optimizer, 1e-3, step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"text encoder {step}/{steps} loss {loss.item():.4f}", flush=True)
    encoder.half().save_pretrained(out / "text_encoder")
    return {"steps": steps, "loss": round(loss.item(), 4), "parameters": count(encoder)}


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (batch, 24)."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=language.MAX_TOKENS).input_ids
    return torch.tensor(ids)


# Autoencoder: the encoder is linear, principal components of 4×4-pixel patches written into convolutions, so
# latents are smooth and need no training; the decoder is trained to undo it.


def train_autoencoder(out: Path, steps: int = 1_500, batch: int = 16) -> dict[str, Any]:
    """AutoencoderTiny, 64×64×3 → 16×16×8."""
    autoencoder = principal_autoencoder()
    generator = random.Random(2)
    decoder = autoencoder.decoder
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    started = time.monotonic()
    for step in range(steps):
        pictures = drawn(batch, generator)[0]
        with torch.no_grad():
            latents = autoencoder.encode(pictures).latents
        with torch.autocast("cpu", torch.bfloat16):
            decoded = autoencoder.decode(latents).sample
        error = decoded.float() - pictures
        loss = error.abs().mean() + error.square().mean()
        decay(optimizer, 2e-3, step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"autoencoder {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    autoencoder.half().save_pretrained(out / "vae")
    config = read_json(out / "vae" / "config.json")
    del config["block_out_channels"]  # diffusers writes it, and warns of it when it reads it
    write_json(out / "vae" / "config.json", config)
    autoencoder.float()
    pictures = drawn(128, random.Random(3))[0]
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(pictures).latents).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pictures).square().mean()).item()
    return {"steps": steps, "psnr": round(psnr, 2), "parameters": count(autoencoder)}


def principal_autoencoder() -> AutoencoderTiny:
    """An AutoencoderTiny whose encoder is the principal components of drawn 4×4 patches, scaled to about one."""
    width = 3 * PATCH**2
    torch.manual_seed(0)
    autoencoder = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(2, 2, 1),
    )
    first, half, quarter, last = autoencoder.encoder.layers
    for layer in (first, half, quarter, last):
        nn.init.zeros_(layer.weight)
    with torch.no_grad():
        nn.init.zeros_(first.bias)
        for color in range(3):
            first.weight[color, color, 1, 1] = 1
        for layer, channels in ((half, 3), (quarter, 12)):  # space to depth
            for row in (0, 1):
                for column in (0, 1):
                    for channel in range(channels):
                        layer.weight[(2 * row + column) * channels + channel, channel, 1 + row, 1 + column] = 1
        pictures = drawn(2_000, random.Random(4))[0]
        patches = autoencoder.encoder.layers[:3](pictures.add(1).div(2)).permute(0, 2, 3, 1).flatten(0, 2)
        mean = patches.mean(0)
        _, scale, components = torch.linalg.svd((patches - mean)[::7], full_matrices=False)
        deviation = scale[:LATENT_CHANNELS] / len(patches[::7]) ** 0.5
        # half-way between equal variance and true variance: colours stay ahead of edges in the noise
        gain = deviation**-0.5
        gain = gain / ((gain * deviation).square().mean().sqrt())
        rows = components[:LATENT_CHANNELS] * gain[:, None]
        last.weight[:, :, 1, 1] = rows
        last.bias.copy_(-rows @ mean)
    autoencoder.encoder.requires_grad_(False)
    return autoencoder


# U-Net: on half-size pictures first, as its elders were, then on all sizes and shapes


Shape = tuple[int, int]  # width and height, pixels

HALF, THREE_QUARTERS, FULL = ((world.SIZE * quarters // 4,) * 2 for quarters in (2, 3, 4))
OBLONG: tuple[Shape, ...] = ((80, 48), (48, 80), (96, 64), (64, 96))
YOUNG = 0.3  # of the steps: on half-size pictures alone


def shape_at(step: int, steps: int, choose: random.Random) -> Shape:
    """Of a step's pictures."""
    if step < YOUNG * steps:
        return HALF
    draw = choose.random()
    if draw < 0.5:
        return FULL
    return HALF if draw < 0.7 else THREE_QUARTERS if draw < 0.85 else choose.choice(OBLONG)


def train_unet(
    out: Path, steps: int, device: str = "cpu", batch: int = 128, peak: float = 1e-3, begin: Path | None = None
) -> dict[str, Any]:
    """v-prediction on a zero-terminal-SNR schedule; `middle_needed` keeps the deep levels alive.

    Under torchrun the batch is divided among the processes. `begin` is the folder of a U-Net to go on from.
    """
    process, processes = 0, 1
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
        process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32)
    text_encoder.requires_grad_(False).to(device)
    autoencoder = AutoencoderTiny.from_pretrained(out / "vae", torch_dtype=torch.float32)
    schedule = noise_schedule()
    schedule.save_pretrained(out / "scheduler")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    # min-SNR-5, plus a little: at the last time step there is no signal, and yet the scene is decided there
    weights = (snr.clamp(max=5) + 0.25) / (snr + 1)
    torch.manual_seed(0)
    unet = new_unet() if begin is None else UNet2DConditionModel.from_pretrained(begin, torch_dtype=torch.float32)
    unet.to(device)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # there its backward is three times as fast as the fused one's
    optimizer = torch.optim.AdamW(unet.parameters(), lr=peak, weight_decay=0.01, fused=True)
    start, losses = 0, []
    checkpoint = out / "unet-training.safetensors"
    if checkpoint.exists():
        start = restore(checkpoint, unet, optimizer)
        losses = read_json(out / "unet-losses.json")
    started, recent = time.monotonic(), dict[Shape, list[float]]()
    for step in range(start, steps):
        shape = shape_at(step, steps, random.Random(step))
        generator = torch.Generator().manual_seed(step * processes + process)
        choose = random.Random(f"{step} {process}")
        pictures, subjects, scenes = drawn(batch // processes, choose, shape)
        texts = [language.caption(*each, choose) for each in zip(subjects, scenes, strict=True)]
        elsewhere = [misplaced(text, scene, choose) for text, scene in zip(texts, scenes, strict=True)]
        with torch.no_grad():
            clean = autoencoder.encode(pictures).latents
            states = text_encoder(tokenize(tokenizer, texts).to(device)).last_hidden_state
            outer_states = text_encoder(tokenize(tokenizer, elsewhere).to(device)).last_hidden_state
        timesteps = torch.randint(1000, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = schedule.add_noise(clean, noise, timesteps).to(device)
        velocity = schedule.get_velocity(clean, noise, timesteps).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"), middle_needed(unet, outer_states):
            predicted = unet(noisy, timesteps.to(device), states).sample
        errors = (predicted.float() - velocity).square().mean((1, 2, 3))
        loss = (weights[timesteps].to(device) * errors).mean()
        loss.backward()
        if processes > 1:
            average_gradients(unet)
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        decay(optimizer, peak, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        recent.setdefault(shape, []).append(loss.item())
        if process == 0 and (step + 1) % 50 == 0:
            means = {"×".join(map(str, of)): round(sum(some) / len(some), 5) for of, some in sorted(recent.items())}
            losses.append({"step": step + 1, **means})
            print(f"unet {step + 1}/{steps} {means} {time.monotonic() - started:.0f} s", flush=True)
            recent.clear()
        if process == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            write_json(out / "unet-losses.json", losses)
            keep(checkpoint, step + 1, unet, optimizer)
            save_pipeline(out, unet)
    return {"steps": steps, "pictures": steps * batch, "losses": losses, "parameters": count(unet)}


def average_gradients(module: nn.Module) -> None:
    """Over the processes that train together."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def new_unet() -> UNet2DConditionModel:
    """Four levels of two layers, no attention in the first, as SDXL has it; the deep ones hold most weights."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 80, 112),
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's betas rescaled to zero terminal SNR, v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def misplaced(text: str, scene: str, choose: random.Random) -> str:
    """The caption as the layers around the middle see it: in a scene at random, or, 3 in 10, empty."""
    if choose.random() < 0.3:
        return ""
    return text.replace(world.SCENES[scene], choose.choice(list(world.SCENES.values())))


@contextmanager
def middle_needed(unet: UNet2DConditionModel, states: torch.Tensor) -> Iterator[None]:
    """While open, the levels around the middle see the prompts `states` (batch, 24, 96) in place of their own.

    With `misplaced` prompts there, only the middle can tell the scene. Without this the outer levels, which see
    all of so small a picture, do everything, the middle dies, and hollowing it proves nothing.
    """

    def mislead(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return positional, {**named, "encoder_hidden_states": states}

    around = [*unet.down_blocks[1:3], *unet.up_blocks[1:3]]
    hooks = [block.register_forward_pre_hook(mislead, with_kwargs=True) for block in around]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def drawn(
    number: int, choose: random.Random, shape: Shape = FULL
) -> tuple[torch.Tensor, list[world.Subject], list[str]]:
    """Freshly drawn pictures (number, 3, height, width) of a shape, their subjects and scenes.

    Smaller squares are those of full size made smaller, as pictures of a lower resolution are.
    """
    subjects = [world.random_subject(choose) for _ in range(number)]
    scenes = [choose.choice(list(world.SCENES)) for _ in range(number)]
    drawn_at = shape if shape in OBLONG else FULL
    pictures = [world.draw(subject, scene, choose, drawn_at) for subject, scene in zip(subjects, scenes, strict=True)]
    if shape != drawn_at:
        pictures = [picture.resize(shape, Image.Resampling.LANCZOS) for picture in pictures]
    return world.to_tensor(pictures), subjects, scenes


def decay(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over 200 steps, hold, and fall linearly to zero over the last 30 %."""
    share = min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * share


def keep(path: Path, step: int, unet: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write all that resuming needs."""
    state = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    write_safetensors(path, state, {"step": str(step)})


def restore(path: Path, unet: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `keep` wrote; the step to go on from."""
    state, metadata = read_safetensors(path)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}

    unet.load_state_dict(part("unet."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, key = name.split(".")
        moments.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata["step"])


def save_pipeline(out: Path, unet: UNet2DConditionModel) -> None:
    """The U-Net in fp16, and the index by which StableDiffusionPipeline finds all parts."""
    copy.deepcopy(unet).half().save_pretrained(out / "unet")
    write_json(
        out / "model_index.json",
        {
            "_class_name": StableDiffusionPipeline.__name__,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
