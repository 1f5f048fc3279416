"""Those that are commands: diffusers' script and our own."""

import argparse
import sys
from pathlib import Path

from hollow_core.errors import HollowError

from .cost import Cost, run
from .prepare import PROMPT, RECORDS

ROOT = Path(__file__).parents[2]
SCRIPTS = {"sd15": "train_dreambooth_lora.py", "sdxl": "train_dreambooth_lora_sdxl.py"}


def script(options: argparse.Namespace, steps: int, folder: Path) -> Cost:
    """diffusers' DreamBooth with LoRA on attention. At its end it loads the model once more, which does not count."""
    path = options.diffusers_scripts.resolve() / SCRIPTS[options.layout]
    if not path.exists():
        raise HollowError(f"There is no {path.name} in the folder of scripts.")
    given = {
        "pretrained_model_name_or_path": options.model.resolve(),
        "instance_data_dir": options.images.resolve(),
        "instance_prompt": PROMPT,
        "output_dir": folder,
        "resolution": options.resolution,
        "rank": options.rank,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "mixed_precision": "no" if options.precision == "fp32" else "bf16",
    }
    command = [options.python, path, *(word for name, value in given.items() for word in (f"--{name}", value))]
    if options.layout == "sd15":
        command.append("--pre_compute_text_embeddings")  # SDXL's script does so by itself
    return run(command, folder, folder / "log", (folder / "pytorch_lora_weights.safetensors").exists)


def hollow(cut: int, options: argparse.Namespace, steps: int, folder: Path) -> Cost:
    """`hollow train`."""
    given = {
        "images": options.images.resolve(),
        "subject": "dog",
        "out": folder,
        "cut": cut,
        "resolution": options.resolution,
        "samples": RECORDS,
        "rank": options.rank,
        "steps": steps,
        "precision": options.precision,
    }
    start = [sys.executable, "-c", "from hollow_core.cli import main; main()", "train", options.model.resolve()]
    command = [*start, *(word for name, value in given.items() for word in (f"--{name}", value))]
    return run(command, ROOT, folder / "log", (folder / "lora.safetensors").exists)
