"""Stage 1: run the base path and keep what it leaves for each record (Hollowed Net, Sec. 4.3)."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import get_args

import torch

from ..errors import HollowError
from ..files import digest
from ..lora.layers import lora_parameters
from ..nets.conditioning import Conditioning
from ..nets.network import BasePath, Cut, Network, Stored
from ..nets.schedule import NoiseSchedule
from ..nets.transfer import Arriving
from ..progress import Clock, Stop, Watch
from ..seeds import check_seed
from .ahead import one_behind
from .store import Fingerprint, Kind, OtherStore, Record, Store, store_id

HELD_OUT_LOOKS = 4  # records of each held-out picture, in the middles of as many stretches of time

STORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Example:
    """A picture with its two prompts: one of the subject ("image"), or one of its class ("prior").

    A prior example trains on its generic prompt (P_pr of Eq. 2), its personal one is not looked at. The first
    "low image" is the first "image" at a lower resolution, or a crop of it, and so on; likewise "low prior". A
    "held-out image" is not trained on. Examples that share a tensor of latents are one picture under several prompts.
    """

    latents: torch.Tensor  # (1, channels, height, width), scaled as the network expects them
    personal: Conditioning  # "a photo of a sks dog": what training sees
    generic: Conditioning  # "a photo of a dog": what the base path sees
    personal_prompt: str
    generic_prompt: str
    kind: Kind = "image"
    repeats: int = 1  # how often the picture is learned for once of the others
    mask: torch.Tensor | None = None  # (1, 1, height, width) from 0 to 1: how much each latent counts; None: all alike


def precompute(
    network: Network,
    schedule: NoiseSchedule,
    examples: Sequence[Example],
    folder: Path | str,
    *,
    cut: Cut | None,
    samples: int = 200,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    together: int = 1,
    made_by: str | None = None,
    apart: bool = False,
    beside: bool = False,
    records: Sequence[Record] | None = None,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> Store:
    """Make the records that `train` reads, or those of them that an interrupted run has not made yet.

    `samples` is the number of records, half of them (rounded down) for the prior if it has examples; low
    examples add as many again, held-out ones a few, see `plan`. What the base path leaves is kept in `dtype`: float16,
    bfloat16 or float32. With `cut` None nothing is to be hollowed, and of the records, for an ordinary LoRA, nothing is
    stored.
    `together` lets so many records of one size pass the network at once, at most the eight of a shard: faster where the
    device is not busy with one, for the memory of so many, and the same but for rounding. `made_by` is the network's
    `model_id`; None computes it, which takes seconds for a large one, and more from a GPU.
    `apart` keeps the store in a folder of its own inside `folder`, named by what it is made from, so that other
    inputs never meet it; `beside` does so only where there is a store of other inputs in `folder`, beside which it then
    is. Either takes from stores beside it what they have of the same records, where these pass the network one by one.
    `records` are those to make; None: what `plan_for` says. `progress` is called after each record, on a GPU as soon as
    it is asked for; `stop` is asked before those that go together, and a stopped run gives back a store with shards
    missing. A shard is written while the next one is made.

    What is damaged of a store in `folder` is named in the log and made anew. Raises HollowError for wrong arguments,
    for a store whose index is damaged or that was made from something else, for an activation that overflows, and
    where the disk is full. What is written by then stays good.
    """
    _check(network, schedule, examples, cut=cut, samples=samples, seed=seed, dtype=dtype, together=together)
    made_by = model_id(network) if made_by is None else made_by
    fingerprint, inputs = _fingerprint(made_by, schedule, examples, cut, samples, seed, dtype)
    records = plan_for(examples, samples, schedule, seed) if records is None else records
    if apart:
        folder = Path(folder) / store_id(fingerprint, records)[:12]
    store = _store(Path(folder), fingerprint, records, inputs, beside)
    store.check_timesteps(schedule)
    if cut is None:
        return store

    base = network.base(cut)
    base.module.eval()
    examples = [replace(example, latents=example.latents.float().cpu()) for example in examples]  # where noise is made
    elsewhere = _elsewhere(store, base, schedule) if (apart or beside) and together == 1 else {}
    step = len(records) - sum(len(store.shard(shard)) for shard in store.missing) + len(elsewhere)
    clock = Clock(step, len(records))
    with one_behind() as later:
        for shard in store.missing:
            left: list[tuple[list[int], Arriving]] = []
            found: dict[int, Stored] = {}
            for index in elsewhere.keys() & store.shard(shard):
                with suppress(HollowError):  # of a damaged one: it is made anew
                    other, there = elsewhere[index]
                    found[index] = other.record(there).stored
            todo = [index for index in store.shard(shard) if index not in found]
            for indices in _alike(base, todo, store.records, examples, together):
                if stop is not None and stop():
                    return store
                records_now = [store.records[index] for index in indices]
                of_each = [examples[record.image] for record in records_now]
                activations = run_base(base, schedule, records_now, of_each)
                kept = {name: tensor.to(dtype) for name, tensor in activations.items()}
                left.append((indices, Arriving(kept)))
                for _ in indices:
                    step += 1
                    if progress is not None:
                        progress(clock(step))
            later(_write, store, shard, left, found)
    return store


def _store(
    folder: Path,
    fingerprint: Fingerprint,
    records: Sequence[Record],
    inputs: Mapping[str, torch.Tensor],
    beside: bool,
) -> Store:
    """That in `folder`, or where this has one of something else and `beside` is asked, in one named after it."""
    own = folder.with_name(f"{folder.name}-{store_id(fingerprint, records)[:12]}")
    if beside and own.exists():
        folder = own
    try:
        return Store.open_or_create(folder, fingerprint, records, inputs)
    except OtherStore:
        if not beside:
            raise
    return Store.open_or_create(own, fingerprint, records, inputs)


def run_base(base: BasePath, schedule: NoiseSchedule, records: Sequence[Record], examples: Sequence[Example]) -> Stored:
    """What the base path leaves for records, each of its example, under the prompt that it sees: tensors (batch, …)."""
    noisy = [record.noisy(schedule, example.latents)[0] for record, example in zip(records, examples, strict=True)]
    prompts = Conditioning.batch([_seen(base, example) for example in examples])
    return base(torch.cat(noisy), [record.timestep for record in records], prompts)


def _seen(base: BasePath, example: Example) -> Conditioning:
    """The prompt that the base path sees of an example."""
    return example.personal if base.sees_identifier and example.kind.endswith("image") else example.generic


def _alike(
    base: BasePath, indices: Iterable[int], records: Sequence[Record], examples: Sequence[Example], together: int
) -> Iterator[list[int]]:
    """`indices` in lots of up to so many whose pictures are of one size, and whose prompts are alike."""
    sizes: dict[Hashable, list[int]] = {}
    for index in indices:
        example = examples[records[index].image]
        size = example.latents.shape, _seen(base, example).alike
        sizes.setdefault(size, []).append(index)
    for alike in sizes.values():
        yield from (alike[first : first + together] for first in range(0, len(alike), together))


def _elsewhere(store: Store, base: BasePath, schedule: NoiseSchedule) -> dict[int, tuple[Store, int]]:
    """Of the records that are still to be made those that a store beside this one has, and under which number: of the
    same picture, prompt, time step and noise, left by the same base at the same cut."""

    def content(each: Store, index: int) -> Hashable:
        record = each.records[index]
        seen = "personal" if base.sees_identifier and record.kind.endswith("image") else "generic"
        embedding = each.fingerprint.embeddings[record.image][seen]
        return each.fingerprint.latents[record.image], *sorted(embedding.items()), record.timestep, record.noise_seed

    def alike(each: Store) -> Sequence[Hashable]:
        made = each.fingerprint
        return made.model, made.cut, made.schedule, made.dtype

    there: dict[Hashable, tuple[Store, int]] = {}
    for path in store.folder.parent.glob("*/store.json"):
        with suppress(HollowError):  # a damaged one is no help, and no harm
            other = Store.open(path.parent)
            if store.missing and alike(other) == alike(store):
                other.check(schedule)
                missing = {index for shard in other.missing for index in other.shard(shard)}
                whole = [index for index in range(len(other.records)) if index not in missing]
                there |= {content(other, index): (other, index) for index in whole}
    wanted = [index for shard in store.missing for index in store.shard(shard)]
    return {index: there[key] for index in wanted if (key := content(store, index)) in there}


def _write(
    store: Store, shard: int, left: Sequence[tuple[Sequence[int], Arriving]], found: Mapping[int, Stored]
) -> None:
    """Keep a shard of what the base path has left, as it arrives, and of what is `found`."""
    stored: dict[int, Stored] = {**found}
    for indices, arriving in left:
        tensors = arriving.wait()
        for place, index in enumerate(indices):
            stored[index] = {name: tensor[place : place + 1] for name, tensor in tensors.items()}
            if not all(tensor.isfinite().all() for tensor in stored[index].values()):
                raise HollowError(
                    f"The exit activation at time step {store.records[index].timestep} is not finite in "
                    f"{store.fingerprint.dtype}. Keep the records in bfloat16, or load the model in float32."
                )
    store.write_shard(shard, stored)


def plan_for(examples: Sequence[Example], samples: int, schedule: NoiseSchedule, seed: int) -> list[Record]:
    """`plan`, as examples have it: those that share a tensor of latents show one picture."""
    kinds, pictures, repeats = zip(*((each.kind, id(each.latents), each.repeats) for each in examples), strict=True)
    return plan(kinds, samples, schedule, seed, pictures=pictures, repeats=repeats)


def plan(
    kinds: Sequence[Kind],
    samples: int,
    schedule: NoiseSchedule,
    seed: int,
    *,
    pictures: Sequence[Hashable] = (),
    repeats: Sequence[int] = (),
) -> list[Record]:
    """The records to make: stratified over the time steps that the schedule draws, and dealt evenly over the pictures.

    The images share `samples` records, or half of them (rounded up) where there is a prior for the rest. Where
    there are low examples, each of these records has a twin of the same time step and noise seed behind them. Each
    held-out example has a few more, always of the same time steps and noise. Of each example `pictures` says which it
    shows, those that show the same taking turns, and `repeats` how often it is dealt for once of the others; by
    default each shows its own, once.
    """
    generator = torch.Generator().manual_seed(seed)
    images, prior, low_images, low_prior, held_out = (
        [index for index, kind in enumerate(kinds) if kind == wanted] for wanted in get_args(Kind)
    )

    def stratified(kind: Kind, examples: Sequence[int], number: int) -> list[Record]:
        shown: dict[Hashable, list[int]] = {}
        for index in examples:
            shown.setdefault(pictures[index] if pictures else index, []).append(index)
        often = [repeats[indices[0]] if repeats else 1 for indices in shown.values()]
        return _stratified(kind, list(shown.values()), often, number, schedule, generator)

    prior_samples = samples // 2 if prior else 0
    records = [*stratified("image", images, samples - prior_samples), *stratified("prior", prior, prior_samples)]
    low = dict(zip([*images, *prior], [*low_images, *low_prior], strict=True)) if low_images else {}
    twins = [record._replace(image=low[record.image], kind=kinds[low[record.image]]) for record in records if low]
    middles = schedule.drawn(torch.arange(HELD_OUT_LOOKS, dtype=torch.float64) + 0.5, HELD_OUT_LOOKS).tolist()
    looks = [
        Record(index, "held-out image", timestep, look) for index in held_out for look, timestep in enumerate(middles)
    ]
    return [*records, *twins, *looks]


def _stratified(
    kind: Kind,
    pictures: Sequence[Sequence[int]],
    often: Sequence[int],
    samples: int,
    schedule: NoiseSchedule,
    generator: torch.Generator,
) -> list[Record]:
    """One draw from each of `samples` equal stretches of time.

    Each run of as many stretches as there are pictures, each counted as `often` as it is to be seen, is dealt to all of
    them in a random order: so every picture, too, is spread over the time steps. Its examples take turns.
    """
    places = torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)
    drawn = schedule.drawn(places, samples).tolist()
    common = math.gcd(*often) or 1
    in_a_round = [number for number, times in enumerate(often) for _ in range(times // common)]
    rounds = math.ceil(samples / max(len(in_a_round), 1))
    dealt = [in_a_round[i] for _ in range(rounds) for i in torch.randperm(len(in_a_round), generator=generator)]
    turns = [cycle(examples) for examples in pictures]
    seeds = torch.randint(2**32, (samples,), generator=generator).tolist()
    return [Record(next(turns[number]), kind, t, s) for number, t, s in zip(dealt[:samples], drawn, seeds, strict=True)]


def check_samples(samples: int, kinds: int = 1) -> None:
    """Raises HollowError for fewer records than one of each kind: of the subject and, where it has any, its class."""
    if samples < kinds:
        raise HollowError(f"{samples} records are too few. Ask for at least {kinds}; 200 are usual.")


def model_id(network: Network) -> str:
    """A name for a network's config and weights, as they are loaded."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.module.state_dict().items()):
        sha.update(f"{name} {digest(tensor)}".encode())
    return sha.hexdigest()[:32]


def _fingerprint(
    made_by: str,
    schedule: NoiseSchedule,
    examples: Sequence[Example],
    cut: Cut | None,
    samples: int,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Fingerprint, Mapping[str, torch.Tensor]]:
    """With the tensors that training needs, by digest: an embedding that many examples share is kept once."""
    inputs: dict[str, torch.Tensor] = {}
    latents, embeddings = [], []
    name = cache(digest)  # of what is shared, once
    for example in examples:
        tensors = {"personal": _tensors(example.personal), "generic": _tensors(example.generic)}
        z = example.latents.float()
        latents.append(name(z))
        embeddings.append({p: {part: name(t) for part, t in e.items()} for p, e in tensors.items()})
        trained = tensors["personal" if example.kind.endswith("image") else "generic"]
        kept = [z, *trained.values(), *([] if example.mask is None else [example.mask])]
        inputs |= {name(t): t.detach().cpu().clone() for t in kept if name(t) not in inputs}
    masks = ["" if example.mask is None else name(example.mask) for example in examples]
    return Fingerprint(
        model=made_by,
        cut=cut,
        schedule=schedule.id,
        samples=samples,
        seed=seed,
        dtype=_name(dtype),
        kinds=[example.kind for example in examples],
        prompts=[{"personal": e.personal_prompt, "generic": e.generic_prompt} for e in examples],
        embeddings=embeddings,
        latents=latents,
        repeats=[e.repeats for e in examples] if any(e.repeats != 1 for e in examples) else [],
        masks=masks if any(masks) else [],
    ), inputs


def _tensors(conditioning: Conditioning) -> dict[str, torch.Tensor]:
    return {part: tensor for part, tensor in conditioning._asdict().items() if tensor is not None}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    network: Network,
    schedule: NoiseSchedule,
    examples: Sequence[Example],
    *,
    cut: Cut | None,
    samples: int,
    seed: int,
    dtype: torch.dtype,
    together: int,
) -> None:
    check_seed(seed)
    if cut is not None:
        network.check_cut(cut)
    if lora_parameters(network.module):
        raise HollowError("This U-Net carries a LoRA, but the base path runs without one. Take it out first.")
    if dtype not in STORE_DTYPES:
        names = ", ".join(_name(known) for known in STORE_DTYPES)
        raise HollowError(f"Records cannot be kept in {_name(dtype)}. Choose one of {names}.")
    counts = Counter(example.kind for example in examples)
    kinds = counts.keys() & {"image", "prior"}
    if "image" not in kinds:
        raise HollowError("There is no image to train on. Give at least one of the subject.")
    low = counts["low image"], counts["low prior"]
    if low not in ((0, 0), (counts["image"], counts["prior"])):
        raise HollowError(
            f"There are {low[0]} images and {low[1]} class pictures at a lower resolution, but {counts['image']} and "
            f"{counts['prior']} at full. Give each of them a twin, in the same order, or none."
        )
    _check_twins(examples)
    check_samples(samples, len(kinds))
    if together < 1:
        raise HollowError(f"together is {together}. It must be at least 1.")
    schedule.check()
    for number, example in enumerate(examples):
        network.check_inputs(f"example {number}", example.latents, [example.personal, example.generic])
        if example.mask is not None and example.mask.shape != (1, 1, *example.latents.shape[-2:]):
            raise HollowError(
                f"The mask of example {number} has the shape {tuple(example.mask.shape)}. "
                "Give it (1, 1, height, width), as its latents have."
            )
        if not example.latents.isfinite().all():
            raise HollowError(f"The latents of example {number} are not finite. Encode the picture in float32.")


def _check_twins(examples: Sequence[Example]) -> None:
    for kind in ("image", "prior"):
        full, low = ([e.latents.shape[-2:] for e in examples if e.kind == of] for of in (kind, f"low {kind}"))
        for large, small in zip(full, low, strict=False):
            if any(side >= whole for side, whole in zip(small, large, strict=True)):
                raise HollowError(
                    f"A picture's latents at the lower resolution are {small[0]}×{small[1]}, but {large[0]}×{large[1]} "
                    "at full. Make the low ones smaller, half as large for example."
                )
