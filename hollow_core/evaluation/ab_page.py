"""A blind comparison of two ways by people, as the paper's user study (Sec. 5.2 and Table 2).

The page is one HTML file with its pictures inside, and asks nothing of the network: a task shows a reference, a
prompt, and two pictures in random order, and asks which is more faithful to the subject and which to the text. Which
picture is whose stands in a key beside the page, which is for `summarise` alone.
"""

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..data.images import picture_paths
from ..data.picture_file import SUFFIXES, open_picture
from ..data.prompts import generic_prompt
from ..errors import HollowError
from ..files import read_json, write_bytes, write_json
from .scores import read_prompts

TEMPLATE = Path(__file__).with_suffix(".html")
LARGEST = 512  # pixels a side in the page
QUESTIONS = ("subject", "text")


class Pair(NamedTuple):
    """Two pictures of one prompt and seed."""

    name: str
    """Their path in both folders."""
    a: Path
    b: Path
    prompt: str
    references: tuple[Path, ...]


class Share(NamedTuple):
    """How often an answer was given to a question, with its 95 % confidence interval."""

    answers: int
    share: float
    low: float
    high: float


def find_pairs(
    a: Path, b: Path, references: Path | None = None, prompts: Path | None = None, identifier: str = "sks"
) -> list[Pair]:
    """All pictures that have the same place in both folders, at any depth, with their prompts and references.

    These are those of `references` and `prompts` (as for `scores.read_prompts`), or what `hollow benchmark` wrote
    beside the pictures. Prompts lose the identifier, which tells people nothing. Raises HollowError where there is
    no pair, or one of which nothing is known.
    """
    for folder in (a, b):
        picture_paths(folder)  # it must be there
    names = [path.relative_to(a) for path in sorted(a.rglob("*")) if path.suffix.lower() in SUFFIXES]
    names = [name for name in names if (b / name).exists()]
    if not names:
        raise HollowError(f"{a} and {b} have no pictures of the same names. Give folders whose pictures go in pairs.")
    if (references is None) != (prompts is None):
        raise HollowError("There must be both --references and --prompts, or neither with folders of hollow benchmark.")
    if references is None or prompts is None:
        known = {folder: _of_benchmark(folder) for folder in {(a / name).parent for name in names}}
        told = [known[(a / name).parent].get(name.name) for name in names]
    else:
        shown = tuple(picture_paths(references))
        told = [(text, shown) for text in read_prompts(prompts, [a / name for name in names])]
    pairs = []
    for name, each in zip(names, told, strict=True):
        if each is None or not each[1]:
            raise HollowError(f"Nothing is known of {a / name}. Give --references and --prompts.")
        pairs.append(Pair(name.as_posix(), a / name, b / name, generic_prompt(each[0], identifier), each[1]))
    return pairs


def write_page(
    path: Path, pairs: Sequence[Pair], names: tuple[str, str], generator: torch.Generator, tasks: int = 25
) -> Path:
    """Write the page of so many tasks, drawn from `pairs` (all, if there are fewer), and its key: the key's path.

    `names` are what the summary calls a and b. Raises HollowError for less than one task.
    """
    if tasks < 1:
        raise HollowError(f"{tasks} tasks are too few. The paper's study had 25.")
    shown, key = [], []
    for index in torch.randperm(len(pairs), generator=generator)[:tasks].tolist():
        pair = pairs[index]
        a_first = bool(torch.randint(2, (), generator=generator))
        reference = pair.references[int(torch.randint(len(pair.references), (), generator=generator))]
        left, right = (pair.a, pair.b) if a_first else (pair.b, pair.a)
        images = {"reference": _data(reference), "left": _data(left), "right": _data(right)}
        shown.append({"prompt": pair.prompt, **images})
        key.append({"name": pair.name, "left": "a" if a_first else "b"})
    page = hashlib.sha256(json.dumps([shown, key]).encode()).hexdigest()[:16]
    data = json.dumps({"page": page, "tasks": shown}).replace("</", "<\\/")  # so that no prompt ends the script
    html = TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', data)
    key_path = path.with_suffix(".key.json")
    write_json(key_path, {"page": page, "a": names[0], "b": names[1], "tasks": key})
    write_bytes(path, html.encode())
    return key_path


def summarise(keys: Sequence[Path], answers: Sequence[Path]) -> dict[str, Any]:
    """{"a": name, "b": name, "people": …, "subject": {"a": Share, "tie": Share, "b": Share}, "text": …}.

    Intervals are Wilson's and take answers for independent, which those of one person are not quite. Raises
    HollowError for a file that is no key, for answers to another page, for two files of one person, and for keys of
    different comparisons.
    """
    pages = {}
    for path in keys:
        key = read_json(path)
        if not isinstance(key, dict) or not {"page", "a", "b", "tasks"} <= key.keys():
            raise HollowError(f"{path} is no key. Give the .key.json that was written beside the page.")
        pages[key["page"]] = key
    names = {(key["a"], key["b"]) for key in pages.values()}
    if len(names) != 1:
        raise HollowError("The keys are of different comparisons. Give those of one.")
    counts = {question: Counter[str]() for question in QUESTIONS}
    seen: dict[tuple[str, Any], Path] = {}
    for path in answers:
        given = read_json(path)
        key = pages.get(given.get("page")) if isinstance(given, dict) else None
        if key is None or len(given.get("answers", ())) != len(key["tasks"]):
            raise HollowError(f"{path} does not answer the page of this key. Give the key that was written with it.")
        person = (given["page"], given.get("person"))
        if person in seen:
            raise HollowError(f"{path} and {seen[person]} are of one person. Give the last of them only.")
        seen[person] = path
        for task, answer in zip(key["tasks"], given["answers"], strict=True):
            for question in QUESTIONS:
                counts[question][_whose(answer.get(question), task["left"], path)] += 1
    ((a, b),) = names
    return {"a": a, "b": b, "people": len(answers)} | {
        question: {whose: _share(count[whose], count.total()) for whose in ("a", "tie", "b")}
        for question, count in counts.items()
    }


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share `count / total` (E. B. Wilson, 1927)."""
    z = 1.959964
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(count: int, total: int) -> Share:
    return Share(count, count / total, *wilson(count, total))


def _whose(answer: object, left: str, path: Path) -> str:
    other = "b" if left == "a" else "a"
    known = {"left": left, "right": other, "tie": "tie"}
    if str(answer) not in known:
        raise HollowError(f"{path} holds the answer {answer!r}. Let the page write it.")
    return known[str(answer)]


def _of_benchmark(pictures: Path) -> dict[str, tuple[str, tuple[Path, ...]]]:
    """{file: (prompt, references)} of a job of `hollow benchmark`; empty for any other folder."""
    path = pictures.parent / "scores.json"
    if not path.exists():
        return {}
    told = read_json(path)
    references = tuple(map(Path, told["references"]))
    return {picture["file"]: (picture["prompt"], references) for picture in told["pictures"]}


def _data(path: Path) -> str:
    """A picture as a data URL: newly encoded, so that nothing in the file tells where it is from."""
    picture = open_picture(path)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
