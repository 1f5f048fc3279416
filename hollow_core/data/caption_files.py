"""Captions of pictures, from the files beside them."""

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HollowError

ENDINGS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")  # as Hugging Face's imagefolder has them
COLUMNS = ("text", "caption", "prompt")  # of a table: its caption, the first that a row has
MARKED = {  # encodings by the mark at the beginning, the longer marks first
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Captions:
    """Those of the pictures in a folder.

    Of rex.jpg it is the text in rex.txt, else in rex.caption, rex.jpg.txt or rex.jpg.caption, else what metadata.jsonl
    or metadata.csv says of it, in the folder or in `root`, of which it is a part. The first that is there and not empty
    counts, and the others are not read.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        files = [file for file in folder.iterdir() if file.suffix.lower() in ENDINGS]
        self._exact = {(file.stem, file.suffix.lower()): file for file in files}
        self._folded = {(file.stem.lower(), file.suffix.lower()): file for file in files}
        self.tables = [table for place in dict.fromkeys((folder, root or folder)) for table in _tables(place)]
        self.read: set[Path] = set()
        """The files of which a caption was taken."""

    def of(self, picture: Path) -> str | None:
        """The caption of a picture, None without one. Raises HollowError for a file that is no text, and for a table
        that cannot be read or says two things of one picture."""
        for file in self.beside(picture):
            if text := text_in(file).strip():
                self.read.add(file)
                return text
        for table in self.tables:
            if told := self._told[table].get(picture.relative_to(table.parent).as_posix()):
                self.read.add(table)
                return told
        return None

    def beside(self, picture: Path) -> list[Path]:
        """The texts that belong to a picture, the first of which counts."""
        keys = [(name, ending) for name in (picture.stem, picture.name) for ending in ENDINGS]
        found = (self._exact.get(key) or self._folded.get((key[0].lower(), key[1])) for key in keys)
        return [file for file in found if file is not None]

    @cached_property
    def _told(self) -> dict[Path, dict[str, str]]:
        """What each table says of the pictures it names."""
        return {table: _captions_in(table) for table in self.tables}


def in_words(captions: Sequence[str | None]) -> str:
    """How many there are: "Captions for 3 of 5 pictures"."""
    return f"Captions for {sum(caption is not None for caption in captions)} of {len(captions)} pictures"


def text_in(file: Path) -> str:
    """What a text says that is UTF-8, or UTF-16 with its mark, or else in Windows' Western letters, which are those of
    Latin-1 and a few more. Raises HollowError for one that is none of these."""
    try:
        data = file.read_bytes()
        encoding = next((name for mark, name in MARKED.items() if data.startswith(mark)), "utf-8")
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            if encoding != "utf-8":
                raise
            text = data.decode("cp1252")
    except (OSError, UnicodeDecodeError) as error:
        raise _no_text(file) from error
    if any(unicodedata.category(letter) == "Cc" and not letter.isspace() for letter in text):
        raise _no_text(file)
    return text


def _no_text(file: Path) -> HollowError:
    return HollowError(f"The caption {file} is no readable text. Save it as UTF-8, or remove it.")


def _tables(folder: Path) -> list[Path]:
    return [folder / name for name in TABLES if (folder / name).is_file()]


def _captions_in(table: Path) -> dict[str, str]:
    """Caption by file name, with / for folders, of the rows that have both."""
    captions: dict[str, str] = {}
    for row in (_csv_rows if table.suffix == ".csv" else _json_rows)(table):
        name, caption = row.get("file_name"), next((row[key] for key in COLUMNS if row.get(key)), None)
        if not isinstance(name, str) or not isinstance(caption, str) or not caption.strip():
            continue
        name = PurePosixPath(name.replace("\\", "/")).as_posix()
        if captions.setdefault(name, caption.strip()) != caption.strip():
            raise HollowError(f"{table} has two captions for {name}. Keep one of them.")
    return captions


def _csv_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text_in(table)))
    except csv.Error as error:
        raise HollowError(
            f"{table} is no table of captions ({error}). Write its columns anew, or remove it."
        ) from error


def _json_rows(table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text_in(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise HollowError(
                f"{table} is no table of captions: line {number} is no JSON. Write lines such as "
                '{"file_name": "rex.jpg", "text": "a photo of a sks dog"}, or remove it.'
            )
        yield row
