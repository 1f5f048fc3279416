"""RESULTS.md: every table and figure, beside the paper's."""

import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.memory import INFERENCE, PUBLISHED, inference
from hollow_core.blocks import layout_config
from hollow_core.cost import cuts_table, inputs
from hollow_core.demo import run, world
from hollow_core.dry_run import DryRun
from hollow_core.files import write_bytes
from hollow_core.lora import add_lora, lora_parameters
from hollow_core.memory import GIB, Planner, Setting
from hollow_core.train import TrainSettings

from .baselines import pruned
from .figures import Figure, Measured, plain, short, signed
from .plots import plot
from .trial import REFRESH, Extent, base_row
from .ways import CUTS, FULL, HOLLOWED, HOLLOWED_RANKS, LORA, LORA_RANKS, PRUNED, SAMPLES, WITHOUT_PRIOR, WORDINGS, Way

ONE, TWO = "one path", "two paths"
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
TABLE_3 = {"precompute": 0.238, "hollowed": 2.004, "lora": 2.148, "inference": 0.920, "lora inference": 0.716}
"""The paper's TFLOP."""
TABLE_6 = {(0, 200): 0.08, (3, 200): 0.26, (4, 200): 0.26, (0, 1000): 0.38, (3, 1000): 1.31, (4, 1000): 1.31}
"""{(cut, records): GB}"""


def write(out: Path, measured: Measured, extent: Extent, subjects: Sequence[int]) -> Path:
    """RESULTS.md and its plots in `out`, of whatever is measured."""
    parts = [
        _head(measured, extent),
        _claims(measured),
        _table_1(out, measured, subjects),
        _table_4(measured),
        _table_5(measured),
        _cuts(out, measured),
        _records(out, measured),
        _operations(),
        _storage(),
        _paths(measured),
        _wordings(measured),
        _refresh(measured),
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
a difference, always between trainings of the same subject and seed, its standard error; n is how many there are.
Memory, operations and storage are of SD2.1 at 512 pixels in fp32 at batch 1, LoRA on the attention, by dry runs. The
paper's figures are of the real SD2.1 on DreamBooth, so that only what is better or worse can be compared.

{versions}, Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread(s)."""


def _claims(measured: Measured) -> str:
    """What the paper says, and whether it is so here."""
    main = measured.difference(HOLLOWED_RANKS[128], TWO, LORA_RANKS[128], ONE)
    claims: list[tuple[str, str, Figure | None, str]] = [
        ("Hollowed is as good as LoRA (rank 128)", "+.002", main, "same"),
        ("the same at rank 16", "+.008", measured.difference(HOLLOWED, TWO, LORA, ONE), "same"),
        (
            "Full fine-tuning is hardly better than LoRA (rank 128)",
            "+.005",
            measured.difference(FULL, ONE, LORA_RANKS[128]),
            "same",
        ),
        ("LoRA of rank 1 is worse", "-.142", measured.difference(LORA_RANKS[1], ONE, LORA_RANKS[128]), "less"),
        (
            "Hollowed of rank 4 is worse than of 16",
            "-.060",
            measured.difference(HOLLOWED_RANKS[4], TWO, HOLLOWED),
            "less",
        ),
        (
            "A pruned net, re-trained, is worse than hollowed",
            "-.031",
            measured.difference(PRUNED[1], ONE, HOLLOWED, TWO),
            "less",
        ),
        (
            "200 records are nearly as good as 1000",
            "minimal",
            measured.difference(SAMPLES[200], TWO, SAMPLES[1000]),
            "same",
        ),
    ]
    rows = [
        [text, published, signed(found), "–" if found is None else str(found.n), _verdict(found, expected)]
        for text, published, found, expected in claims
    ]
    return "## What the paper says, and what is so here\n\n" + _table(
        ["", "DINO in the paper", "subject score here", "n", "so here?"], rows
    )


def _verdict(found: Figure | None, expected: str) -> str:
    """Two standard errors decide; a difference of less than .02 is none."""
    if found is None or found.n == 1:
        return "not measured"
    low, high = found.mean - 2 * found.error, found.mean + 2 * found.error
    if expected == "less":
        return "yes" if high < 0 else "no" if low > 0 else "cannot be told"
    if low > -0.02 and high < 0.02:
        return "yes"
    return "no, it is worse" if high < -0.02 else "no, it is better" if low > 0.02 else "cannot be told"


def _scores(measured: Measured, way: Way, use: str | None = None) -> list[str]:
    use = use or use_of(way)
    found = measured.figure(way, use)
    return [
        plain(found),
        plain(measured.figure(way, use, "scene")),
        plain(measured.figure(way, use, "structure")),
        "–" if found is None else str(found.n),
    ]


def _table_1(out: Path, measured: Measured, subjects: Sequence[int]) -> str:
    of_base = [base_row(out, subject) for subject in subjects]
    base = [plain(Figure.of(row[kind] for row in of_base)) for kind in ("subject", "scene", "structure")]
    rows = [["base model", *base, str(len(of_base)), f"{inference():.2f}", f"{INFERENCE}", ""]]
    for name, way, published in (
        ("full fine-tuning", FULL, "16.62"),
        ("LoRA, rank 128", LORA_RANKS[128], "5.23"),
        ("LoRA, rank 1", LORA_RANKS[1], "4.84"),
        ("hollowed, rank 128", HOLLOWED_RANKS[128], "3.88"),
    ):
        rows.append([name, *_scores(measured, way), _gib(way), published, DINO[way]])
    return "## Table 1: methods\n\n" + _table([*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows)


SCORES = ["", "subject score", "scene score", "structure", "n"]


def _table_4(measured: Measured) -> str:
    rows = [
        ["hollowed", *_scores(measured, HOLLOWED), _gib(HOLLOWED), ".660 (3.88)"],
        ["pruned at the same cut", *_scores(measured, PRUNED[0]), _gib(PRUNED[0]), ""],
        ["the same, re-trained", *_scores(measured, PRUNED[1]), _gib(PRUNED[1]), ".629 (3.546), .602 (3.133)"],
    ]
    return (
        "## Table 4: the middle pruned for good\n\nWithout a stored activation, at training and at drawing. "
        "Re-trained: by distillation from the whole U-Net on fresh pictures of many subjects, before it learns one. "
        "The published ones are BK-SDM-Base and -Small, of rank 128 and re-trained for long.\n\n"
        + _table([*SCORES, "SD2.1, GiB", "published DINO (GiB)"], rows)
    )


def _table_5(measured: Measured) -> str:
    rows = [
        [f"{name}, rank {rank}", *_scores(measured, way), _gib(way), published, DINO.get(way, "")]
        for name, ways, cut in (("LoRA", LORA_RANKS, None), ("hollowed", HOLLOWED_RANKS, 3))
        for rank, way in ways.items()
        for published in [next((f"{gib}" for row, r, gib in PUBLISHED.values() if (row, r) == (cut, rank)), "")]
    ]
    return "## Table 5: ranks\n\n" + _table([*SCORES, "SD2.1, GiB", "published GiB", "published DINO"], rows)


def _cuts(out: Path, measured: Measured) -> str:
    sd21 = cuts_table(layout_config("sd21"))
    embedded = cuts_table(run.model().unet.config)
    rows, curves = [], []
    for cut, way in CUTS.items():
        two, one = measured.figure(way, TWO), measured.figure(way, ONE)
        removed = embedded[cut]["removed_percent"]
        if two is not None and one is not None:
            curves.append((removed, two, one))
        gib = f"{sd21[cut]['removed_percent']} %, {_gib(way)}" if cut in _planner().cuts() else ""
        published = next((f"{gib}" for k, rank, gib in PUBLISHED.values() if (k, rank) == (cut, 128)), "")
        gap = signed(measured.difference(way, ONE, way, TWO))
        rows.append([f"k={cut}, {removed} %", *_scores(measured, way), gap, gib, published])
    text = "## Figure 5: how much is hollowed\n\nThe paper's scores hold up to 56.6 % (k=4).\n\n"
    if curves:
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
    if curves:
        plot(out / "records.png", "records", sorted(curves, key=lambda curve: curve[0]))
        text += "![Subject score over records](records.png)\n\n"
    return text + _table(["records", *SCORES[1:], "over 1000"], rows)


def _operations() -> str:
    row = cuts_table(layout_config("sd21"))[run.CUT]["flops"]
    hollowed, lora = (
        _planner().step_flops(Setting(cut, 512, training=TrainSettings(rank=128))) for cut in (run.CUT, None)
    )
    rows = [
        ["precompute a record", f"{row['precompute'] / 1e12:.3f}", short(TABLE_3["precompute"])],
        ["training step, hollowed", f"{hollowed / 1e12:.3f}", short(TABLE_3["hollowed"])],
        ["training step, LoRA", f"{lora / 1e12:.3f}", short(TABLE_3["lora"])],
        [
            "drawing step on two paths",
            f"{(row['precompute'] + row['hollowed_forward']) / 1e12:.3f}",
            short(TABLE_3["inference"]),
        ],
        ["drawing step on one", f"{row['full'] / 1e12:.3f}", short(TABLE_3["lora inference"])],
    ]
    return (
        "## Table 3: operations, k=3\n\nCounted one by one, attention computed anew in the backward pass, as a GPU's "
        "kernels do; the paper takes a backward pass for two forward ones, while frozen weights need no gradients.\n\n"
        + _table(["SD2.1, rank 128", "TFLOP", "published"], rows)
    )


def _storage() -> str:
    planner, rows = _planner(), []
    for (cut, samples), published in TABLE_6.items():
        fp32, fp16 = (
            planner.store_bytes(Setting(cut, 512, samples=samples, store_dtype=dtype)) / 1e9
            for dtype in (torch.float32, torch.float16)
        )
        rows.append([f"k={cut}", str(samples), f"{fp32:.2f}", f"{published:.2f}", f"{fp16:.2f}"])
    return "## Table 6: storage\n\n" + _table(["", "records", "GB in fp32", "published", "GB in fp16 (ours)"], rows)


def _paths(measured: Measured) -> str:
    rows = [
        [name, *_scores(measured, way)[:1], plain(measured.figure(way, ONE)), signed(gap), str(gap.n)]
        for name, way in {
            "hollowed, rank 16": HOLLOWED,
            **{f"rank {rank}": way for rank, way in HOLLOWED_RANKS.items() if way != HOLLOWED},
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
        "class word": "a photo of a cup …",
        "coarser word": "a photo of a thing …",
        "empty": "",
        "personal": "a photo of a sks cup …",
    }
    rows = [
        [
            f"{wording}: “{words[wording]}”",
            *_scores(measured, way),
            signed(measured.difference(way, TWO, HOLLOWED)),
            plain(measured.figure(way, ONE)),
        ]
        for wording, way in WORDINGS.items()
    ]
    return (
        "## The generic prompt's wording\n\nWhat the base path is told, at training and at drawing. That a word can be "
        "too coarse is the weakness that the paper's authors name.\n\n"
        + _table([*SCORES, "over the class word", "subject score on one path"], rows)
    )


def _refresh(measured: Measured) -> str:
    flops = cuts_table(layout_config("sd21"))[run.CUT]["flops"]
    rows = []
    for every in REFRESH:
        use = TWO if every == 1 else f"{TWO}, refresh {every}"
        ratio = (flops["precompute"] / every + flops["hollowed_forward"]) / flops["full"]
        difference = signed(measured.difference(HOLLOWED, use, HOLLOWED, TWO))
        rows.append([str(every), *_scores(measured, HOLLOWED, use), difference, f"{ratio:.2f}"])
    return "## Refresh\n\n" + _table(
        ["base path every … steps", *SCORES[1:], "over 1", "FLOPs of two paths over one, SD2.1"], rows
    )


def _prior(measured: Measured) -> str:
    rows = []
    for name, way in (("LoRA", LORA), ("hollowed", HOLLOWED)):
        without = WITHOUT_PRIOR[way]
        rows.append([f"{name}, with class pictures", *_scores(measured, way), ""])
        difference = signed(measured.difference(without, use_of(way), way))
        rows.append([f"{name}, without", *_scores(measured, without), difference])
    return "## Prior preservation\n\n" + _table([*SCORES, "over with"], rows)


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


@cache
def _planner() -> Planner:
    return Planner("sd21")


@cache
def _gib(way: Way) -> str:
    """Of training SD2.1 so."""
    if way.method in ("full", "pruned", "pruned, distilled"):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(layout_config("sd21"))
            if way.cut is not None:
                unet = pruned(unet, way.cut)
        return f"{_peak(unet, None if way.method == 'full' else way.rank) / GIB:.2f}"
    setting = Setting(way.cut, 512, training=TrainSettings(rank=way.rank))
    return f"{_planner().peak('train', setting).total / GIB:.2f}"


def _peak(unet: UNet2DConditionModel, rank: int | None) -> int:
    """Bytes of a training step with AdamW of a LoRA on the attention, or of all weights."""
    if rank is not None:
        add_lora(unet, rank, generator=torch.Generator())
    parameters = list(unet.parameters()) if rank is None else lora_parameters(unet)
    latents, prompt = inputs(unet.config)
    with DryRun() as dry:
        dry.hold("weights", unet)
        optimizer = torch.optim.AdamW(parameters)
        predicted = unet(latents.to("meta"), 1, prompt.encoder_hidden_states.to("meta")).sample
        predicted.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dry.peak().total
