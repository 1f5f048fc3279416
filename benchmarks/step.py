"""Time and peak memory of a training step, hollowed against plain LoRA: `python -m benchmarks.step --layout sd15`.

The U-Net has the true shape and random weights. Each kind runs in a process of its own, on the GPU if there is one;
memory is that process's (or the GPU's) peak while training, weights included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from hollow_core.blocks import LAYOUTS, layout_config
from hollow_core.hollow import Conditioning, hollow
from hollow_core.meter import Meter
from hollow_core.precompute import Example, precompute
from hollow_core.train import TrainSettings, train

KINDS = ("plain", "hollowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=[layout for layout in LAYOUTS if layout != "sdxl"], default="sd15")
    parser.add_argument("--size", type=int, default=64, help="latent height and width (default 64, 512 pixels)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--cut", type=int, default=3, help="cut of the hollowed U-Net (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="steps to time, after one that is not (default 5)")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, None if options.one == "plain" else options.cut)))
        return
    figures: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--one", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[kind] = json.loads(output.splitlines()[-1])
        print(kind, figures[kind], flush=True)
    plain, hollowed = (figures[kind] for kind in KINDS)
    for name in plain:
        print(f"{name}: hollowed / plain = {hollowed[name] / plain[name]:.3f}")


def measure(options: argparse.Namespace, cut: int | None) -> dict[str, float]:
    """Seconds a step (median) and peak GiB of `train` at batch 1, fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = layout_config(options.layout)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, config["in_channels"], options.size, options.size)
    prompt = Conditioning(torch.randn(1, 77, config["cross_attention_dim"], generator=generator))
    example = Example(
        torch.randn(shape, generator=generator), prompt, prompt, "a photo of a sks dog", "a photo of a dog"
    )
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with tempfile.TemporaryDirectory() as folder:
        store = precompute(unet, schedule, [example], Path(folder) / "store", cut=cut, samples=4)
        if cut is not None:
            unet = hollow(unet, cut, {record.timestep for record in store.records})
        meter, moments = Meter(device), [0.0]
        with meter.stage("train") as stage:
            settings = TrainSettings(rank=options.rank, steps=options.steps + 1)
            train(unet, schedule, store, settings, folder=folder, progress=lambda _: moments.append(time.monotonic()))
    seconds = sorted(after - before for before, after in pairwise(moments[1:]))
    return {"seconds_a_step": round(seconds[len(seconds) // 2], 3), "peak_GiB": round(stage.peak_bytes / 2**30, 3)}


if __name__ == "__main__":
    main()
