"""RESULTS.md: every table and figure, beside the paper's."""

from math import nan
from pathlib import Path

from benchmarks import held_out
from benchmarks.memory import INFERENCE, PUBLISHED
from hollow_core.demo import run, world
from hollow_core.files import read_json, write_bytes

from . import comparisons
from .baselines import FULL_LEARNING_RATE
from .figures import NOT_MEASURED, Figure, Measured, plain, short, signed
from .plots import Point, plot
from .predictions import TABLE_3, TABLE_6, Predicted
from .tables import compares, table, trainings
from .trial import ONE, ONE_COARSER, REFRESH, TWO, Extent, base_row, strayed, use_of
from .ways import (
    CALLED_COARSER,
    CALMER,
    CUTS,
    FRESH,
    FULL,
    HOLLOWED,
    HOLLOWED_RANKS,
    LORA,
    LORA_RANKS,
    PRUNED,
    SAMPLES,
    WAYS,
    WITHOUT_PRIOR,
    WORDINGS,
    Way,
)

FEWEST = 3  # points for a curve
_BARS = "Dashed: {0}. Bars: the standard error of the difference to it."
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


def write(out: Path, measured: Measured, extent: Extent, predicted: Predicted) -> Path:
    """RESULTS.md and its plots in `out`, of whatever is measured."""
    sections = [
        comparisons.thirty(measured, predicted),
        comparisons.judges(measured),
        comparisons.giving_up(out, measured, predicted),
        _short(out, measured, predicted),
        _claims(measured),
        _table_1(out, measured, predicted),
        _table_4(out, measured, predicted, extent),
        _table_5(measured, predicted),
        _cuts(out, measured, predicted),
        _records(out, measured),
        _fresh(measured),
        _operations(predicted),
        _storage(predicted),
        _paths(measured),
        _wordings(measured),
        _refresh(measured, predicted),
        _prior(measured),
        _each(measured),
    ]
    path = out / "RESULTS.md"
    parts = [_head(out, measured, extent), *filter(compares, sections)]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())
    return path


def _head(out: Path, measured: Measured, extent: Extent) -> str:
    settings, begun = run.SETTINGS, read_json(out / "settings.json")
    took = [value for way in WAYS for value in measured.values(way, "took", "seconds").values()]
    return f"""# Results

Made by `python -m benchmarks.paper`, on the embedded model: {len(world.HELD_OUT)} subjects of all its classes that it
has never seen, the first {len(held_out.WIDER)} of them in the wider tables, five pictures each, whose captions name
their backgrounds; {extent.steps} steps of {settings.batch} records and as many of the class (which count
{settings.prior_weight:g}), {run.SAMPLES} records, {run.CLASS_IMAGES} class pictures, LoRA on all layers, rank
{settings.rank}, learning rate {settings.rate:g}, k={run.CUT} where nothing else is said. All ways train on records made
beforehand, those without a hollow, too. Scores are of twelve pictures in four new scenes by the embedded scorers, which
give real pictures of the same subject .94 and of another of its class .06. The {len(took)} trainings with their
pictures took {sum(took) / 3600:.1f} hours of a core.

± behind a score is the standard deviation over subjects and seeds; behind a difference, always between trainings of the
same subject and seed, its standard error over subjects. The rows of a table have the same subjects and seeds, unless
each tells its n, the number of trainings. Whether something is so is told by where a difference is to 95 % (Student's
t); the same are scores within .02. Memory, operations and storage are of SD2.1 at 512 pixels in fp32 at batch 1, LoRA
on the attention, by dry runs.

What these figures cannot say:

- The paper's are of the real SD2.1 on DreamBooth; only what is better or worse can be compared.
- The embedded model was trained so that its middle is needed: the levels around it were told wrong scenes, and the
  attention that heard the right one is what k={run.CUT} takes out. That a pruned net loses the scene follows from that.
- The settings were chosen on three other subjects; for an earlier embedded model they were on the first six of these.
- The scene score is 1.000 wherever the scene is heard at all: finer differences of fidelity to the prompt are not seen.

Begun with {begun["made with"]}."""


def _short(out: Path, measured: Measured, predicted: Predicted) -> str:
    without_prior = WITHOUT_PRIOR[HOLLOWED]
    measured = measured.shared([FULL, LORA, HOLLOWED, without_prior, *PRUNED])
    rows = [["base model", *_of_base(out, measured)[:2], "", f"{predicted['inference']:.2f}"]]
    rows += [
        [
            name,
            *_scores(measured, way, use)[:2],
            plain(called) if use is None and (called := measured.figure(way, "no identifier")) else "",
            _gib(predicted, way),
        ]
        for name, way, use in (
            ("full fine-tuning", FULL, None),
            ("plain LoRA", LORA, None),
            (f"hollowed LoRA (k={run.CUT}), two paths", HOLLOWED, None),
            ("the same file on a single path", HOLLOWED, ONE),
            ("hollowed, trained without class pictures", without_prior, None),
            ("the middle pruned for good", PRUNED[0], None),
            ("the middle pruned, and the rest re-trained before", PRUNED[1], None),
        )
    ]
    return f"## In short\n\n{trainings(measured)} Rank {run.SETTINGS.rank}.\n\n" + table(
        ["", "subject score", "scene score", "subject score without the identifier", "SD2.1, GiB"], rows
    )


def _of_base(out: Path, measured: Measured) -> list[str]:
    """The base model's scores."""
    rows = {(subject, 0): base_row(out, subject) for subject, _ in measured.keys}
    return [
        plain(Figure.of({key: row[kind] for key, row in rows.items()})) for kind in ("subject", "scene", "structure")
    ]


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
        n = NOT_MEASURED if subject is None else str(subject.n)
        rows.append([text, published, signed(subject), signed(scene), n, _verdict(subject, expected)])
    return (
        "## What the paper says, and what is so here\n\nThe paper has one learning rate for all ranks. Here rank 128 "
        f"has {_CALM}, full fine-tuning a tenth of rank 16's, as the paper's, all others rank 16's.\n\n"
    ) + table(
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
    return [plain(measured.figure(way, use or use_of(way), kind)) for kind in ("subject", "scene", "structure")]


def _table_1(out: Path, measured: Measured, predicted: Predicted) -> str:
    named = {
        "full fine-tuning": FULL,
        "LoRA, rank 128": LORA_RANKS[128],
        "LoRA, rank 1": LORA_RANKS[1],
        "hollowed, rank 128": HOLLOWED_RANKS[128],
    }
    published = ("16.62", "5.23", "4.84", "3.88")
    measured = measured.shared(CALMER.get(way, way) for way in named.values())
    rows = [["base model", *_of_base(out, measured), f"{predicted['inference']:.2f}", f"{INFERENCE}", ""]]
    rows += [
        [name, *_scores(measured, CALMER.get(way, way)), _gib(predicted, way), gib, DINO[way]]
        for (name, way), gib in zip(named.items(), published, strict=True)
    ]
    return (
        f"## Table 1: methods\n\n{trainings(measured)} Rank 128 with a learning rate of {_CALM}, see Table 5; full "
        f"fine-tuning with {FULL_LEARNING_RATE * run.SETTINGS.rate:g}.\n\n"
        + table([*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows)
    )


_CALM = f"{CALMER[LORA_RANKS[128]].learning_rate:g}"
SCORES = ["", "subject score", "scene score", "structure"]


def _table_4(out: Path, measured: Measured, predicted: Predicted, extent: Extent) -> str:
    rows = []
    measured = measured.shared([HOLLOWED, *PRUNED])
    for name, way, published in (
        ("hollowed", HOLLOWED, ".660 (3.88)"),
        ("pruned at the same cut", PRUNED[0], ""),
        ("the same, re-trained", PRUNED[1], ".629 (3.546), .602 (3.133)"),
    ):
        is_known = way in PRUNED and measured.figure(way, ONE) is not None
        error = short(strayed(out, way, extent)) if is_known else ""
        rows.append([name, *_scores(measured, way), error, _gib(predicted, way), published])
    return (
        f"## Table 4: the middle pruned for good\n\n{trainings(measured)} Without a stored activation, at training "
        "and at drawing. "
        "Re-trained: by distillation from the whole U-Net on fresh pictures of many subjects, before it learns one. "
        "The published ones are BK-SDM-Base and -Small, of rank 128 and re-trained for long. How far from the whole: "
        "the mean square distance of the predictions, before a subject is learned. Of so small a world, fresh pictures "
        "to re-train on can be drawn at will; of the real one they cannot.\n\n"
        + table([*SCORES, "far from the whole", "SD2.1, GiB (rank 16)", "published DINO (GiB), rank 128"], rows)
    )


def _table_5(measured: Measured, predicted: Predicted) -> str:
    named = {
        (name, rank): way
        for name, ways in (("LoRA", LORA_RANKS), ("hollowed", HOLLOWED_RANKS))
        for rank, way in ways.items()
    }
    published = {
        ("LoRA" if cut is None else "hollowed", rank): gib for cut, rank, gib in PUBLISHED.values() if cut != 4
    }
    shared = measured.shared(CALMER.get(way, way) for way in named.values())
    rows = [
        [
            f"{name}, rank {rank}",
            *_scores(shared, CALMER.get(way, way)),
            _gib(predicted, way),
            f"{published.get((name, rank), '')}",
            DINO.get(way, ""),
        ]
        for (name, rank), way in named.items()
    ]
    text = (
        f"## Table 5: ranks\n\n{trainings(shared)} Rank 128 with a learning rate of {_CALM}, the others with "
        f"{run.SETTINGS.rate:g}; the paper has one for all.\n\n"
        + table([*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows)
    )
    for name, way in (("LoRA", LORA_RANKS[128]), ("hollowed", HOLLOWED_RANKS[128])):
        if measured.figure(way, use_of(way)):
            both = measured.shared([way, CALMER[way]])
            rates = [[f"{each.learning_rate:g}", *_scores(both, each)] for each in (way, CALMER[way])]
            text += f"\n\n{name}, rank 128, with either learning rate. {trainings(both)}\n\n" + table(
                ["learning rate", *SCORES[1:]], rates
            )
    return text


def _cuts(out: Path, measured: Measured, predicted: Predicted) -> str:
    sd21, embedded = predicted["removed"]["sd21"], predicted["removed"]["embedded"]
    rows, points = [], []
    measured = measured.shared([LORA, *CUTS.values()])
    for cut, way in CUTS.items():
        two, one = measured.figure(way, TWO), measured.figure(way, ONE)
        over = measured.difference(way, TWO, LORA, ONE)
        removed = embedded[cut]
        if two and one and over:
            points.append(_point(removed, two, one, over))
        gib = f"{sd21[cut]} %, {_gib(predicted, way)}" if way.name in predicted["gib"] else ""
        published = next((f"{gib}" for k, rank, gib in PUBLISHED.values() if (k, rank) == (cut, 128)), "")
        gap = signed(measured.difference(way, ONE, way, TWO))
        rows.append([f"k={cut}, {removed} %", *_scores(measured, way), signed(over), gap, gib, published])
    text = (
        f"## Figure 5: how much is hollowed\n\n{trainings(measured)} The paper's scores hold up to 56.6 % (k=4). "
        "Deeper cuts leave no attention here, where the paper's LoRA is, and are left out.\n\n"
    )
    lora = measured.figure(LORA, ONE)
    if lora and len(points) >= FEWEST:
        plot(out / "cuts.png", "parameters removed, %", points, "plain LoRA", lora.mean)
        text += f"![Subject score over cuts](cuts.png)\n\n{_BARS.format('plain LoRA')}\n\n"
    head = [*SCORES, "over LoRA", "one path over two", "SD2.1: removed, GiB (rank 16)", "published GiB (rank 128)"]
    return text + table(head, rows)


def _point(place: float, two: Figure, one: Figure, over: Figure) -> Point:
    return Point(place, two.mean, one.mean if one.n == two.n else nan, over.error)


def _records(out: Path, measured: Measured) -> str:
    ways = dict(sorted({**SAMPLES, run.SAMPLES: HOLLOWED}.items()))
    most = SAMPLES[1000]
    measured = measured.shared(ways.values())
    rows, points = [], []
    for samples, way in ways.items():
        two, one, over = measured.figure(way, TWO), measured.figure(way, ONE), measured.difference(way, TWO, most)
        if two and one and over:
            points.append(_point(samples, two, one, over))
        rows.append([str(samples), *_scores(measured, way), signed(over)])
    text = f"## Figure 8: records\n\n{trainings(measured)} The paper finds minimal loss at 200.\n\n"
    if len(points) >= FEWEST:
        plot(out / "records.png", "records", points, "1000 records", points[-1].two)
        text += f"![Subject score over records](records.png)\n\n{_BARS.format('1000 records')}\n\n"
    return text + table(["records", *SCORES[1:], "over 1000"], rows)


def _fresh(measured: Measured) -> str:
    """Plain LoRA as trainers without a store have it."""
    measured = measured.shared([LORA, FRESH])
    rows = [
        [str(way.samples), *_scores(measured, way), signed(measured.difference(way, ONE, LORA))]
        for way in (LORA, FRESH)
    ]
    return (
        "Plain LoRA needs no records: a trainer without a store takes fresh noise at each step, as with a "
        f"record of its own for each picture of each step. {trainings(measured)}\n\n"
    ) + table(["records", *SCORES[1:], f"over {LORA.samples}"], rows)


def _operations(predicted: Predicted) -> str:
    rows = [[name, f"{count / 1e12:.3f}", short(TABLE_3[name])] for name, count in predicted["operations"].items()]
    return (
        "## Table 3: operations, k=3\n\nCounted one by one, attention computed anew in the backward pass, as a GPU's "
        "kernels do; the paper takes a backward pass for two forward ones, while frozen weights need no gradients.\n\n"
        + table(["SD2.1, rank 128", "TFLOP", "published"], rows)
    )


def _storage(predicted: Predicted) -> str:
    rows = [
        [f"k={cut}", str(samples), f"{size / 1e9:.2f}", f"{TABLE_6[cut, samples]:.2f}", f"{size / 2e9:.2f}"]
        for cut, samples, size in predicted["fp32_storage"]
    ]
    return "## Table 6: storage\n\n" + table(["", "records", "GB in fp32", "published", "GB in fp16 (ours)"], rows)


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
        + table(["", "two paths", "one path", "one over two", "n"], rows)
    )


def _wordings(measured: Measured) -> str:
    words = {
        "“cup”, the class word": WORDINGS["class word"],
        "“thing”, which it never learned": WORDINGS["coarser word"],
        "an empty prompt": WORDINGS["empty"],
        "“sks cup”, the personal prompt": WORDINGS["personal"],
        "“thing” for half of the records, “sks cup” for the other": WORDINGS["coarser word or personal"],
        "“thing”, and the subject is called “sks thing” everywhere": CALLED_COARSER,
    }

    def prompted(way: Way) -> tuple[str, str]:
        """The uses in which one path is told of a "sks cup" and of a "sks thing"."""
        return ("", ONE) if way == CALLED_COARSER else (ONE, ONE_COARSER)

    measured = measured.shared(words.values())
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
        f"## The generic prompt's wording\n\n{trainings(measured)} What the base path is told, at training and at "
        "drawing; the personal prompt says “sks cup”. That a word can be too coarse is the weakness that the paper's "
        "authors name. Here the coarsest that can be: “thing” was in no caption that the embedded model has learned. "
        "Where half of the records have either, the base path is told of a “thing” at drawing.\n\n"
        + table([*SCORES, "over the class word", *one], rows)
    )


def _refresh(measured: Measured, predicted: Predicted) -> str:
    rows, flops = [], predicted["operations"]
    measured = measured.shared([HOLLOWED]).having(HOLLOWED, f"{TWO}, refresh {REFRESH[-1]}")
    full = flops["drawing step on one path"]
    base = flops["precompute a record"]
    for every in sorted(REFRESH):
        use = TWO if every == 1 else f"{TWO}, refresh {every}"
        ratio = (base / every + flops["drawing step on two paths"] - base) / full
        difference = signed(measured.difference(HOLLOWED, use, HOLLOWED, TWO))
        rows.append([str(every), *_scores(measured, HOLLOWED, use), difference, f"{ratio:.2f}"])
    return f"## Refresh\n\n{trainings(measured)}\n\n" + table(
        ["base path every … steps", *SCORES[1:], "over 1", "FLOPs of two paths over one, SD2.1"], rows
    )


def _prior(measured: Measured) -> str:
    rows, measured = [], measured.shared([*WITHOUT_PRIOR, *WITHOUT_PRIOR.values()]).having(LORA, "no identifier")
    for name, way in (("LoRA", LORA), ("hollowed", HOLLOWED)):
        for words, which in (("with class pictures", way), ("without", WITHOUT_PRIOR[way])):
            difference = "" if which == way else signed(measured.difference(which, use_of(way), way))
            unasked = plain(measured.figure(which, "no identifier"))
            rows.append([f"{name}, {words}", *_scores(measured, which), difference, unasked])
    return (
        f"## Prior preservation\n\n{trainings(measured)} Without the identifier the subject should not be seen: “cup” "
        "is any cup.\n\n" + table([*SCORES, "over with", "subject score without the identifier"], rows)
    )


def _each(measured: Measured) -> str:
    measured = measured.shared([LORA, HOLLOWED])
    subjects, seeds = ({key[place] for key in measured.keys} for place in (0, 1))
    parts = {world.HELD_OUT[subject].describe(): measured.part(subject=subject) for subject in sorted(subjects)}
    parts |= {f"seed {seed}": measured.part(seed=seed) for seed in sorted(seeds)}
    rows = [
        [name, *(plain(part.figure(way, use_of(way))) for way in (LORA, HOLLOWED)), str(len(part.keys))]
        for name, part in parts.items()
    ]
    return "## Subject by subject, seed by seed\n\n" + table(["", "LoRA", "hollowed", "n"], rows)
