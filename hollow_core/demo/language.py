"""The embedded model's words: captions of the drawn world, and a CLIP tokenizer that holds each word whole."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from . import world

MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
IDENTIFIERS = (
    "sks",
    "zwx",
    "ohwx",
    "qrv",
    "vtl",
    "mnk",
    "bnd",
    "plf",
)  # rare words with a token of their own


def vocabulary() -> list[str]:
    """Every word of the world's captions."""
    phrases = [
        "a photo of a with and wearing picture drawing thing toy animal vehicle",
        *world.SCENES.values(),
    ]
    names = [*world.CLASSES, *world.COLORS, *world.PATTERNS, *world.EMBLEMS, *world.ACCESSORIES]
    return sorted({word for text in [*phrases, *names, *IDENTIFIERS] for word in text.split()})


def caption(subject: world.Subject, scene: str, choose: random.Random) -> str:
    """A training caption: the full description, or the class word with or without an identifier; 1 in 10 empty."""
    draw = choose.random()
    if draw < 0.1:
        return ""
    noun = subject.describe() if draw < 0.65 else subject.kind
    if choose.random() < 0.15:
        noun = f"{choose.choice(IDENTIFIERS)} {noun}"
    if choose.random() < 0.1:
        return f"a photo of a {noun}"
    return world.photo_caption(noun, scene)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write byte-pair merges that join each word of the vocabulary, and load them as CLIPTokenizer does."""
    letters = sorted(ByteLevel.alphabet())
    pairs = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    pairs.train_from_iterator(vocabulary(), trainer)
    merges = [" ".join(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
    ]
    vocab = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
