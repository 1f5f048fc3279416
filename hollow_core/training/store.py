"""The record store: stage 1 leaves here, in a folder that survives a crash, what stage 2 trains on.

    store.json                  what the store was made from, the plan of its records, and a digest of each shard
    inputs.safetensors          latents and prompt embeddings for training, named by a digest of their content
    records-00000.safetensors   what the base path has left for records 0 to 7, and so on: each tensor under the
                                record's number, and its name behind it where it has one

Every file appears whole or not at all, and store.json comes before the first shard, as it does before each other with
its digest: whatever a killed run has left, the missing shards are what remains to be done.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open

from ..errors import HollowError
from ..files import digest, digest_all, fits, read_json, write_json, write_safetensors
from ..nets.conditioning import Conditioning
from ..nets.network import Cut, Stored, read_cut
from ..nets.schedule import NoiseSchedule

FORMAT = 1
SHARD = 8  # records a file: no more than these are lost when a run is killed
SHARD_FILES = "records-*.safetensors"
_REMEDY = "Precompute again: it is made anew, and the rest is kept."
_log = logging.getLogger(__name__)

Kind = Literal["image", "prior", "low image", "low prior", "held-out image"]
"""Whether a record is of the subject or of its class, "low" if at a lower resolution, as the twin of another, and
"held-out" if it is not trained on, but tells by its loss what is learned."""


class Record(NamedTuple):
    """One noisy latent, and what the base path has left for it.

    The noise is not kept, its seed is. `stored` is empty until it is read from the shard, and always in a store
    without a cut.
    """

    image: int  # index among the examples
    kind: Kind
    timestep: int
    noise_seed: int
    stored: Stored = MappingProxyType({})

    def noisy(self, schedule: NoiseSchedule, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z_t = α_t z + σ_t ε, and ε, for latents z (1, channels, height, width).

        In float32 and on the CPU, so that both stages see the same on every device.
        """
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.noise_seed))
        return schedule.noisy(latents.float().cpu(), noise, self.timestep), noise


_LATER = ("repeats", "masks")  # of a fingerprint, which older stores do not have


@dataclass(frozen=True)
class Fingerprint:
    """All that decides what is in a store. Tensors stand as digests, lists have one entry an example."""

    model: str
    cut: Cut | None  # None: nothing hollowed, so records of which nothing is stored, for an ordinary LoRA
    schedule: str
    samples: int
    seed: int
    dtype: str
    kinds: list[Kind]
    prompts: list[dict[str, str]]  # "personal" and "generic"
    embeddings: list[dict[str, dict[str, str]]]  # of each prompt the tensors of its Conditioning
    latents: list[str]
    repeats: list[int] = field(default_factory=list)  # empty: all 1
    masks: list[str] = field(default_factory=list)  # "" where there is none; empty: none anywhere

    def content(self) -> dict[str, Any]:
        """All of it, as a name is made from it: what older stores did not have, only where it says something."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, in words, where this one is stored and `other` is asked for."""
        stored, asked = asdict(self), asdict(other)
        named = {
            name: f"{name} ({stored[name]} stored, {asked[name]} asked)" for name in ("cut", "samples", "seed", "dtype")
        } | {
            "model": "model (other weights, or the same in another precision)",
            "kinds": "which pictures are learned, of the class or held out",
            "prompts": "captions and prompts",
            "embeddings": "embedded prompts",
            "latents": "the pictures themselves",
            "repeats": "how often pictures are repeated",
        }
        return [named.get(name, name) for name in stored if stored[name] != asked[name]]


def store_id(fingerprint: Fingerprint, records: Sequence[Record]) -> str:
    """A name for a store that is made from this and holds these records."""
    content = [fingerprint.content(), [record[:4] for record in records]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class OtherStore(HollowError):
    """Where a store is to be, there is one of something else."""


class Store:
    """A folder of records, whole or with shards still missing."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        records: Sequence[Record],
        digests: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.folder, self.fingerprint, self.records = folder, fingerprint, tuple(records)
        self._digests = dict(digests)  # of each shard, but for those that older versions made

    @classmethod
    def open_or_create(
        cls,
        folder: Path | str,
        fingerprint: Fingerprint,
        records: Sequence[Record],
        inputs: Mapping[str, torch.Tensor],
    ) -> "Store":
        """The store in `folder`, or a new one with the plan `records` and the tensors of training by digest.

        Reads all there is: a shard that is damaged, or not the one that was written, is named in the log and deleted,
        so that it is made anew; inputs are written again. Raises HollowError for a store that was made from something
        else, saying what differs, for a damaged store.json, and where the folder cannot be written.
        """
        folder = Path(folder)
        if (folder / "store.json").exists():
            store = cls._of_index(folder)
            if differences := store.fingerprint.differences(fingerprint):
                raise OtherStore(
                    f"The store in {folder} was made from something else: {', '.join(differences)}. "
                    "Ask for what it was made from, choose another folder, or delete this one."
                )
            try:
                store._check_inputs()
            except HollowError as error:
                _log.warning("%s", _made_anew(error))
                write_safetensors(store._inputs_path, inputs)
            for shard in store._made:
                try:
                    store._check_shard(shard)
                except HollowError as error:
                    _log.warning("%s", _made_anew(error))
                    with suppress(OSError):  # then training tells
                        store._shard_path(shard).unlink()
            return store
        for shard_file in folder.glob(SHARD_FILES):  # of a store whose store.json was thrown away
            shard_file.unlink()
        store = cls(folder, fingerprint, records, {})
        write_safetensors(store._inputs_path, inputs)
        store._write_index()
        return store

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """The store in `folder`; looks into every file but reads no record.

        Raises HollowError for a missing or damaged file; a shard not yet made is in `missing`, no error.
        """
        store = cls._of_index(Path(folder))
        with store._open_inputs():
            pass
        for shard in store._made:
            with store._open_shard(shard):
                pass
        return store

    @classmethod
    def _of_index(cls, folder: Path) -> "Store":
        """As store.json has it; looks at nothing else. Raises HollowError where it is damaged or was edited."""
        path = folder / "store.json"
        index = read_json(path)
        try:
            if index["format"] != FORMAT:
                raise HollowError(f"{path} has the unknown format {index['format']}. Precompute into a new folder.")
            fingerprint, records, digests = _read_index(index)
        except (KeyError, TypeError, ValueError) as error:
            why = error if type(error) is ValueError else repr(error)
            raise HollowError(
                f"{path} is no index of a record store ({why}). Delete its folder and precompute anew."
            ) from error
        store = cls(folder, fingerprint, records, digests)
        if index.get("id", store.id) != store.id:
            raise HollowError(f"{path} was changed since it was made. Delete its folder and precompute anew.")
        return store

    def _write_index(self) -> None:
        plan = [dict(zip(Record._fields[:4], record, strict=False)) for record in self.records]
        index = {"format": FORMAT, "id": self.id, "fingerprint": self.fingerprint.content(), "records": plan}
        digests = {str(shard): self._digests[shard] for shard in sorted(self._digests)}
        write_json(self.folder / "store.json", index | {"digests": digests})

    def check_timesteps(self, schedule: NoiseSchedule) -> None:
        """Raises HollowError for a record at a time step that `schedule` has not, as where store.json was edited."""
        for index, record in enumerate(self.records):
            if record.timestep >= len(schedule):
                raise HollowError(
                    f"{self.folder / 'store.json'} has record {index} at the time step {record.timestep}, but the "
                    f"last is {len(schedule) - 1}. Delete its folder and precompute anew."
                )

    def check(self, schedule: NoiseSchedule) -> None:
        """Read all there is. Raises HollowError as `check_timesteps` does, and for a file that is damaged or not the
        one that was written."""
        self.check_timesteps(schedule)
        self._check_inputs()
        for shard in self._made:
            self._check_shard(shard)

    @property
    def cut(self) -> Cut | None:
        """What the records were made for; None where nothing is hollowed."""
        return self.fingerprint.cut

    @property
    def id(self) -> str:
        """A name for what the store was made from and what is planned to be in it."""
        return store_id(self.fingerprint, self.records)

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be made."""
        return [shard for shard in self._shards() if not self._shard_path(shard).exists()]

    @property
    def _made(self) -> list[int]:
        return [shard for shard in self._shards() if self._shard_path(shard).exists()]

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""
        files = [self.folder / "store.json", self._inputs_path, *self.folder.glob(SHARD_FILES)]
        return sum(path.stat().st_size for path in files)

    def indices(self, kind: Kind) -> list[int]:
        """Which records are of this kind; a low kind's are the twins of the other's, in the same order."""
        return [index for index, record in enumerate(self.records) if record.kind == kind]

    def shard(self, shard: int) -> range:
        """Which records are in this shard."""
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.records)))

    def write_shard(self, shard: int, stored: Mapping[int, Stored]) -> None:
        """Keep what the base path has left for all records of a shard, by record; each has the same names."""
        tensors = {_key(index, name): tensor for index, each in stored.items() for name, tensor in each.items()}
        self._digests[shard] = digest_all(tensors.items())
        self._write_index()
        write_safetensors(self._shard_path(shard), tensors)

    def record(self, index: int) -> Record:
        """One record with what is stored of it; reads no other. Raises HollowError for a damaged file."""
        record = self.records[index]
        if self.cut is None:
            return record
        with self._open_shard(index // SHARD) as file:
            keys = {name: _key(index, name) for name in _names(file.keys())}
            return record._replace(stored={name: file.get_tensor(key) for name, key in keys.items()})

    def inputs(self, image: int) -> tuple[torch.Tensor, Conditioning]:
        """What training needs of an example: scaled latents (1, channels, height, width), and the embedded prompt.

        That is the personal prompt for an image, the generic one for the prior.
        """
        with self._open_inputs() as file:
            embedding = {part: file.get_tensor(name) for part, name in self._embedding(image).items()}
            return file.get_tensor(self.fingerprint.latents[image]), Conditioning(**embedding)

    def mask(self, image: int) -> torch.Tensor | None:
        """How much each latent of an example counts: (1, 1, height, width) from 0 to 1; None: all alike."""
        masks = self.fingerprint.masks
        if not (masks and masks[image]):
            return None
        with self._open_inputs() as file:
            mask: torch.Tensor = file.get_tensor(masks[image])
            return mask

    def _embedding(self, image: int) -> dict[str, str]:
        prompt = "personal" if self.fingerprint.kinds[image].endswith("image") else "generic"
        return self.fingerprint.embeddings[image][prompt]

    def _shards(self) -> range:
        return range(0 if self.cut is None else math.ceil(len(self.records) / SHARD))

    @property
    def _inputs_path(self) -> Path:
        return self.folder / "inputs.safetensors"

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"records-{shard:05}.safetensors"

    def file_of(self, index: int) -> Path:
        """Where what is stored of a record is."""
        return self._shard_path(index // SHARD)

    def _check_inputs(self) -> None:
        with self._open_inputs() as file:
            if other := [name for name in file.keys() if digest(file.get_tensor(name)) != name]:  # noqa: SIM118
                raise HollowError(
                    f"{self._inputs_path} does not hold what was written: {min(other)} is another tensor. {_REMEDY}"
                )

    def _check_shard(self, shard: int) -> None:
        with self._open_shard(shard) as file:
            if shard in self._digests:
                found = digest_all((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no dict
                if found != self._digests[shard]:
                    raise HollowError(f"{self._shard_path(shard)} does not hold what was written. {_REMEDY}")

    def _open_inputs(self) -> AbstractContextManager[safe_open]:
        images = range(len(self.fingerprint.kinds))
        embeddings = [name for image in images for name in self._embedding(image).values()]
        expected = {*self.fingerprint.latents, *embeddings, *filter(None, self.fingerprint.masks)}
        return _open(self._inputs_path, lambda _: expected)

    def _open_shard(self, shard: int) -> AbstractContextManager[safe_open]:
        def expected(keys: set[str]) -> set[str]:
            names = _names(keys) or {""}  # of an empty file, which is not whole
            return {_key(index, name) for index in self.shard(shard) for name in names}

        return _open(self._shard_path(shard), expected)


def _made_anew(error: HollowError) -> str:
    """What is said of a damaged file where it is replaced at once."""
    return str(error).replace(_REMEDY, "It is made anew, and the rest is kept.")


def _read_index(index: Mapping[str, Any]) -> tuple[Fingerprint, list[Record], dict[int, str]]:
    """What is in a store.json. Raises KeyError, TypeError or ValueError for what `Store` does not write."""
    about, plan = index["fingerprint"], index["records"]
    for name, kind in get_type_hints(Fingerprint).items():
        if name in about and not fits(about[name], kind):
            raise ValueError(f"its {name} is {str(about[name])[:80]!r}")
    fingerprint = Fingerprint(**{**about, "cut": read_cut(about["cut"])})
    kinds = fingerprint.kinds
    for name in ("prompts", "embeddings", "latents", *_LATER):
        number = len(getattr(fingerprint, name))
        if number != len(kinds) and (number or name not in _LATER):
            raise ValueError(f"it has {len(kinds)} examples, but {number} {name}")
    for image, prompts in enumerate(fingerprint.embeddings):
        for prompt in ("personal", "generic"):
            if not {"encoder_hidden_states"} <= prompts[prompt].keys() <= {*Conditioning._fields}:
                raise ValueError(f"the {prompt} prompt of example {image} is not embedded")

    hints = {name: kind for name, kind in get_type_hints(Record).items() if name != "stored"}
    limits = {"image": len(kinds), "timestep": math.inf, "noise_seed": 2**32}
    records = []
    for number, entry in enumerate(plan):
        for name, kind in hints.items():
            value = entry[name]
            if not fits(value, kind) or (name in limits and not 0 <= value < limits[name]):
                raise ValueError(f"the {name} of record {number} is {str(value)[:80]!r}")
        records.append(Record(*(entry[name] for name in hints)))
        if records[-1].kind != kinds[records[-1].image]:
            raise ValueError(f"record {number} and its example are of different kinds")
    counts = Counter(record.kind for record in records)
    if not counts["image"]:
        raise ValueError("there are no records of images")
    low = counts["low image"], counts["low prior"]
    if low not in ((0, 0), (counts["image"], counts["prior"])):
        raise ValueError(
            f"{low[0]} and {low[1]} records at a lower resolution for {counts['image']}, {counts['prior']}"
        )
    digests = index.get("digests", {})
    if not fits(digests, dict[str, str]):
        raise ValueError("its digests are no text")
    return fingerprint, records, {int(shard): each for shard, each in digests.items()}


def _key(index: int, name: str) -> str:
    """Of a record's tensor in its shard: "7", or "7 residual" if it has a name."""
    return f"{index} {name}" if name else str(index)


def _names(keys: Iterable[str]) -> set[str]:
    """Of the tensors that each record of a shard has."""
    return {key.partition(" ")[2] for key in keys}


@contextmanager
def _open(path: Path, expected: Callable[[set[str]], set[str]]) -> Iterator[safe_open]:
    """A safetensors file that holds just the tensors `expected` of one with its keys; only its header is read."""
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            if keys != expected(keys):
                raise HollowError(f"{path} does not hold what its store.json says. {_REMEDY}")
            yield file
    except (OSError, SafetensorError) as error:
        raise HollowError(f"{path} is missing or damaged ({error}). {_REMEDY}") from error
