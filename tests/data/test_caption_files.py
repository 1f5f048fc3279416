"""Where captions are found, and which one counts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hollow_core.data.caption_files import Captions
from hollow_core.data.folders import load_pictures
from hollow_core.data.images import load_images
from hollow_core.errors import HollowError


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    return path


def table(folder: Path, *rows: dict[str, object], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def captions(folder: Path) -> dict[str, str | None]:
    return {image.name: image.caption for image in load_images(folder, 64)}


def test_each_usual_file_is_read(tmp_path: Path) -> None:
    files = {"a.txt": "a", "b.caption": "b", "c.png.txt": "c", "d.png.caption": "d", "e.TXT": "e", "F.txt": "f"}
    for name, text in files.items():
        (tmp_path / name).write_text(f" {text}\n")
    for name in "abcdefgh":
        put(tmp_path / f"{name}.png")
    table(tmp_path, {"file_name": "g.png", "text": "g", "label": 3}, {"file_name": "gone.png", "text": "nobody"})
    told = {f"{name}.png": name for name in "abcdefg"} | {"h.png": None}
    assert captions(tmp_path) == told


def test_the_first_that_says_something_counts(tmp_path: Path) -> None:
    put(tmp_path / "rex.jpg")
    put(tmp_path / "rex.png")
    table(tmp_path, {"file_name": "rex.jpg", "text": "of the table"}, {"file_name": "rex.png", "text": "of the table"})
    said = []
    for name in ("rex.jpg.caption", "rex.jpg.txt", "rex.caption", "rex.txt"):
        (tmp_path / name).write_text(name)
        said.append(captions(tmp_path)["rex.jpg"])
    assert said == ["rex.jpg.caption", "rex.jpg.txt", "rex.caption", "rex.txt"]
    assert captions(tmp_path)["rex.png"] == "rex.txt"
    (tmp_path / "rex.txt").write_text(" \n")
    found = Captions(tmp_path)
    assert (found.of(tmp_path / "rex.jpg"), found.read) == ("rex.caption", {tmp_path / "rex.caption"})


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": "rex.jpg", "caption": "a sks dog"},
        {"file_name": "./rex.jpg", "prompt": "a sks dog", "text": ""},
        {"file_name": "rex.jpg", "text": " a sks dog\n", "caption": "another"},
    ],
)
def test_a_table_may_call_its_columns_in_several_ways(tmp_path: Path, row: dict[str, object]) -> None:
    put(tmp_path / "rex.jpg")
    table(tmp_path, {"nothing": 1}, row, row)
    assert captions(tmp_path) == {"rex.jpg": "a sks dog"}


def test_a_table_of_commas(tmp_path: Path) -> None:
    put(tmp_path / "rex.jpg")
    (tmp_path / "metadata.csv").write_text('file_name,text\nrex.jpg,"a sks dog, on grass"\n')
    assert captions(tmp_path) == {"rex.jpg": "a sks dog, on grass"}


def test_a_table_of_a_whole_project_names_its_folders(tmp_path: Path) -> None:
    put(tmp_path / "10_sks dog" / "rex.jpg")
    put(tmp_path / "5_sks dog" / "rex.jpg")
    table(tmp_path, {"file_name": "10_sks dog\\rex.jpg", "text": "a sks dog"}, {"file_name": "rex.jpg", "text": "none"})
    found = load_pictures(tmp_path, 64)
    assert [image.caption for image in found.images] == ["a sks dog", None]
    assert found.not_read == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_editors_of_any_age_write_captions(tmp_path: Path, encoding: str) -> None:
    put(tmp_path / "rex.jpg")
    (tmp_path / "rex.txt").write_bytes("a sks dog in a café\r\nof Málaga".encode(encoding))
    assert captions(tmp_path) == {"rex.jpg": "a sks dog in a café\r\nof Málaga"}


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\xff",  # half a letter
        "a dog".encode("utf-16-le"),  # without the mark that tells it
        "犬の写真".encode("shift_jis"),
        b"PK\x03\x04\x14\x00",
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / "rex.jpg")
    (tmp_path / "rex.txt").write_bytes(data)
    with pytest.raises(HollowError, match=r"The caption .*rex\.txt is no readable text\. Save it as UTF-8, or remove"):
        load_images(tmp_path, 64)


def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "rex.jpg")
    table(tmp_path, {"file_name": "rex.jpg", "text": "a dog"}, {"file_name": "./rex.jpg", "text": "a cat"})
    with pytest.raises(HollowError, match=r"jsonl has two captions for rex\.jpg\. Keep one"):
        load_images(tmp_path, 64)
    for line in ("rex.jpg: a dog", "[1]", '{"file_name": "rex.jpg", ', "[" * 100_000):
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg"}}\n\n{line}\n')
        with pytest.raises(HollowError, match=r"is no table of captions: line 3 is no JSON\. Write lines such as"):
            load_images(tmp_path, 64)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\nrex.jpg,{'a dog ' * 50_000}\n")
    with pytest.raises(HollowError, match=r"csv is no table of captions .*Write its columns anew, or remove it"):
        load_images(tmp_path, 64)
