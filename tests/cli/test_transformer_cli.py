"""The commands on a transformer, as a user types them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import shallow_pipeline
from tiny_transformers import tiny_transformer
from tiny_unets import make_shallow_unet

from hollow_core.cli import main
from hollow_core.cli.options import cut_as_option, cut_of
from hollow_core.errors import HollowError
from hollow_core.nets.network import removed_fraction
from hollow_core.nets.unet import UNet

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
            "'much' is no cut. Give a number such as 3 for a U-Net, two such as 4,6 for a transformer, or a share such",
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
    assert cut_of(text, tiny_transformer("anima")) == cut
    assert str(cut_as_option(cut)) == text


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1.5", "-2", "50 percent"])
def test_what_is_no_cut(text: str) -> None:
    with pytest.raises(HollowError, match="is no cut"):
        cut_of(text, tiny_transformer("anima"))


def test_a_share_is_the_cut_that_comes_nearest_to_it() -> None:
    anima, unet = tiny_transformer("anima"), UNet(make_shallow_unet("sd15"))
    assert cut_of("50%", anima) == anima.usual_cut == (1, 1)  # of four blocks
    assert cut_of("25 %", anima) in [(0, 1), (1, 0)]
    assert removed_fraction(unet, cut_of("0.1%", unet)) == min(removed_fraction(unet, cut) for cut in unet.cuts())
    for text in ("0%", "100%"):
        with pytest.raises(HollowError, match=f"There is no cut of {text}. Give a share between 10% and 80%"):
            cut_of(text, anima)


@pytest.mark.slow
def test_cuts_and_plan_show_shares_and_any_pair(
    hollow: Hollow, transformer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = transformer_folder("anima")
    status, told, error = hollow("cuts", folder)
    assert status == 0, error
    assert [line.split()[1] for line in told.splitlines() if line.startswith("│") and "," in line.split()[1]] == [
        ",".join(map(str, cut)) for cut in tiny_transformer("anima").cuts()
    ]
    assert "A record keeps image 64×24, residual 64×24" in " ".join(told.split())
    status, told, error = hollow("cuts", folder, "--cut", "2,0", "--cut", "50%", "--json")
    assert status == 0, error
    assert [row["k"] for row in json.loads(told)] == [[2, 0], [1, 1]]
    status, told, error = hollow("plan", folder, "--cut", "0,3", "--cut", "-1", "--json")
    assert status == 0, error
    rows = json.loads(told)
    assert [row["cut"] for row in rows] == [[0, 3], None]
    assert all(set(row["main_memory"]) == {"encode", "precompute", "train", "sample"} for row in rows)
    assert rows[0]["main_memory"]["encode"] > rows[0]["main_memory"]["train"]
    status, told, error = hollow("plan", folder, "--cut", "1,1")
    assert status == 0, error
    assert "peak main memory, GiB" in told
