"""`python -m benchmarks.paper --out DIR`: trains what is not trained yet, then writes DIR/RESULTS.md.

Hours on two cores; `--quick` takes minutes and says little. A stopped run goes on, and several may share DIR, each
with its own `--subjects`. Seeds come one after the other, and the ways that most tables need come first.
"""

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path

from tqdm import tqdm

from benchmarks import held_out
from hollow_core.demo import world

from . import results
from .baselines import Diverged
from .figures import Measured
from .predictions import predictions
from .trial import Extent, Trial, run_trial
from .ways import QUICK, WAYS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    everyone = range(len(world.HELD_OUT))
    parser.add_argument("--out", type=Path, default=Path("hollow-paper"), help="folder for the results")
    parser.add_argument("--subjects", type=int, nargs="+", default=everyone, choices=everyone, help="which to train")
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS], help="which, such as lora-r16-s300")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--quick", action="store_true", help="one subject and seed, some of the ways, few steps")
    parser.add_argument("--report", action="store_true", help="train nothing: write what is there")
    options = parser.parse_args()
    ways, extent = (QUICK, Extent(steps=60, distill_steps=20)) if options.quick else (WAYS, Extent())
    ways = [way for way in ways if way.name in options.ways]
    subjects, seeds = ([0], range(1)) if options.quick else (options.subjects, range(options.seeds))
    held_out.keep_alike(options.out, asdict(extent))
    if not options.report:
        trials = [Trial(options.out, way, subject, seed) for seed, way, subject in product(seeds, ways, subjects)]
        for trial in tqdm(trials):
            try:
                run_trial(trial, extent)
            except Diverged as error:
                tqdm.write(f"Without a row: {error}")
    everything = Measured.read(options.out, WAYS, everyone, range(options.seeds))
    print(results.write(options.out, everything, extent, predictions(options.out)))


if __name__ == "__main__":
    main()
