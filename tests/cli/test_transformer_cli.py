"""The commands on a transformer, as a user types them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import shallow_pipeline

from hollow_core.cli import main
from hollow_core.cli.options import cut_as_option, cut_of
from hollow_core.errors import HollowError

Hollow = Callable[..., tuple[object, str, str]]


@pytest.fixture
def hollow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Hollow:
    """Run the command with these arguments: status, stdout, stderr."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["hollow", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number, color in enumerate(("red", "green")):
        Image.new("RGB", (140, 140), color).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_train_and_sample(
    hollow: Hollow, photos: Path, transformer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = transformer_folder("z-image"), tmp_path / "out"
    asked = ["--images", photos, "--subject", "dog", "--steps", 2, "--samples", 4, "--rank", 2, "--device", "cpu"]
    asked += ["--timestep-sampling", "uniform", "--cut", "1,2", "--out", out]
    status, told, error = hollow("train", folder, *asked, "--json")
    assert status == 0, error
    assert Path(json.loads(told)["file"]).exists()
    kept = (out / "run.toml").read_text()
    assert 'cut = "1,2"' in kept
    assert 'timestep-sampling = "uniform"' in kept
    status, _, error = hollow("train", folder, "--config", out / "run.toml", "--steps", 3)  # goes on
    assert status == 0, error
    drawing = ["--lora", out / "lora.safetensors", "--prompt", "a sks dog", "--steps", 2, "--device", "cpu"]
    status, _, error = hollow("sample", folder, *drawing, "--out", tmp_path / "drawn")
    assert status == 0, error
    with Image.open(tmp_path / "drawn" / "000-seed0.png") as picture:
        assert picture.size == (128, 128)
    status, _, error = hollow("sample", folder, *drawing, "--refresh", 2)
    assert status == 1
    assert "Z-Image draws on one path, which has no --refresh. Leave it out." in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cut", 3], "Z-Image is cut at both ends, but cut 3 is one number."),
        (
            ["--cut", "much"],
            "'much' is no cut. Give a number such as 3 for a U-Net, two such as 4,6 for a transformer.",
        ),
        (["--prediction-type", "epsilon"], "Z-Image learned flow matching, so it has no prediction type 'epsilon'."),
    ],
)
def test_what_a_transformer_cannot_do_is_refused_before_it_is_loaded(
    options: list[object],
    sentence: str,
    hollow: Hollow,
    photos: Path,
    transformer_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hollow_core.models.base_model.load_transformer", None)
    asked = ["--images", photos, "--subject", "dog", "--device", "cpu", "--out", tmp_path / "out"]
    status, _, error = hollow("train", transformer_folder("z-image"), *asked, *options)
    assert status == 1
    assert sentence in " ".join(error.split())


@pytest.mark.slow
def test_a_unet_has_no_choice_of_time_steps(hollow: Hollow, photos: Path, tmp_path: Path) -> None:
    shallow_pipeline("sd15").save_pretrained(tmp_path / "model")
    asked = ["--images", photos, "--subject", "dog", "--device", "cpu", "--out", tmp_path / "out"]
    status, _, error = hollow("train", tmp_path / "model", *asked, "--timestep-sampling", "uniform")
    assert status == 1
    assert "Time steps can be drawn uniform only for a model of flow matching" in " ".join(error.split())


@pytest.mark.parametrize(("text", "cut"), [("3", 3), ("4,6", (4, 6)), ("0,2", (0, 2)), ("-1", None)])
def test_a_cut_as_it_is_typed(text: str, cut: int | tuple[int, int] | None) -> None:
    assert cut_of(text) == cut
    assert str(cut_as_option(cut)) == text


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1.5", "-2"])
def test_what_is_no_cut(text: str) -> None:
    with pytest.raises(HollowError, match="is no cut"):
        cut_of(text)
