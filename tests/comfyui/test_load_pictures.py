"""Load Pictures: folders of input/, in the node and in a running ComfyUI."""

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import folder_paths
import torch
from comfyui_server import Server
from hollow_pack.hollow_core.errors import HollowError
from hollow_pack.nodes.host.load_pictures import ITSELF, NONE
from hollow_pack.nodes.host.load_pictures import load as load_folder
from hollow_pack.nodes.load_pictures import HollowLoadPictures
from PIL import Image

CAPTION = "a photo of a sks dog"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's input folder."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    return folder


def put(folder: Path, name: str, size: tuple[int, int] = (300, 200), text: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (255, 0, 0)).save(folder / name)
    if text is not None:
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    return folder / name


def load(folder: str, resolution: int = 64, square: bool = True, caption: str = CAPTION, **more: Any) -> Any:
    return HollowLoadPictures.execute([folder], [resolution], [square], [caption], **more)


def listed() -> list[str]:
    [folder] = [given for given in HollowLoadPictures.GET_SCHEMA().inputs if given.id == "folder"]
    return list(folder.options)


def refusal(folder: str, **settings: Any) -> str:
    with pytest.raises(HollowError) as refused:
        load(folder, **settings)
    return str(refused.value)


def test_folders_with_pictures_are_listed_each_by_its_own_name(inputs: Path, tmp_path: Path) -> None:
    put(inputs / "rex" / "puppy", "a.png")
    put(inputs / "ann", "b.JPG")
    put(inputs / ".hidden", "c.png")
    put(tmp_path / "elsewhere", "d.png")
    (inputs / "3d").mkdir()
    (inputs / "ann" / "round").symlink_to(inputs, target_is_directory=True)
    assert listed() == ["ann", "rex/puppy"]
    put(inputs, "example.png")
    (inputs / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert listed() == ["ann", "linked", "rex/puppy", ITSELF]


def test_pictures_in_nested_folders_do_not_count(inputs: Path) -> None:
    put(inputs / "rex", "a.png")
    put(inputs / "rex" / "puppy", "b.png")
    put(inputs, "example.png")
    assert [len(load(name).args[0]) for name in ("rex", "rex/puppy", ITSELF)] == [1, 1, 1]


def test_captions_are_one_for_each_as_soon_as_one_has_its_own(inputs: Path) -> None:
    """Or one for all, so that nothing that is made from them is made once for each of five equal ones."""
    for name in "abc":
        put(inputs / "rex", f"{name}.png")
    assert load("rex").args[1] == [CAPTION]
    put(inputs / "rex", "b.png", text="a photo of a sks dog on grass\n")
    assert load("rex", caption=f"{CAPTION}\n").args[1] == [CAPTION, "a photo of a sks dog on grass", CAPTION]


def test_captions_of_other_tools_are_read_and_what_is_not_is_told(inputs: Path) -> None:
    for name in "abc":
        put(inputs / "rex", f"{name}.png")
    (inputs / "rex" / "a.png.txt").write_text("a sks dog")
    (inputs / "rex" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "on grass"}')
    assert load("rex").args[1] == ["a sks dog", CAPTION, "on grass"]
    lower = load_folder("rex", (), 64, True, CAPTION).sheet.shape[1]
    for number in range(5):
        (inputs / "rex" / f"notes on a walk with rex {number}.md").touch()
    assert load_folder("rex", (), 64, True, CAPTION).sheet.shape[1] > lower  # a line more, which says so


def test_pictures_are_squares_or_keep_their_shape(inputs: Path) -> None:
    put(inputs / "rex", "a.png", (400, 300))
    put(inputs / "rex", "b.png", (180, 320))
    assert [image.shape for image in load("rex", 256).args[0]] == [(1, 256, 256, 3)] * 2
    assert [image.shape for image in load("rex", 256, square=False).args[0]] == [(1, 192, 320, 3), (1, 320, 192, 3)]


def test_masks_come_with_their_pictures(inputs: Path) -> None:
    """A file's before the transparency; white where there is neither."""
    half = Image.new("L", (128, 64))
    half.paste(255, (0, 0, 64, 64))
    clear = Image.new("RGBA", (64, 128), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 64, 64))
    put(inputs / "rex", "a.png", (128, 64))
    clear.save(inputs / "rex" / "b.png")
    clear.save(inputs / "rex" / "c.png")
    half.resize((64, 128)).save(inputs / "rex" / "c-mask.png")

    def masks(**more: Any) -> list[list[float]]:
        loaded = load("rex", 256, square=False, **more).args[2]
        return [[mask[0, 16, 8].item(), mask[0, -16, 8].item(), mask[0, 16, -8].item()] for mask in loaded]

    pictures, _, plain = load("rex", 256, square=False).args
    assert [mask.shape for mask in plain] == [picture.shape[:3] for picture in pictures]
    assert masks() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert masks(alpha_mask=[True]) == [[1, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert load(NONE, images=[torch.rand(1, 64, 64, 3)], alpha_mask=[True]).args[2][0].min() == 1
    Image.new("L", (64, 128)).save(inputs / "rex" / "c-mask.png")
    assert "The mask of c.png is black all over." in refusal("rex")


def test_pictures_by_wire_take_the_place_of_the_folder(inputs: Path) -> None:
    batch, other = torch.rand(2, 100, 200, 3), torch.rand(1, 90, 90, 3)
    images, captions, _ = load(NONE, images=[batch, other]).args
    assert [image.shape for image in images] == [(1, 64, 64, 3)] * 3
    assert captions == [CAPTION]
    same = load(NONE, 96, images=[torch.full((1, 96, 96, 3), 0.2)]).args[0][0]
    assert torch.allclose(same, torch.tensor(51 / 255))
    assert "Picture 2 is only 7×9 pixels. Take a picture of at least 64 pixels" in refusal(
        NONE, resolution=512, images=[other, torch.rand(1, 9, 7, 3)]
    )


def test_what_cannot_be_loaded_is_said(inputs: Path) -> None:
    (inputs / "empty").mkdir()
    put(inputs / "rex", "a.png", (9, 9))
    put(inputs / "ann", "a.png").with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    put(inputs / "eve", "a.png").write_text("no picture")
    assert "There is no folder of pictures in ComfyUI's input folder yet. Press 'upload a folder'" in refusal(NONE)
    assert "gone does not exist. Give the folder that holds your pictures." in refusal("gone")
    assert "empty holds no pictures. Put four or five of your subject there" in refusal("empty")
    assert "a.png is only 9×9 pixels. Take a picture of at least 64 pixels" in refusal("rex", resolution=512)
    assert "a.txt is no readable text. Save it as UTF-8" in refusal("ann")
    assert "a.png cannot be read as a picture. Remove it from there" in refusal("eve")
    assert "The resolution 500 is no multiple of 8 pixels." in refusal("rex", resolution=500)
    assert "The resolution 520 is no multiple of 64 pixels" in refusal("rex", resolution=520, square=False)


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "rex/../..", ".", "", " "])
def test_no_name_leads_out_of_the_input_folder(inputs: Path, name: str) -> None:
    put(inputs.parent / "other", "a.png")
    put(inputs / "rex", "a.png")
    assert "does not stay inside" in refusal(name)


def test_a_change_is_seen(inputs: Path) -> None:
    def seen() -> Any:
        return HollowLoadPictures.fingerprint_inputs(["rex"], resolution=[512])

    put(inputs / "rex", "a.png")
    states = [seen()]
    for change in (
        lambda: put(inputs / "rex", "b.png"),
        lambda: put(inputs / "rex", "b.png", text="on grass"),
        lambda: (inputs / "rex" / "b.txt").write_text("on the beach"),
        lambda: (inputs / "rex" / "a.png").unlink(),
        lambda: (inputs / "rex" / "b.txt").unlink(),
        lambda: (inputs / "rex" / "b.caption").write_text("on sand"),
        lambda: (inputs / "rex" / "b.png.txt").write_text("on a rock"),
        lambda: (inputs / "rex" / "metadata.jsonl").write_text("{}"),
        lambda: put(inputs / "rex", "b-mask.png"),
        lambda: put(inputs / "rex", "b-mask.png", (30, 20)),
    ):
        assert seen() == states[-1]
        change()
        states.append(seen())
        assert states[-1] not in states[:-1]
    put(inputs / "rex" / "nested", "c.png")
    (inputs / "rex" / "notes.md").write_text("no picture, no text of one")
    assert seen() == states[-1]
    assert HollowLoadPictures.fingerprint_inputs(["gone"], images=(None,)) is None  # by a wire


def graph(folder: str) -> dict[str, Any]:
    inputs = {"folder": folder, "resolution": 512, "square": False, "caption": CAPTION}
    return {"1": {"class_type": "HollowLoadPictures", "inputs": inputs}}


def sheet(server: Server, ran: Any) -> Image.Image:
    [shown] = ran.outputs["1"]["images"]
    return Image.open(io.BytesIO(server.get(f"view?{urlencode(shown)}")))


def test_a_graph_shows_the_sheet_and_reads_again_only_what_changed(server: Server) -> None:
    folder = server.folder / "input" / "rex"
    put(folder, "a.png")
    one = server.run(graph("rex"))
    again = server.run(graph("rex"))
    assert again.messages["execution_cached"]["nodes"] == ["1"]
    assert sheet(server, again).size == sheet(server, one).size  # the host shows that of before
    put(folder, "b.png", text="a photo of a sks dog on grass")
    two = server.run(graph("rex"))
    assert two.messages["execution_cached"]["nodes"] == []
    assert sheet(server, two).width > sheet(server, one).width


@pytest.mark.parametrize(
    ("folder", "said"),
    [("gone", "gone does not exist. Give the folder"), (NONE, "Press 'upload a folder'"), ("../rex", "stay inside")],
)
def test_a_run_is_refused_before_it_starts(server: Server, folder: str, said: str) -> None:
    answer = server.queue(graph(folder))
    assert "prompt_id" not in answer
    errors = answer["node_errors"]["1"]["errors"]
    assert [said in error["details"] for error in errors] == [True]
