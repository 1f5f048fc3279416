"""All that we want to know of a GPU: `python -m benchmarks.gpu --out DIR`, about eight minutes of an H100.

SD2.1's shape at 512 pixels and SDXL's at 1024, with random weights: the peak of each stage beside its prediction,
milliseconds of a training step with each lever and what of it is spent outside of the U-Net, records a second, a
sampler's step on one path and on two; the demo's scores beside a CPU's, and whether a seed gives the same LoRA twice;
the whole road; and what becomes of a training whose memory runs out. The smallest come first. Each measurement is a
JSON file in a folder of DIR that is named by the GPU, and what is there is not measured again: so a stopped run goes
on. Predictions are made by other processes meanwhile. Without a GPU it runs all the same, for hours (`--tiny` for
minutes), and says nothing.
"""

import argparse
import os
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out import kept
from benchmarks.road import RECORDS, SETTINGS
from hollow_core.demo import run
from hollow_core.files import write_bytes, write_json
from hollow_core.memory import dry_run
from hollow_core.memory.planner import STAGES
from hollow_core.memory.setting import Setting
from hollow_core.training.settings import TrainSettings

from . import demo
from .measurement import HEAD, Found, Measurement, at_most, near_prediction, within
from .memory import BESIDE_TRAINING, begin_predicting, free, measure_beside_training, predicted, workspace
from .models import Shape
from .out_of_memory import BEFORE, STEPS, measure_out_of_memory
from .road import measure_road
from .speed import Extent, measure_precompute, measure_sampling, measure_training

MIB = 2**20

HALF = SETTINGS["k=3, bf16"]
FOUR = replace(HALF, training=replace(HALF.training, batch=4))
LOW = SETTINGS["k=3, bf16, checkpointing, streamed"]
OWN = {
    "k=3, bf16, rank 128": replace(HALF, training=replace(HALF.training, rank=128)),
    "k=3, rank 128": Setting(3, training=TrainSettings(rank=128)),
    "plain, rank 128": Setting(None, training=TrainSettings(rank=128)),
    "k=3, bf16, 4 records": FOUR,
    "k=3, bf16, 4 records together": replace(FOUR, training=replace(FOUR.training, together=4)),
    "k=3, bf16, 8 together": replace(HALF, training=replace(HALF.training, together=8)),
    "k=3, bf16, class pictures": replace(HALF, class_images=1),
    "k=3, bf16, checkpointing, streamed, tiled VAE, class pictures": replace(LOW, tiled_vae=True, class_images=1),
}
ALL = {name: replace(setting, samples=RECORDS) for name, setting in (SETTINGS | OWN).items()}
"""{name: setting} of rank 16, where it says no other."""

OF_STEPS: dict[str, list[tuple[float | None, str]]] = {
    "k=3": [(0.8, "plain")],
    "k=5": [(None, "plain")],
    "k=3, bf16": [(0.8, "plain, bf16")],
    "k=5, bf16": [(None, "plain, bf16")],
    "k=3, bf16, streamed": [(2.0, "k=3, bf16")],
    "k=3, bf16, checkpointing, streamed": [(2.0, "k=3, bf16, checkpointing")],
    "k=3, bf16, 4 records together": [(None, "k=3, bf16, 4 records")],
    **{
        f"k=3, bf16, {lever}": [(None, "k=3, bf16")]
        for lever in ("checkpointing", "8-bit base", "4-bit base", "bf16 LoRA", "fused backward", "8-bit AdamW")
    },
}
"""{setting: a training step takes at most so many times that of another}; None for a ratio that is no goal."""

LEVERS = (
    *("k=3, bf16, checkpointing", "k=3, bf16, 8-bit base", "k=3, bf16, 4-bit base", "k=3, bf16, streamed"),
    *("k=3, bf16, checkpointing, streamed", "k=3, bf16, 4 records", "k=3, bf16, 4 records together"),
)
OF_THE_LORA = ("k=3, bf16, rank 128", "k=3, bf16, bf16 LoRA", "k=3, bf16, fused backward", "k=3, bf16, 8-bit AdamW")
BESIDE = {
    "sd21": ("k=3, bf16", "k=3", "k=3, bf16, 8-bit base", "k=3, bf16, 4-bit base", "k=3, bf16, streamed"),
    "sdxl": ("k=3, bf16", "k=3, bf16, 8-bit base", "k=3, bf16, streamed"),
}
"""The settings whose stages beside training are measured: checkpointing and rank change nothing there."""

TRAINED = {
    "sd21": (
        *("plain, bf16", "k=3, bf16", "k=5, bf16", "plain", "k=3", "k=5", *LEVERS),
        *(*OF_THE_LORA, "plain, rank 128", "k=3, rank 128"),
    ),
    "sdxl": ("plain, bf16", "k=3, bf16", "k=5, bf16", *LEVERS, "k=3, bf16, rank 128", "plain", "k=3"),
}
ROADS = {
    "sd21": "k=3, bf16, class pictures",
    "sdxl": "k=3, bf16, checkpointing, streamed, tiled VAE, class pictures",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-gpu"), help="folder for the results")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which nothing new begins (480)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="those whose names hold one of these")
    parser.add_argument("--list", action="store_true", help="measure nothing: print the names")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try this script without a GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    found = Found(options.out / re.sub(r"\W+", "-", f"{name} tiny" if options.tiny else name))
    todo = [
        each for each in measurements(found.folder, options.tiny) if any(text in each.name for text in options.only)
    ]
    if options.list:
        print("\n".join(each.name for each in todo))
        return
    measure_all(todo, found, device, name, time.monotonic() + options.budget)


def measurements(folder: Path, tiny: bool) -> list[Measurement]:
    """All of them, in their order; `folder` is for the demo."""
    extent = Extent(1, 1, 8, 6, 1) if tiny else Extent()
    learning = replace(run.SETTINGS, steps=2) if tiny else run.SETTINGS
    shapes = [Shape("sd21", tiny), Shape("sdxl", tiny)]
    return [
        *(each for shape in shapes for each in of_a_shape(shape, extent)),
        Measurement(
            "out of memory",
            partial(measure_out_of_memory, shapes[0]),
            (within({"steps in the checkpoint": BEFORE, "steps in the end": STEPS, "a LoRA in the end": 1}, 0),),
        ),
        Measurement("demo", partial(demo.measure_scores, folder / "demo", learning), (within(demo.ON_A_CPU, 0.03),)),
        Measurement(
            "demo twice",
            partial(demo.measure_repetition, folder / "demo", learning),
            (within({"largest difference": 0}, 0),),
        ),
        *(whole_road(shape) for shape in shapes),
    ]


def of_a_shape(shape: Shape, extent: Extent) -> list[Measurement]:
    """Memory, then training, precomputing and drawing."""
    layout, drawing = shape.layout, f"{shape.layout} drawing on"
    return [
        *(
            Measurement(
                f"{layout} beside training {name}",
                partial(measure_beside_training, shape, ALL[name]),
                (near_prediction,),
                partial(predicted, shape, ALL[name], BESIDE_TRAINING),
            )
            for name in BESIDE[layout]
        ),
        *(
            Measurement(
                f"{layout} training {name}",
                partial(measure_training, shape, ALL[name], extent),
                (
                    near_prediction,
                    within({"waits a step": 1}, 0),
                    *(at_most("step, ms", most, f"{layout} training {of}") for most, of in OF_STEPS.get(name, ())),
                ),
                partial(predicted, shape, ALL[name], ("train",)),
            )
            for name in TRAINED[layout]
        ),
        *(
            Measurement(
                f"{layout} precompute {name}",
                partial(measure_precompute, shape, ALL[name], extent),
                (near_prediction,),
                partial(predicted, shape, ALL[name], ("precompute",)),
            )
            for name in ("k=3, bf16", "k=3, bf16, 8 together")
        ),
        *(
            Measurement(
                f"{drawing} {paths}",
                partial(measure_sampling, shape, HALF, refresh, extent),
                () if refresh is None else (at_most("sampler step, ms", most, f"{drawing} one path"),),
            )
            for paths, refresh, most in (
                ("one path", None, None),
                ("two paths", 1, None),
                ("two paths, refresh 2", 2, None),
                ("two paths, refresh 3", 3, 1.1),
            )
        ),
    ]


def whole_road(shape: Shape) -> Measurement:
    """From pictures to a picture."""
    name = ROADS[shape.layout]
    setting = replace(ALL[name], training=replace(ALL[name].training, steps=10))
    return Measurement(
        f"{shape.layout} whole road {name}",
        partial(measure_road, shape, setting),
        (near_prediction,),
        partial(predicted, shape, setting, STAGES),
    )


def measure_all(todo: Sequence[Measurement], found: Found, device: torch.device, name: str, end: float) -> None:
    """What is not measured yet, as long as there is time, and the table; predictions meanwhile."""
    of_cublas = workspace(device) if device.type == "cuda" else dry_run.WORKSPACE
    about = _about(device, name, of_cublas)
    missing: list[str] = []
    print(f"{about}\n\n{HEAD}", flush=True)
    with _predicting(todo, found, of_cublas) as predictions:
        for each in todo:
            if not found.path(each.name).exists():
                trouble = "no time left" if time.monotonic() > end else _measure(each, found, device)
                if trouble:
                    missing.append(f"{each.name}: {trouble}")
                    print(f"| {each.name} | {trouble} | | | |", flush=True)
            print("".join(f"{line}\n" for line in each.lines(found)), end="", flush=True)
        done = wait(predictions, timeout=max(end - time.monotonic(), 0)).done
        missing += [f"prediction of {predictions[one]}: {_one_line(e)}" for one in done if (e := one.exception())]
    lines = [about, "", HEAD, *(line for each in todo for line in each.lines(found))]
    lines += ["", *(f"- {each}" for each in missing)] if missing else []
    write_bytes(found.folder / "TABLE.md", "\n".join([*lines, ""]).encode())
    print(f"\nWith all predictions, also in {found.folder / 'TABLE.md'}:\n\n" + "\n".join(lines), flush=True)


@contextmanager
def _predicting(todo: Sequence[Measurement], found: Found, of_cublas: int) -> Iterator[dict[Future[Any], str]]:
    """While inside, half of the cores predict what is not predicted yet; gives what is under way."""
    cores, spawn = max((os.cpu_count() or 1) // 2, 1), get_context("spawn")
    pool = ProcessPoolExecutor(cores, spawn, initializer=begin_predicting, initargs=(of_cublas,))
    try:
        yield {
            pool.submit(kept, found.predicted_path(each.name), each.predict): each.name
            for each in todo
            if each.predict is not None and not found.predicted_path(each.name).exists()
        }
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(measurement: Measurement, found: Found, device: torch.device) -> str | None:
    """Its figures are in their file then; or what went wrong, in a line."""
    began = time.monotonic()
    try:
        free(device)  # which fails, too, where a device is broken
        left = torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else 0.0
        figures = measurement.measure(device)
    except Exception as error:  # whatever it is, the next one goes on
        write_bytes(found.trouble_path(measurement.name), traceback.format_exc().encode())
        return _one_line(error)
    figures["(took, s)"] = time.monotonic() - began
    if left > 1:
        figures["left over from before, MiB"] = left  # which its peaks hold, too
    write_json(found.path(measurement.name), figures)
    return None


def _about(device: torch.device, name: str, of_cublas: int) -> str:
    libraries = ", ".join(f"{each} {version(each)}" for each in ("torch", "diffusers", "peft", "transformers"))
    if device.type != "cuda":
        return f"{name}: there are no peaks, and times say nothing. {libraries}."
    total = torch.cuda.get_device_properties(device).total_memory / MIB
    return (
        f"{name}, {total:.0f} MiB, CUDA {torch.version.cuda}, cuBLAS takes {of_cublas / MIB:.1f} MiB a thread. "
        f"{libraries}."
    )


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}".replace("|", "/")


if __name__ == "__main__":
    main()
