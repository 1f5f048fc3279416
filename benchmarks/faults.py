"""What a run comes to under faults: `python -m benchmarks.faults --runs 20 --kills 10 --mutations 1000 --loras 5000`.

A process is killed at random moments of its life, again and again, and must come back bit by bit; stores, checkpoints
and LoRA files are changed at random, and each must give a sentence or what it gave before, in time and without a
half-written file. It prints what did not, as JSON; all of it is decided by the seed, but for where a kill strikes.
The tests do the same with fewer, on a model that is smaller than the embedded one.
"""

import argparse
import faulthandler
import gc
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hollow_core.data.images import load_images
from hollow_core.demo.run import UNET
from hollow_core.errors import HollowError
from hollow_core.files import digest
from hollow_core.lora import file as lora_file
from hollow_core.lora.dialects import DIALECTS
from hollow_core.lora.layers import remove_lora
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import load
from hollow_core.request import Request, make_examples
from hollow_core.road import personalize
from hollow_core.training.precompute import model_id, precompute
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import CHECKPOINT, train

CUT = 1
LIMIT = 60.0  # seconds that a case may take, which takes a fraction of one

Choose = random.Random


def request(pictures: Path, class_images: int = 1) -> Request:
    """A run with each stage in it, as short as it gets."""
    training = TrainSettings(rank=2, steps=4, save_every=2)
    setting = Setting(cut=CUT, samples=9, class_images=class_images, training=training)
    return Request(load_images(pictures, 128, square=True), "dog", setting=setting)


def content(folder: Path) -> dict[str, Any]:
    """What every file of a folder holds, by its name; of drawn curves the name alone."""
    return {str(path.relative_to(folder)): _held(path) for path in sorted(folder.rglob("*"))}


def _held(path: Path) -> Any:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no dict
            return tensors, dict(file.metadata() or {})
    return json.loads(path.read_text()) if path.suffix == ".json" else path.name


# --- kills ---


def kill_at_random(model: Path, folder: Path, runs: int, kills: int, choose: Choose) -> list[str]:
    """What was wrong with runs of which each is killed so many times, at random moments of a whole life."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, color in enumerate(("red", "green")):
        Image.new("RGB", (128, 128), color).save(pictures / f"{number}.png")

    personalize(lambda: load(model), request(pictures), folder / "whole")  # imports all that children then have
    loaded = load(model)
    gc.freeze()  # so that children need not copy what they do not change

    def run(place: Path) -> None:
        personalize(lambda: loaded, request(pictures), place)

    expected = content(folder / "whole")
    started = time.monotonic()
    assert _child(run, folder / "again") == 0
    life = time.monotonic() - started
    trouble = [] if content(folder / "again") == expected else ["Two runs differ that were not killed."]
    for number in range(runs):
        place = folder / f"killed-{number}"
        for _ in range(kills):
            _child(run, place, choose.uniform(0, life))
        if status := _child(run, place):
            trouble.append(f"Run {number} ended with {status}.")
        elif (found := content(place)) != expected:
            other = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            trouble.append(f"Run {number} came back with others: {', '.join(other)}.")
    return trouble


def _child(run: Callable[[Path], object], place: Path, after: float | None = None) -> int:
    """Run in a child, which is killed `after` so many seconds, or when it hangs: its status as a shell has it."""
    if not (child := os.fork()):
        try:
            run(place)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ends = time.monotonic() + (LIMIT if after is None else after)
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- changes ---


def junk(choose: Choose) -> Any:
    """What does not belong where it is."""
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        3,
        1000,
        2**70,
        0.5,
        math.nan,
        math.inf,
        "",
        "text",
        "0",
        [],
        {},
        [[]],
        {"a": 1},
        [7],
    ]
    return choose.choice(values)


def change_json(data: Any, choose: Choose) -> Any:
    """The same but for one place."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0):
            places.append((node, key))
            walk(node[key])

    walk(data)
    if not places or choose.random() < 0.03:
        return junk(choose)
    node, key = choose.choice(places)
    match choose.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.insert(key, node[key])
        case 2 if isinstance(node[key], int):
            node[key] += choose.choice([-1, 1, 1000])
        case _:
            node[key] = junk(choose)
    return data


def change_json_file(path: Path, choose: Choose) -> None:
    path.write_text(json.dumps(change_json(json.loads(path.read_text()), choose)))


def change_bytes(path: Path, choose: Choose) -> None:
    data = bytearray(path.read_bytes())
    place = choose.randrange(len(data))
    match choose.randrange(5):
        case 0:
            data[place] ^= 1 << choose.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data[place:place] = choose.randbytes(choose.randrange(1, 20))
        case 3:
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        case 4:
            data = bytearray(choose.choice([b"", b"{}", b"[" * 10**5, b"version https://git-lfs", b"\xff" * 99]))
    path.write_bytes(data)


def change_header(path: Path, choose: Choose) -> None:
    """Of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = json.dumps(change_json(json.loads(data[8 : 8 + length]), choose)).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


def change_tensors(path: Path, choose: Choose) -> None:
    """Whole, with its metadata, but for one tensor."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = choose.choice(sorted(tensors))
    tensor = tensors[name]
    match choose.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.new_full(tensor.shape, choose.choice([math.nan, math.inf, 0, -1]))
        case 2:
            tensors[name] = tensor.new_zeros(*tensor.shape, 2)
        case 3:
            tensors[name] = tensor.new_zeros(choose.choice([(), (0,), (3,), (1, 1), (2, 2, 2)]))
        case 4:
            tensors[name] = tensor.to(choose.choice([torch.float64, torch.bfloat16, torch.int32, torch.bool]))
        case 5:
            tensors[name + choose.choice([" 1", "x", ".weight", ""])] = tensor + 1
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def change_metadata(path: Path, choose: Choose) -> None:
    """Of a safetensors file, one entry of it; where that is JSON, one place of that."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    name = choose.choice([*metadata, "ss_comment", "modelspec.description", "hollow.cut", "lora_adapter_metadata"])
    try:
        changed = json.dumps(change_json(json.loads(metadata[name]), choose))
    except (KeyError, ValueError):
        runs = ["a", "/a", "a/", "\\a", "C:\\a ", " ", '"', "((", "file:///a", "a.b/", "é"]
        changed = choose.choice(["{", "null", "[" * 10**5, *(run * choose.choice([10, 10**5]) for run in runs)])
    save_file(tensors, path, metadata | {name: changed})


def change_alpha(path: Path, choose: Choose) -> None:
    """What a LoRA counts, in its tensors or as diffusers says it."""
    value = choose.choice([0.0, -1.0, 1e30, 1e-30, math.nan, math.inf])
    tensors = load_file(path)
    alphas = sorted(name for name in tensors if name.endswith("alpha"))
    if alphas:
        tensors[choose.choice(alphas)] = torch.tensor(value)
    evil = choose.choice(["(a+)+$", "(", ".*.*.*.*.*.*x", "(.*)*y", "[", "a" * 10**4])
    adapters = {"unet.r": 2, "unet.lora_alpha": value, "unet.alpha_pattern": {evil: 1}, "unet.rank_pattern": {evil: 2}}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(adapters)})


SAFETENSORS = [change_bytes, change_header, change_tensors, change_metadata]


# --- what comes of it ---


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where what is inside takes longer; where that hangs, too, the process ends and says where."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def outcome(do: Callable[[], object]) -> tuple[Any, str]:
    """What came back, and what is wrong with how it ended: nothing, or that it was no sentence."""
    try:
        with limit(LIMIT):
            return do(), ""
    except HollowError as error:
        said = str(error)
        sentences = 1 <= said.count(". ") + 1 <= 4 and said.endswith(".") and len(said) < 800
        return None, "" if sentences else f"This is no sentence: {said[:1000]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__} ({error}) in {where.name}, line {where.lineno} of {where.filename}"[:500]


def change_stores(model: Path, folder: Path, number: int, choose: Choose) -> list[str]:
    """What was wrong after a store or a checkpoint was changed: it is told, or the LoRA is the same."""
    base = load(model)
    network = base.network
    examples = make_examples(base, request(folder / "pictures", class_images=0), [])
    made_by, hollowed = model_id(network), network.hollow(CUT, None)
    settings = TrainSettings(rank=2, steps=2)

    def run(place: Path, steps: int) -> dict[str, str]:
        remove_lora(hollowed.module)
        store = precompute(network, base.schedule, examples, place / "store", cut=CUT, samples=9, made_by=made_by)
        more = TrainSettings(rank=2, steps=steps)
        state = train(hollowed, base.schedule, store, more, folder=place).state
        return {name: digest(tensor) for name, tensor in state.items()}

    first = folder / "first"
    run(first, settings.steps)
    shutil.copytree(first, folder / "more")
    expected = run(folder / "more", settings.steps + 1)
    trouble = []
    for case in range(number):
        place = folder / "changed"
        shutil.copytree(first, place)
        path = choose.choice([place / CHECKPOINT, *(place / "store").iterdir()])
        change = choose.choice([change_bytes, change_json_file] if path.suffix == ".json" else SAFETENSORS)
        change(path, choose)
        before = set(place.rglob("*"))
        found, wrong = outcome(partial(run, place, settings.steps + 1))
        if found is not None and found != expected:
            wrong = "It trained another LoRA without a word."
        if any(".hollow-" in str(each) for each in {*place.rglob("*")} - before):
            wrong = "A file was left half-written."
        if wrong:
            trouble.append(f"Case {case}, {change.__name__} of {path.name}: {wrong}")
        shutil.rmtree(place)
    return trouble


def change_loras(model: Path, folder: Path, number: int, choose: Choose) -> list[str]:
    """What was wrong after a LoRA file was changed: it is told, or the file can be loaded and converted."""
    network = load(model).network
    unet, config = network.module, dict(network.config)
    whole = []
    for dialect in DIALECTS:
        target = folder / (dialect if dialect == "peft" else f"{dialect}.safetensors")
        lora_file.convert(folder / "whole" / "lora.safetensors", target, dialect, config=config)
        whole.append(target / "adapter_model.safetensors" if dialect == "peft" else target)
    trouble = []
    for case in range(number):
        path, out = folder / "changed.safetensors", folder / "out.safetensors"
        shutil.copyfile(choose.choice(whole), path)
        change = choose.choice([*SAFETENSORS, change_alpha])
        change(path, choose)
        spelling = choose.choice(["kohya", "comfy", "diffusers"])
        for do in (
            partial(lora_file.load, path, unet),
            partial(lora_file.convert, path, out, spelling, config=config),
        ):
            _, wrong = outcome(do)
            if wrong:
                trouble.append(f"Case {case}, {change.__name__}: {wrong}")
        if out.exists():
            if any(not tensor.isfinite().all() for tensor in load_file(out).values()):
                trouble.append(f"Case {case}, {change.__name__}: It was converted into a file that is not finite.")
            out.unlink()
        if left := list(folder.glob(".hollow-*")):
            trouble.append(f"Case {case}, {change.__name__}: It left {left[0].name}.")
    return trouble


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=UNET.folder, help="A model of Stable Diffusion's kind.")
    parser.add_argument("--runs", type=int, default=20, help="Runs that are killed.")
    parser.add_argument("--kills", type=int, default=10, help="How often each is.")
    parser.add_argument("--mutations", type=int, default=1000, help="Stores and checkpoints that are changed.")
    parser.add_argument("--loras", type=int, default=5000, help="LoRA files that are changed.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # children of a process with more would wait for threads that they have not
    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place), options.model
        found, took = {}, {}
        for name, trouble in (
            ("killed", lambda: kill_at_random(model, folder, options.runs, options.kills, Choose(options.seed))),
            ("stores and checkpoints", lambda: change_stores(model, folder, options.mutations, Choose(options.seed))),
            ("LoRA files", lambda: change_loras(model, folder, options.loras, Choose(options.seed))),
        ):
            before = os.times()
            found[name] = trouble()
            took[name] = sum(os.times()[:4]) - sum(before[:4])
            print(name, took[name], file=sys.stderr)
    print(json.dumps(found, indent=1))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
