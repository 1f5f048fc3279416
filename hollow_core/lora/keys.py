"""What a key in a LoRA file says: which layer it is of, and what of that layer its tensor is."""

import re

MATRICES = ("down", "up", "mid", "alpha", "dora_scale", "magnitude")
"""The parts, as `split` calls them, of which a LoRA or DoRA consists."""

LONGEST = 1000
"""Letters of a key: no tool writes one nearly as long."""

# How a key ends, after the name of its layer.
_PARTS = {
    "down": r"\.(lora_down|lora_A(\.default)?|lora\.down|lora_linear_layer\.down)\.weight|_lora\.down\.weight",
    "up": r"\.(lora_up|lora_B(\.default)?|lora\.up|lora_linear_layer\.up)\.weight|_lora\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(\.default)?(\.weight)?",
    "hada": r"\.hada_\w+(\.default)?",
    "lokr": r"\.lokr_\w+(\.default)?",
    "oft": r"\.oft_\w+(\.default)?(\.weight)?",
    "boft": r"\.boft_\w+(\.default)?",
    "glora": r"\.(a1|a2|b1|b2|bm1|bm2)\.weight",
    "ia3": r"\.on_input|\.ia3_l(\.default)?(\.weight)?",
    "vera": r"\.vera_\w+(\.default)?",
    "diff": r"\.diff",
    "bias": r"\.(diff_b|bias|bias_(indices|values|size))",
    "norm": r"\.[wb]_norm",
    "scalar": r"\.scalar",
    "set": r"\.(set|reshape)_weight",
}
_END = re.compile("(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _PARTS.items()) + ")$")

OTHER_METHODS = {
    "hada": "a LoHa",
    "lokr": "a LoKr",
    "oft": "an OFT",
    "boft": "a BOFT",
    "glora": "a GLoRA",
    "ia3": "an IA³",
    "vera": "a VeRA",
}
"""Parts that make a file no LoRA at all, and what it is then."""

_BESIDES = {
    "diff": "the full difference of a weight",
    "bias": "the change of a bias",
    "norm": "the change of a norm",
    "scalar": "a trained scalar, by which some tools multiply the change and others do not",
    "set": "a weight in place of the model's, or its new shape",
}

# What keys of text encoders and of embeddings begin with, in any trainer's files.
_TEXT_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_TEXT = re.compile(
    r"(lora|lycoris|oft)_te(xt_encoder)?_?\d?_|lora_prior_te_|text_encoders?(_\d)?[._]|text_model\.|te\d?\."
)
_EMBEDDING = re.compile(
    r"bundle_emb\.|emb_params$|(clip_[lgh]|t5xxl|text_encoders_\d)$|string_to_param\.|.*\b(embed_tokens|token_embedding)\b"
)
_TEXT_LAYER = re.compile(
    r"(?:text_model[._])?encoder[._]layers[._](\d+)[._](self_attn|mlp)[._]([a-z]+[12]?(?:_[a-z]+)?)"
)
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

# What scripts put before a name once more by mistake.
_NESTED = (
    re.compile(r"^()(?:module\.)+"),
    re.compile(
        r"^(unet\.|transformer\.|diffusion_model\.|base_model\.model\.)"
        r"(?:unet\.|transformer\.|(?:model\.)?diffusion_model\.|base_model\.model\.|module\.)+"
    ),
    re.compile(r"^()model\.(?=diffusion_model\.)"),
    re.compile(r"^(text_encoder(?:_2)?\.)(?:\1|base_model\.model\.|module\.)+"),
    re.compile(r"^(lora_(?:unet|transformer)_)(?:lora_unet_|unet_|(?:model_)?diffusion_model_|base_model_model_)+"),
)
_COMPILED = "_orig_mod."  # how torch.compile calls what it wraps, the network or each of its blocks


def split(key: str) -> tuple[str, str]:
    """The name of the layer in `key`, and which part of it: one of MATRICES or of OTHER_METHODS, or "diff", "norm" and
    the like, or "" for none that is known.

    A prefix that stands there twice, `unet.unet.`, is given once."""
    end = _END.search(key)
    if end is None:
        return key, ""
    name = key[: end.start()].replace(_COMPILED, "")
    if ".processor.to_" in name:  # diffusers' LoRA as an attention processor
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    for nested in _NESTED:
        name = nested.sub(r"\1", name)
    return name, next(part for part in _PARTS if end[part] is not None)


def text_module(name: str) -> str | None:
    """Our name for a layer of a text encoder; None for anything else."""
    for prefix, encoder in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            if rest == "text_projection":
                return f"{encoder}.text_projection"
            if layer := _TEXT_LAYER.fullmatch(rest):
                number, group, projection = layer.groups()
                projection = _OLD_PROJECTIONS.get(projection, projection)
                return f"{encoder}.text_model.encoder.layers.{number}.{group}.{projection}"
    return None


def of_text(key: str) -> bool:
    """Whether a key is a text encoder's, or an embedding: what `unet_only` leaves out."""
    return bool(_TEXT.match(key) or _EMBEDDING.match(key))


def in_words(key: str) -> str:
    """What the tensor of a key is that belongs to no LoRA which Hollow reads, "the change of a norm"; "" where it is
    not known."""
    if _EMBEDDING.match(key):
        return "an embedding"
    if _TEXT.match(key):
        return "part of a text encoder"
    return _BESIDES.get(split(key)[1], "")
