"""ComfyUI's own loader on LoRA files of transformers: nothing is left over, and each weight changes by ΔW."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy.ldm.krea2", reason="COMFYUI_DIR names no checkout of ComfyUI 0.33.0 or later")

import comfy.lora
import comfy.memory_management
import comfy.sd
import comfy.supported_models as supported
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from tiny_transformers import SIZES
from torch import Tensor

from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import Lora, weight_shapes
from hollow_core.lora.file import write_dialect
from hollow_core.nets.families import FAMILIES

CHANGED: dict[str, dict[str, Any]] = {  # of the sizes, as ComfyUI derives some from others
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128},
    "krea2": {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "intermediate_size": 128},
}
THEIRS: dict[str, tuple[type, dict[str, Any]]] = {
    "flux": (
        supported.Flux,
        {
            **{"image_model": "flux", "guidance_embed": True, "in_channels": 4, "out_channels": 4, "patch_size": 2},
            **{"vec_in_dim": 10, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 4.0, "num_heads": 2},
            **{"depth": 2, "depth_single_blocks": 3, "axes_dim": [2, 2, 4], "theta": 10000, "qkv_bias": True},
            **{"txt_ids_dims": []},
        },
    ),
    "sd3": (
        supported.SD3,
        {
            **{"input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": 10},
            **{
                "context_embedder_config": {
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 12, "out_features": 128},
                }
            },
            **{"num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1]},
        },
    ),
    "z-image": (
        supported.Lumina2,
        {
            **{
                "image_model": "lumina2",
                "patch_size": 2,
                "in_channels": 4,
                "dim": 16,
                "n_layers": 4,
                "n_refiner_layers": 1,
            },
            **{"n_heads": 2, "n_kv_heads": 2, "multiple_of": 1, "ffn_dim_multiplier": 8 / 3, "qk_norm": True},
            **{"cap_feat_dim": 12, "axes_dims": [2, 2, 4], "axes_lens": [128, 32, 32], "z_image_modulation": True},
        },
    ),
    "qwen-image": (supported.QwenImage, {"image_model": "qwen_image", **SIZES["qwen-image"]}),
    "krea2": (
        supported.Krea2,
        {
            **{"image_model": "krea2", "features": 32, "tdim": 8, "txtdim": 12, "heads": 2, "kvheads": 1, "layers": 4},
            **{"channels": 4, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2},
        },
    ),
    "anima": (
        supported.Anima,
        {
            **{"image_model": "anima", "max_img_h": 32, "max_img_w": 32, "max_frames": 4, "in_channels": 4},
            **{"out_channels": 4, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 24, "num_blocks": 4},
            **{"num_heads": 2, "crossattn_emb_channels": 12, "pos_emb_cls": "rope3d", "use_adaln_lora": True},
            **{"adaln_lora_dim": 8},
        },
    ),
}
FILES = [
    (family.name, dialect)
    for family in FAMILIES.values()
    for dialect in dict.fromkeys((family.dialects[0], *({"kohya", "comfy"} & {*family.dialects})))
]


def their_places(name: str, model: ModelPatcher, modules: list[str]) -> dict[str, tuple[str, int | None]]:
    """{our module: their weight, and from which output on it is a part of that}, by their own tables."""
    config = model.model.model_config.unet_config
    tables = {
        "flux": comfy.utils.flux_to_diffusers,
        "sd3": comfy.utils.mmdit_to_diffusers,
        "z-image": comfy.utils.z_image_to_diffusers,
        "krea2": comfy.utils.krea2_to_diffusers,
    }
    if name == "anima":
        keys = [key for key in model.model.state_dict() if ".llm_adapter." not in key]
        theirs = {next(iter(_convert_non_diffusers_anima_lora_to_diffusers({key: 0}))): key for key in keys}
        return {module: (theirs[f"transformer.{module}.weight"], None) for module in modules}
    if name == "qwen-image":
        return {module: (f"diffusion_model.{module}.weight", None) for module in modules}
    found = tables[name](config, output_prefix="diffusion_model.")
    places = {module: found[f"{module}.weight"] for module in modules}
    return {m: (place, None) if isinstance(place, str) else (place[0], place[1][1]) for m, place in places.items()}


@pytest.mark.parametrize(("name", "dialect"), FILES)
def test_comfyui_changes_every_weight_by_what_the_file_says(
    name: str, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # under dynamic VRAM a layer has a weight only when a state dict gave it one, and here there is none
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)
    (family,) = (family for family in FAMILIES.values() if family.name == name)
    config = {**SIZES[name], **CHANGED.get(name, {}), "_class_name": family.network}
    generator = torch.Generator().manual_seed(0)
    lists = tuple(f"{blocks.path}." for blocks in family.blocks)
    ends = (*family.attention, *family.feed_forward)
    layers = {
        module: LoraLayer(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 3.0)
        for module, (out, into) in ((m, s) for m, s in weight_shapes(config).items() if m.startswith(lists))
        if module.endswith(ends)
    }
    lora = Lora(dialect, layers, {}, ())
    path = write_dialect(tmp_path / "a.safetensors", lora, config, {}, dialect=dialect, dtype=torch.float32).path
    kind, sizes = THEIRS[name]
    meta = torch.device("meta")
    made = kind(sizes)
    made.set_inference_dtype(torch.float32, None)
    model = ModelPatcher(made.get_model({}, device=meta), meta, meta)
    file = comfy.utils.load_torch_file(str(path))
    patches = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert {key for patch in patches.values() for key in patch.loaded_keys} == file.keys()
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 1.0)
    shapes = {key: weight.shape for key, weight in model.model.state_dict().items()}
    expected: dict[str, Tensor] = {}
    for module, (key, start) in their_places(name, model, list(layers)).items():
        change = layers[module].scale * layers[module].up @ layers[module].down
        whole = expected.setdefault(key, torch.zeros(shapes[key]))
        whole[start or 0 : (start or 0) + len(change)] += change
    assert patched.patches.keys() == expected.keys()
    for key, change in expected.items():
        found = comfy.lora.calculate_weight(patched.patches[key], torch.zeros(shapes[key]), key)
        assert torch.allclose(found, change, atol=1e-4), key
