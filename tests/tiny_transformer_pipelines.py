"""A whole pipeline of every family of transformers, of tiny random parts, as a diffusers folder."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from tiny_transformers import tiny_transformer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from hollow_core.models.single_file import quiet

SIDE = 128
"""Native pixels."""

WIDTH = 12
"""Of a prompt's token."""

SIZES = {"base_image_seq_len": 16, "max_image_seq_len": (SIDE // 16) ** 2}
STATIC = {"shift": 3.0, **SIZES}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, **STATIC}
CHAT = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}<assistant>"


def save_tiny_pipeline(name: str, folder: Path) -> Path:
    """Random but always the same, for 128 pixels."""
    network = tiny_transformer(name).module  # skips where diffusers has none
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        parts = {"transformer": network, **PARTS[name]()}
        if name == "anima":
            pipeline = diffusers.AnimaAutoBlocks().init_pipeline()
            pipeline.update_components(**parts)
        else:
            family = {"flux": "Flux", "sd3": "StableDiffusion3", "z-image": "ZImage"}.get(name)
            kind = family or {"qwen-image": "QwenImage", "krea2": "Krea2"}[name]
            pipeline = getattr(diffusers, f"{kind}Pipeline")(**parts)
        pipeline.save_pretrained(str(folder))
    return folder


def of_transformers(name: str) -> Any:
    """A class of a family's text encoder; skips where transformers has none."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def tiny_tokenizer(tokens: int = 64) -> PreTrainedTokenizerFast:
    """A token a byte."""
    words = ["<pad>", "<end>", "<user>", "<assistant>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({word: number for number, word in enumerate([*words, *alphabet])}, []))
    core.add_special_tokens([AddedToken(word) for word in words])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=tokens,
        chat_template=CHAT,
        padding_side="right",
    )


VOCABULARY = 262


def _flux() -> dict[str, Any]:
    return {
        "vae": _vae(0.3611, 0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC, max_shift=1.15),
        "text_encoder": CLIPTextModel(_clip(10)).eval(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": T5EncoderModel(_t5()).eval(),
        "tokenizer_2": tiny_tokenizer(),
    }


def _sd3() -> dict[str, Any]:
    return {
        "vae": _vae(1.5305, 0.0609),
        "scheduler": FlowMatchEulerDiscreteScheduler(**STATIC),
        "text_encoder": CLIPTextModelWithProjection(_clip(4)).eval(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(6)).eval(),
        "tokenizer_2": tiny_tokenizer(),
        "text_encoder_3": T5EncoderModel(_t5()).eval(),
        "tokenizer_3": tiny_tokenizer(),
    }


def _z_image() -> dict[str, Any]:
    return {
        "vae": _vae(0.3611, 0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(**STATIC),
        "text_encoder": _qwen3(),
        "tokenizer": tiny_tokenizer(),
    }


def _qwen_image() -> dict[str, Any]:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = of_transformers("Qwen2_5_VLConfig")(text_config=text, vision_config=vision)
    return {
        "vae": _film_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC, max_shift=0.9, shift_terminal=0.02),
        "text_encoder": of_transformers("Qwen2_5_VLForConditionalGeneration")(config).eval(),
        "tokenizer": tiny_tokenizer(1024),
    }


def _krea2() -> dict[str, Any]:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"deepstack_visual_indexes": [0]}
    config = of_transformers("Qwen3VLConfig")(text_config=text, vision_config=vision)
    return {
        "vae": _film_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC, max_shift=1.15),
        "text_encoder": of_transformers("Qwen3VLModel")(config).eval(),
        "tokenizer": tiny_tokenizer(512),
        "text_encoder_select_layers": (0, 2, 3),
    }


def _anima() -> dict[str, Any]:
    return {
        "vae": _film_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**STATIC),
        "text_encoder": _qwen3(),
        "tokenizer": tiny_tokenizer(),
        "t5_tokenizer": tiny_tokenizer(),
        "text_conditioner": diffusers.AnimaTextConditioner(
            source_dim=WIDTH,
            target_dim=WIDTH,
            model_dim=WIDTH,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=VOCABULARY,
            min_sequence_length=48,
        ).eval(),
    }


PARTS = {
    "flux": _flux,
    "sd3": _sd3,
    "z-image": _z_image,
    "qwen-image": _qwen_image,
    "krea2": _krea2,
    "anima": _anima,
}


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=width,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
    )


def _t5() -> T5Config:
    return T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=16, num_heads=2, num_layers=2)


def _qwen3() -> Any:
    config = of_transformers("Qwen3Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    return of_transformers("Qwen3Model")(config).eval()


def _vae(scaling: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[4, 4, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _film_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 2.0, 2.5, 3.0],
    ).eval()
