"""Scores on the six held-out subjects of the embedded model: `python -m benchmarks.subjects --out DIR`.

Plain LoRA and hollowed LoRA are trained with the demo's settings, and used in every way: on two paths with the base
path refreshed every 1, 2, 3 and 5 steps, and as an ordinary LoRA. About half an hour on two cores; what is done is
kept in DIR, so that a stopped run goes on. Writes DIR/subjects.json and prints the tables.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean

from hollow_core import lora_file
from hollow_core.blocks import layout_config
from hollow_core.cost import cuts_table
from hollow_core.demo import run, world
from hollow_core.files import read_json, write_json
from hollow_core.lora_file import LoraFile
from hollow_core.models import BaseModel
from hollow_core.progress import Progress

REFRESH = (1, 2, 3, 5)
SEEDS_A_SCENE = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-benchmark"), help="folder for the results")
    out: Path = parser.parse_args().out
    results = [subject_scores(out, number, subject) for number, subject in enumerate(world.HELD_OUT)]
    flops = two_path_flops()
    write_json(out / "subjects.json", {"subjects": results, "two_path_flops": flops})
    print("\n| way | subject score | prompt score |\n|---|---|---|")
    for way in results[0]:
        subject, prompt = (mean(result[way][kind] for result in results) for kind in ("subject", "prompt"))
        print(f"| {way} | {subject:.3f} | {prompt:.3f} |")
    print("\n| refresh | SD2.1, k=3: FLOPs of two paths over one |\n|---|---|")
    for refresh, ratio in flops.items():
        print(f"| {refresh} | {ratio:.3f} |")


def subject_scores(out: Path, number: int, subject: world.Subject) -> dict[str, dict[str, float]]:
    """{way: {"subject": …, "prompt": …}} for one subject; read back where it was measured before."""
    path = out / f"subject-{number}.json"
    if not path.exists():
        references = out / f"subject-{number}"
        run.write_references(references, subject)
        base = run.model()
        plain, hollowed = (
            lora_file.load(
                run.train(out / f"subject-{number}-{name}", references, subject, cut, progress=_say).file, base.unet
            )
            for name, cut in (("plain", None), ("hollowed", run.CUT))
        )
        scores = {
            "base model": _scores(base, subject, None),
            "plain LoRA": _scores(base, subject, plain),
            "hollowed LoRA, single path": _scores(base, subject, hollowed, single_path=True),
        }
        for refresh in REFRESH:
            way = f"hollowed LoRA, two paths, refresh {refresh}"
            scores[way] = _scores(base, subject, hollowed, refresh=refresh)
        write_json(path, scores)
    scores = read_json(path)
    print(subject.describe(), scores, flush=True)
    return scores


def two_path_flops() -> dict[int, float]:
    """U-Net FLOPs of a sampler step on two paths over those on one, SD2.1 at k=3: (base path / n + personal) / full."""
    flops = cuts_table(layout_config("sd21"))[run.CUT]["flops"]
    return {n: round((flops["precompute"] / n + flops["hollowed_forward"]) / flops["full"], 3) for n in REFRESH}


def _scores(
    base: BaseModel,
    subject: world.Subject,
    lora: LoraFile | None,
    *,
    refresh: int = 1,
    single_path: bool = False,
) -> dict[str, float]:
    scenes = list(world.NEW_SCENES) * SEEDS_A_SCENE
    settings = replace(run.SAMPLING, refresh=refresh)
    drawn = run.draw(base, run.called(subject), scenes, settings, lora=lora, single_path=single_path)
    subject_score, prompt_score = run.score(drawn, subject, scenes)
    return {"subject": round(subject_score, 4), "prompt": round(prompt_score, 4)}


def _say(stage: str, done: Progress) -> None:
    if done.step % 100 == 0:
        print(stage, done.step, done.loss, flush=True)


if __name__ == "__main__":
    main()
