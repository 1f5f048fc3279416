"""The record store: stage 1 leaves here, in a folder that survives a crash, what stage 2 trains on.

    store.json                  what the store was made from, and the plan of its records
    inputs.safetensors          latents and prompt embeddings for training, named by a digest of their content
    records-00000.safetensors   what the base path has left for records 0 to 7, and so on: each tensor under the
                                record's number, and its name behind it where it has one

Every file appears whole or not at all, and store.json comes before the first shard: whatever a killed run
has left, the missing shards are what remains to be done.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import HollowError
from ..files import read_json, write_json, write_safetensors
from ..nets.conditioning import Conditioning
from ..nets.network import Cut, Stored, read_cut
from ..nets.schedule import NoiseSchedule

FORMAT = 1
SHARD = 8  # records a file: no more than these are lost when a run is killed
SHARD_FILES = "records-*.safetensors"

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
        return {name: value for name, value in asdict(self).items() if value or name not in ("repeats", "masks")}

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

    def __init__(self, folder: Path, fingerprint: Fingerprint, records: Sequence[Record]) -> None:
        self.folder, self.fingerprint, self.records = folder, fingerprint, tuple(records)

    @classmethod
    def open_or_create(
        cls,
        folder: Path | str,
        fingerprint: Fingerprint,
        records: Sequence[Record],
        inputs: Mapping[str, torch.Tensor],
    ) -> "Store":
        """The store in `folder`, or a new one with the plan `records` and the tensors of training by digest.

        Raises HollowError for a store that was made from something else, saying what differs, for a damaged
        one, and where the folder cannot be written.
        """
        folder = Path(folder)
        if (folder / "store.json").exists():
            store = cls.open(folder)
            if differences := store.fingerprint.differences(fingerprint):
                raise OtherStore(
                    f"The store in {folder} was made from something else: {', '.join(differences)}. "
                    "Ask for what it was made from, choose another folder, or delete this one."
                )
            return store
        for shard in folder.glob(SHARD_FILES):  # of a store whose store.json was thrown away
            shard.unlink()
        write_safetensors(folder / "inputs.safetensors", inputs)
        plan = [dict(zip(Record._fields[:4], record, strict=False)) for record in records]
        index = {"format": FORMAT, "fingerprint": fingerprint.content(), "records": plan}
        write_json(folder / "store.json", index)
        return cls(folder, fingerprint, records)

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """The store in `folder`; looks into every file but reads no record.

        Raises HollowError for a missing or damaged file; a shard not yet made is in `missing`, no error.
        """
        path = Path(folder) / "store.json"
        index = read_json(path)
        try:
            if index["format"] != FORMAT:
                raise HollowError(f"{path} has the unknown format {index['format']}. Precompute into a new folder.")
            fingerprint = Fingerprint(**{**index["fingerprint"], "cut": read_cut(index["fingerprint"]["cut"])})
            store = cls(path.parent, fingerprint, [Record(**record) for record in index["records"]])
            with store._open_inputs():
                pass
        except (KeyError, TypeError) as error:
            raise HollowError(
                f"{path} is no index of a record store ({error!r}). Delete its folder and precompute anew."
            ) from error
        for shard in set(store._shards()) - set(store.missing):
            with store._open_shard(shard):
                pass
        return store

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

    def _open_inputs(self) -> AbstractContextManager[safe_open]:
        images = range(len(self.fingerprint.kinds))
        embeddings = [name for image in images for name in self._embedding(image).values()]
        expected = {*self.fingerprint.latents, *embeddings, *filter(None, self.fingerprint.masks)}
        return _open(self._inputs_path, lambda _: expected, f"Delete {self.folder} and precompute anew.")

    def _open_shard(self, shard: int) -> AbstractContextManager[safe_open]:
        def expected(keys: set[str]) -> set[str]:
            names = _names(keys) or {""}  # of an empty file, which is not whole
            return {_key(index, name) for index in self.shard(shard) for name in names}

        return _open(self._shard_path(shard), expected, "Delete it and precompute again: the rest is kept.")


def _key(index: int, name: str) -> str:
    """Of a record's tensor in its shard: "7", or "7 residual" if it has a name."""
    return f"{index} {name}" if name else str(index)


def _names(keys: Iterable[str]) -> set[str]:
    """Of the tensors that each record of a shard has."""
    return {key.partition(" ")[2] for key in keys}


@contextmanager
def _open(path: Path, expected: Callable[[set[str]], set[str]], remedy: str) -> Iterator[safe_open]:
    """A safetensors file that holds just the tensors `expected` of one with its keys; only its header is read."""
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            if keys != expected(keys):
                raise HollowError(f"{path} does not hold what its store.json says. {remedy}")
            yield file
    except (OSError, SafetensorError) as error:
        raise HollowError(f"{path} is missing or damaged ({error}). {remedy}") from error
