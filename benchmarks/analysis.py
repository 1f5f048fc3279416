"""The paper's Fig. 2 on the embedded model: `python -m benchmarks.analysis --trainings DIR --out DIR`.

DIR is where `benchmarks.paper` has trained LoRAs of the six held-out subjects without hollowing. Draws mean and spread
over them into OUT/analysis.png, and prints, from the middle of the U outwards, how much the blocks change and how much
a picture does when one of them is switched off; ten minutes on two cores.
"""

import argparse
from pathlib import Path
from statistics import mean

from benchmarks import held_out
from benchmarks.paper.trial import Trial
from benchmarks.paper.ways import LORA
from hollow_core.analysis.ablation import ablate
from hollow_core.analysis.change import together
from hollow_core.analysis.picture import picture
from hollow_core.analysis.report import analyze_files
from hollow_core.demo import run, world
from hollow_core.files import write_json, write_png
from hollow_core.lora import file as lora_file
from hollow_core.nets.unet_layers import Config, Layer, hollowed_layers, layers, max_cut

RINGS = ((0, 0), (1, 3), (4, 6), (7, 9), (10, 12))
"""By the cuts that take a block: the first and the last of each row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainings", type=Path, default=Path("hollow-paper"), help="what benchmarks.paper made")
    parser.add_argument("--out", type=Path, default=Path("hollow-analysis"), help="folder for the results")
    asked = parser.parse_args()
    files = [Trial(asked.trainings, LORA, number, seed=0).folder / run.LORA_FILE for number in held_out.WIDER]
    analyses = analyze_files(files, run.MODEL)
    write_png(asked.out / "analysis.png", picture(analyses))
    influences = [influence(file, subject) for file, subject in zip(files, world.HELD_OUT[: len(files)], strict=True)]
    rows = []
    for first, last in RINGS:
        blocks = [layer for layer in layers(analyses[0].config) if first <= ring(analyses[0].config, layer) <= last]
        found = [together(change for layer in blocks if (change := each.block(layer))) for each in analyses]
        changes = [change for change in found if change is not None]
        rows.append(
            {
                "cuts": [first, last],
                "blocks": [layer.name for layer in blocks],
                "mean": mean(change.mean for change in changes),
                "relative": mean(change.relative or 0.0 for change in changes),
                "influence": mean(each[layer.name] for each in influences for layer in blocks if layer.name in each),
            }
        )
    write_json(asked.out / "analysis.json", rows)
    print("\n| blocks hollowed from | mean abs ΔW | relative | one block's influence |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['cuts']} | {row['mean']:.2e} | {row['relative']:.3f} | {row['influence']:.5f} |")


def ring(config: Config, layer: Layer) -> int:
    """The smallest cut that takes a layer; one more than the largest cut for what always stays."""
    cuts = range(max_cut(config) + 1)
    return next((cut for cut in cuts if layer in hollowed_layers(config, cut)), len(cuts))


def influence(file: Path, subject: world.Subject) -> dict[str, float]:
    """What switching off each block, by its name, does to a picture of the subject in the first new scene: a share of
    full range."""
    base = run.model()
    prompt = world.photo_caption(run.called(subject), world.NEW_SCENES[0])
    done = ablate(base, lora_file.load(file, base.unet), prompt, settings=run.SAMPLING)
    print(subject.describe(), flush=True)
    return {block.name: done.influence(drawn) for block, drawn in done.without.items()}


if __name__ == "__main__":
    main()
