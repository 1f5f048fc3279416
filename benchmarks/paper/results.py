"""RESULTS.md: every table and figure, beside the paper's."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.memory import INFERENCE, PUBLISHED
from hollow_core.demo import run, world
from hollow_core.files import write_bytes

from .figures import Figure, Measured, plain, short, signed
from .plots import plot
from .predictions import TABLE_3, TABLE_6, Predicted
from .trial import ONE, ONE_COARSER, REFRESH, TWO, Extent, base_row, strayed
from .ways import (
    CALLED_COARSER,
    CALMER,
    CUTS,
    FULL,
    HOLLOWED,
    HOLLOWED_RANKS,
    LORA,
    LORA_RANKS,
    PRUNED,
    SAMPLES,
    WITHOUT_PRIOR,
    WORDINGS,
    Way,
)

FEWEST = 3  # points for a curve
DINO = {
    FULL: ".663",
    LORA_RANKS[128]: ".658",
    LORA_RANKS[1]: ".516",
    LORA_RANKS[4]: ".564",
    LORA_RANKS[16]: ".618",
    HOLLOWED_RANKS[128]: ".660",
    HOLLOWED_RANKS[4]: ".566",
    HOLLOWED_RANKS[16]: ".626",
}
"""The paper's, of SD2.1 on DreamBooth."""


def write(out: Path, measured: Measured, extent: Extent, predicted: Predicted, subjects: Sequence[int]) -> Path:
    """RESULTS.md and its plots in `out`, of whatever is measured."""
    parts = [
        _head(measured, extent),
        _claims(measured),
        _table_1(out, measured, predicted, subjects),
        _table_4(out, measured, predicted, extent),
        _table_5(measured, predicted),
        _cuts(out, measured, predicted),
        _records(out, measured),
        _operations(predicted),
        _storage(predicted),
        _paths(measured),
        _wordings(measured),
        _refresh(measured, predicted),
        _prior(measured),
        _subjects(measured),
    ]
    path = out / "RESULTS.md"
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())
    return path


def use_of(way: Way) -> str:
    """How a way's LoRA is meant to be used."""
    return TWO if way.method == "hollowed" else ONE


def _head(measured: Measured, extent: Extent) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    return f"""# Results

Made by `python -m benchmarks.paper`, on the embedded model: {len(world.HELD_OUT)} subjects that it has never seen, five
pictures each; {extent.steps} steps of {run.SETTINGS.batch} records and as many of the class, {run.SAMPLES} records,
{run.CLASS_IMAGES} class pictures, LoRA on all layers, rank {run.SETTINGS.rank} and k={run.CUT} where nothing else is
said. Scores are of twelve pictures in four new scenes by the embedded scorers, which give real pictures of the same
subject .92 and of another of its class .04. ± behind a score is the standard deviation over subjects and seeds, behind
a difference, always between trainings of the same subject and seed, its standard error over subjects; n is how many
trainings there are. Whether something is so is told by where a difference is to 95 % (Student's t); the same are scores
within .02.
Memory, operations and storage are of SD2.1 at 512 pixels in fp32 at batch 1, LoRA on the attention, by dry runs. The
paper's figures are of the real SD2.1 on DreamBooth, so that only what is better or worse can be compared.

{versions}, Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread(s)."""


def _claims(measured: Measured) -> str:
    """What the paper says, and whether it is so here."""
    lora_128, hollowed_128 = CALMER.values()
    claims: list[tuple[str, str, Way, Way, str]] = [
        ("Hollowed is as good as LoRA (rank 128)", "+.002", hollowed_128, lora_128, "same"),
        ("the same at rank 16", "+.008", HOLLOWED, LORA, "same"),
        ("Full fine-tuning is hardly better than LoRA (rank 128)", "+.005", FULL, lora_128, "same"),
        ("LoRA of rank 1 is worse than of 128", "-.142", LORA_RANKS[1], lora_128, "less"),
        ("Hollowed of rank 4 is worse than of 16", "-.060", HOLLOWED_RANKS[4], HOLLOWED, "less"),
        ("A pruned net, re-trained, is worse than hollowed", "-.031", PRUNED[1], HOLLOWED, "less"),
        ("200 records are nearly as good as 1000", "minimal", SAMPLES[200], SAMPLES[1000], "same"),
    ]
    rows = []
    for text, published, way, other, expected in claims:
        subject, scene = (
            measured.difference(way, use_of(way), other, use_of(other), kind) for kind in ("subject", "scene")
        )
        n = "–" if subject is None else str(subject.n)
        rows.append([text, published, signed(subject), signed(scene), n, _verdict(subject, expected)])
    return "## What the paper says, and what is so here\n\n" + _table(
        ["", "DINO in the paper", "subject score here", "scene score here", "n", "so here, by subject score?"], rows
    )


def _verdict(found: Figure | None, expected: str) -> str:
    """By where the difference is to 95 %; the same are scores within .02 of each other."""
    if found is None or found.subjects == 1:
        return "not measured"
    low, high = found.interval
    if expected == "less":
        return "yes" if high < 0 else "no" if low > -0.02 else "cannot be told"
    if low > -0.02 and high < 0.02:
        return "yes"
    return "no, it is worse" if high < -0.02 else "no, it is better" if low > 0.02 else "cannot be told"


def _gib(predicted: Predicted, way: Way) -> str:
    return f"{predicted['gib'][way.name]:.2f}"


def _scores(measured: Measured, way: Way, use: str | None = None) -> list[str]:
    use = use or use_of(way)
    found = measured.figure(way, use)
    return [
        plain(found),
        plain(measured.figure(way, use, "scene")),
        plain(measured.figure(way, use, "structure")),
        "–" if found is None else str(found.n),
    ]


def _table_1(out: Path, measured: Measured, predicted: Predicted, subjects: Sequence[int]) -> str:
    of_base = [base_row(out, subject) for subject in subjects]
    base = [
        plain(Figure.of({(number, 0): row[kind] for number, row in enumerate(of_base)}))
        for kind in ("subject", "scene", "structure")
    ]
    rows = [["base model", *base, str(len(of_base)), f"{predicted['inference']:.2f}", f"{INFERENCE}", ""]]
    for name, way, published in (
        ("full fine-tuning", FULL, "16.62"),
        ("LoRA, rank 128", LORA_RANKS[128], "5.23"),
        ("LoRA, rank 1", LORA_RANKS[1], "4.84"),
        ("hollowed, rank 128", HOLLOWED_RANKS[128], "3.88"),
    ):
        rows.append([name, *_scores(measured, CALMER.get(way, way)), _gib(predicted, way), published, DINO[way]])
    return f"## Table 1: methods\n\nRank 128 with a learning rate of {_CALM}, see Table 5.\n\n" + _table(
        [*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows
    )


_CALM = f"{CALMER[LORA_RANKS[128]].learning_rate:g}"
SCORES = ["", "subject score", "scene score", "structure", "n"]


def _table_4(out: Path, measured: Measured, predicted: Predicted, extent: Extent) -> str:
    rows = []
    for name, way, published in (
        ("hollowed", HOLLOWED, ".660 (3.88)"),
        ("pruned at the same cut", PRUNED[0], ""),
        ("the same, re-trained", PRUNED[1], ".629 (3.546), .602 (3.133)"),
    ):
        is_known = way in PRUNED and measured.figure(way, ONE) is not None
        error = short(strayed(out, way, extent)) if is_known else ""
        rows.append([name, *_scores(measured, way), error, _gib(predicted, way), published])
    return (
        "## Table 4: the middle pruned for good\n\nWithout a stored activation, at training and at drawing. "
        "Re-trained: by distillation from the whole U-Net on fresh pictures of many subjects, before it learns one. "
        "The published ones are BK-SDM-Base and -Small, of rank 128 and re-trained for long. How far from the whole: "
        "the mean square distance of the predictions, before a subject is learned. Of so small a world, fresh pictures "
        "to re-train on can be drawn at will; of the real one they cannot.\n\n"
        + _table([*SCORES, "far from the whole", "SD2.1, GiB", "published DINO (GiB)"], rows)
    )


def _table_5(measured: Measured, predicted: Predicted) -> str:
    rows = [
        [f"{name}, rank {rank}", *_scores(measured, way), _gib(predicted, way), published, DINO.get(way, "")]
        for name, ways, cut in (("LoRA", LORA_RANKS, None), ("hollowed", HOLLOWED_RANKS, 3))
        for rank, way in ways.items()
        for published in [next((f"{gib}" for row, r, gib in PUBLISHED.values() if (row, r) == (cut, rank)), "")]
    ]
    rows += [
        [f"{name}, rank 128, learning rate {_CALM}", *_scores(measured, CALMER[way]), "", "", ""]
        for name, way in (("LoRA", LORA_RANKS[128]), ("hollowed", HOLLOWED_RANKS[128]))
    ]
    return (
        "## Table 5: ranks\n\nThe paper has one learning rate for all ranks. Here it is "
        f"{run.SETTINGS.learning_rate:g}, meant for rank 16.\n\n"
        + _table([*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows)
    )


def _cuts(out: Path, measured: Measured, predicted: Predicted) -> str:
    sd21, embedded = predicted["removed"]["sd21"], predicted["removed"]["embedded"]
    rows, curves = [], []
    for cut, way in CUTS.items():
        two, one = measured.figure(way, TWO), measured.figure(way, ONE)
        removed = embedded[cut]
        if two is not None and one is not None:
            curves.append((removed, two, one))
        gib = f"{sd21[cut]} %, {_gib(predicted, way)}" if way.name in predicted["gib"] else ""
        published = next((f"{gib}" for k, rank, gib in PUBLISHED.values() if (k, rank) == (cut, 128)), "")
        gap = signed(measured.difference(way, ONE, way, TWO))
        rows.append([f"k={cut}, {removed} %", *_scores(measured, way), gap, gib, published])
    text = (
        "## Figure 5: how much is hollowed\n\nThe paper's scores hold up to 56.6 % (k=4). Deeper cuts leave no "
        "attention here, where the paper's LoRA is, and are left out.\n\n"
    )
    if len(curves) >= FEWEST:
        plot(out / "cuts.png", "parameters removed, %", curves)
        text += "![Subject score over cuts](cuts.png)\n\n"
    head = [*SCORES, "one path over two", "SD2.1: removed, GiB (rank 16)", "published GiB (rank 128)"]
    return text + _table(head, rows)


def _records(out: Path, measured: Measured) -> str:
    curves = [
        (samples, two, one)
        for samples, way in {**SAMPLES, run.SAMPLES: HOLLOWED}.items()
        if (two := measured.figure(way, TWO)) and (one := measured.figure(way, ONE))
    ]
    rows = [
        [str(samples), *_scores(measured, way), signed(measured.difference(way, TWO, SAMPLES[1000]))]
        for samples, way in sorted({**SAMPLES, run.SAMPLES: HOLLOWED}.items())
    ]
    text = "## Figure 8: records\n\nThe paper finds minimal loss at 200.\n\n"
    if len(curves) >= FEWEST:
        plot(out / "records.png", "records", sorted(curves, key=lambda curve: curve[0]))
        text += "![Subject score over records](records.png)\n\n"
    return text + _table(["records", *SCORES[1:], "over 1000"], rows)


def _operations(predicted: Predicted) -> str:
    rows = [[name, f"{count / 1e12:.3f}", short(TABLE_3[name])] for name, count in predicted["operations"].items()]
    return (
        "## Table 3: operations, k=3\n\nCounted one by one, attention computed anew in the backward pass, as a GPU's "
        "kernels do; the paper takes a backward pass for two forward ones, while frozen weights need no gradients.\n\n"
        + _table(["SD2.1, rank 128", "TFLOP", "published"], rows)
    )


def _storage(predicted: Predicted) -> str:
    rows = [
        [f"k={cut}", str(samples), f"{size / 1e9:.2f}", f"{TABLE_6[cut, samples]:.2f}", f"{size / 2e9:.2f}"]
        for cut, samples, size in predicted["fp32_storage"]
    ]
    return "## Table 6: storage\n\n" + _table(["", "records", "GB in fp32", "published", "GB in fp16 (ours)"], rows)


def _paths(measured: Measured) -> str:
    rows = [
        [name, *_scores(measured, way)[:1], plain(measured.figure(way, ONE)), signed(gap), str(gap.n)]
        for name, way in {
            "hollowed, rank 16": HOLLOWED,
            **{f"rank {rank}": way for rank, way in HOLLOWED_RANKS.items() if way != HOLLOWED},
            f"rank 128, learning rate {_CALM}": CALMER[HOLLOWED_RANKS[128]],
            **{f"{samples} records": way for samples, way in SAMPLES.items()},
        }.items()
        if (gap := measured.difference(way, ONE, way, TWO))
    ]
    return (
        "## One path and two\n\nThe same file on two paths, as trained, and on one, as in every other tool. A loss of "
        "more than .02 would have to be mended; for other cuts see Figure 5.\n\n"
        + _table(["", "two paths", "one path", "one over two", "n"], rows)
    )


def _wordings(measured: Measured) -> str:
    words = {
        "“cup”, the class word": WORDINGS["class word"],
        "“thing”, a coarser word": WORDINGS["coarser word"],
        "an empty prompt": WORDINGS["empty"],
        "“sks cup”, the personal prompt": WORDINGS["personal"],
        "“thing” for half of the records, “sks cup” for the other": WORDINGS["coarser word or personal"],
        "“thing”, and the subject is called “sks thing” everywhere": CALLED_COARSER,
    }

    def prompted(way: Way) -> tuple[str, str]:
        """The uses in which one path is told of a "sks cup" and of a "sks thing"."""
        return ("", ONE) if way == CALLED_COARSER else (ONE, ONE_COARSER)

    rows = [
        [
            name,
            *_scores(measured, way),
            signed(measured.difference(way, TWO, HOLLOWED)),
            *(plain(measured.figure(way, use)) for use in prompted(way)),
        ]
        for name, way in words.items()
    ]
    one = [f"subject score on one path, prompted “{noun}”" for noun in ("sks cup", "sks thing")]
    return (
        "## The generic prompt's wording\n\nWhat the base path is told, at training and at drawing; the personal "
        "prompt says “sks cup”. That a word can be too coarse is the weakness that the paper's authors name.\n\n"
        + _table([*SCORES, "over the class word", *one], rows)
    )


def _refresh(measured: Measured, predicted: Predicted) -> str:
    rows, flops = [], predicted["operations"]
    full = flops["drawing step on one path"]
    base = flops["precompute a record"]
    for every in REFRESH:
        use = TWO if every == 1 else f"{TWO}, refresh {every}"
        ratio = (base / every + flops["drawing step on two paths"] - base) / full
        difference = signed(measured.difference(HOLLOWED, use, HOLLOWED, TWO))
        rows.append([str(every), *_scores(measured, HOLLOWED, use), difference, f"{ratio:.2f}"])
    return "## Refresh\n\n" + _table(
        ["base path every … steps", *SCORES[1:], "over 1", "FLOPs of two paths over one, SD2.1"], rows
    )


def _prior(measured: Measured) -> str:
    rows = []
    for name, way in (("LoRA", LORA), ("hollowed", HOLLOWED)):
        for words, which in (("with class pictures", way), ("without", WITHOUT_PRIOR[way])):
            difference = "" if which == way else signed(measured.difference(which, use_of(way), way))
            unasked = plain(measured.figure(which, "no identifier"))
            rows.append([f"{name}, {words}", *_scores(measured, which), difference, unasked])
    return (
        "## Prior preservation\n\nWithout the identifier the subject should not be seen: “cup” is any cup.\n\n"
        + _table([*SCORES, "over with", "subject score without the identifier"], rows)
    )


def _subjects(measured: Measured) -> str:
    plain_lora, hollowed = measured.by_subject(LORA, ONE), measured.by_subject(HOLLOWED, TWO)
    rows = [
        [kind, plain(plain_lora[kind]), plain(hollowed[kind]), str(plain_lora[kind].n)]
        for kind in plain_lora
        if kind in hollowed
    ]
    return "## Subject by subject\n\n" + _table(["", "LoRA", "hollowed", "seeds"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
