"""`python -m benchmarks.paper --out DIR`: trains what is not trained yet, then writes DIR/RESULTS.md.

The main ways are trained on all held-out subjects, what can be given up and the wider tables on the first six. It
takes hours on two cores; `--quick` takes minutes and says little. A stopped run goes on. `--jobs` processes train at
once, each on one core and another subject; several machines may share DIR, each with its own `--subjects`.
"""

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import held_out
from hollow_core.demo import world

from . import results
from .figures import Measured
from .predictions import predictions
from .trial import Extent, most_changed
from .units import Unit, run_unit
from .ways import GIVING_UP, LEARNING, LORA, MAIN, QUICK, WAYS, Way

EVERYONE = range(len(world.HELD_OUT))
PARTS: dict[str, tuple[Sequence[Way], range]] = {
    "main": (MAIN, EVERYONE),
    "giving-up": (GIVING_UP, held_out.WIDER),
    "wider": (WAYS, held_out.WIDER),
}
"""Which ways, and on which subjects. Those of the wider tables alone have more than one seed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("hollow-paper"), help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (default all)")
    parser.add_argument("--subjects", type=int, nargs="+", default=EVERYONE, choices=EVERYONE, help="which to train")
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS], help="which, such as lora-r16-s300")
    parser.add_argument(
        "--steps", type=int, default=Extent().steps, help="of each training (default half of the demo's)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each in the wider tables")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train at once")
    parser.add_argument("--quick", action="store_true", help="one subject and seed, some of the ways, few steps")
    parser.add_argument("--report", action="store_true", help="train nothing: write what is there")
    options = parser.parse_args()
    extent = Extent(steps=60, distill_steps=20) if options.quick else Extent(steps=options.steps)
    held_out.keep_alike(options.out, asdict(extent))
    if not options.report:
        units = [Unit(QUICK, 0, 0)] if options.quick else list(planned(options))
        workers = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
        with workers as pool, tqdm(total=sum(len(unit.ways) for unit in units)) as bar:
            if any(LEARNING["most changed blocks"] in unit.ways for unit in units):
                _ = [*pool.map(partial(run_unit, options.out, extent=extent), CHOSEN_ON)]
                most_changed(options.out, extent)  # once, before many would
            for done in as_completed([pool.submit(run_unit, options.out, unit, extent) for unit in units]):
                bar.update(done.result())
    everything = Measured.read(options.out, WAYS, EVERYONE, range(options.seeds))
    print(results.write(options.out, everything, extent, predictions(options.out)))


def planned(options: argparse.Namespace) -> Iterator[Unit]:
    """All that is asked for, the first seed of all parts first."""
    for seed in range(options.seeds):
        for part in options.parts if seed == 0 else [part for part in options.parts if part == "wider"]:
            of_part, subjects = PARTS[part]
            ways = [way for way in of_part if way.name in options.ways]
            yield from (Unit(ways, subject, seed) for subject in subjects if subject in options.subjects)


CHOSEN_ON = [Unit([LORA], len(EVERYONE) + place, 0) for place in range(len(world.CHOSEN_ON))]
"""Of whom `most_changed` asks."""


if __name__ == "__main__":
    main()
