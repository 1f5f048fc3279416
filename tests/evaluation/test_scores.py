"""The scores against a direct computation, one pair at a time, with transformers' own processors."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scorers import save_tiny_scorers
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from hollow_core.cli import main
from hollow_core.errors import HollowError
from hollow_core.evaluation.scores import FOR_CLIP, FOR_DINO, Scorers, among, load, mean, prepare, read_prompts, score
from hollow_core.models.layouts import FOLDER

PROMPTS = ["a dog in the snow", "a dog on the beach", "a red dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_tiny_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def scorers(folders: tuple[Path, Path]) -> Scorers:
    return load(*map(str, folders))


def picture(seed: int, width: int = 300, height: int = 450) -> Image.Image:
    noise = torch.randint(256, (7, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def processor(shorter_side: int, **how: Any) -> Any:
    """transformers' own, on Pillow."""
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": shorter_side}, crop_size={"height": 224, "width": 224}, **how)


@pytest.mark.parametrize("size", [(512, 512), (300, 450), (450, 300), (1001, 640)])
def test_pictures_are_prepared_as_published(size: tuple[int, int]) -> None:
    image = picture(0, *size)
    for how in (FOR_DINO, FOR_CLIP):
        theirs = processor(how.shorter_side, image_mean=how.mean, image_std=how.deviation)(image)["pixel_values"][0]
        ours = prepare(image, how)
        assert ours.shape == (3, 224, 224)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_scores_are_the_mean_cosine_of_all_pairs(folders: tuple[Path, Path], scorers: Scorers) -> None:
    references = [picture(seed) for seed in (1, 2)]
    generated = [picture(seed, 128, 128) for seed in (3, 4, 5)]
    scorers.batch = 2  # a whole batch and the rest
    features = scorers.features(generated)
    scores = score(scorers.features(references), features, scorers.prompt_features(PROMPTS))

    vit, clip = ViTModel.from_pretrained(folders[0], add_pooling_layer=False), CLIPModel.from_pretrained(folders[1])
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")

    def dino_feature(image: Image.Image) -> torch.Tensor:
        imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        pixels = torch.tensor(np.array(processor(256, **imagenet)(image)["pixel_values"]))
        return vit(pixel_values=pixels).last_hidden_state[0, 0]

    def joint(image: Image.Image, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.tensor(np.array(processor(224)(image)["pixel_values"]))
        out = clip(pixel_values=pixels, **tokenizer([prompt], return_tensors="pt"))
        return out.image_embeds[0], out.text_embeds[0]

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return torch.cosine_similarity(one, other, dim=0).item()

    with torch.no_grad():
        for image, prompt, ours in zip(generated, PROMPTS, scores, strict=True):
            dino = [cosine(dino_feature(image), dino_feature(reference)) for reference in references]
            seen, read = joint(image, prompt)
            clip_i = [cosine(seen, joint(reference, "")[0]) for reference in references]
            assert ours.dino == pytest.approx(sum(dino) / 2, abs=1e-4)
            assert ours.clip_i == pytest.approx(sum(clip_i) / 2, abs=1e-4)
            assert ours.clip_t == pytest.approx(cosine(seen, read), abs=1e-4)
        real = among(scorers.features(references))
        assert real is not None
        assert real.dino == pytest.approx(cosine(*map(dino_feature, references)), abs=1e-4)
    assert len({round(each.dino, 3) for each in scores}) == 3  # the models do tell pictures apart
    assert mean(scores).clip_t == pytest.approx(sum(each.clip_t or math.nan for each in scores) / 3)
    assert mean(score(features, features)).clip_t is None
    assert among(scorers.features(references[:1])) is None


def test_cached_references_are_not_computed_again(
    folders: tuple[Path, Path], scorers: Scorers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    cache = tmp_path / "cache" / "references.safetensors"
    first = scorers.cached_features(paths[:2], cache)
    computed = []
    features = Scorers.features

    def counting(self: Scorers, pictures: Any) -> Any:
        seen = list(pictures)
        computed.append(len(seen))
        return features(self, seen)

    monkeypatch.setattr(Scorers, "features", counting)
    paths[0].rename(paths[0].with_name("renamed.png"))
    paths[0] = paths[0].with_name("renamed.png")
    again = scorers.cached_features(paths, cache)
    assert computed == [1]  # the third only: a picture is known by its content
    torch.testing.assert_close(again.dino[:2], first.dino)
    torch.testing.assert_close(again.clip[:2], first.clip)

    others = load(*map(str, save_tiny_scorers(tmp_path / "other", seed=1)))
    assert not torch.allclose(others.cached_features(paths[:2], cache).dino, first.dino)
    assert computed == [1, 2]


def test_prompts_of_pictures(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(4)]
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert read_prompts(text, pictures) == ["one", "one", "two", "two"]
    text.write_text("one\ntwo\nthree")
    with pytest.raises(HollowError, match=r"There are 3 prompts for 4 pictures\. Write one a line"):
        read_prompts(text, pictures)
    names = tmp_path / "prompts.json"
    names.write_text('{"0": "by stem", "1.png": "by name"}')
    assert read_prompts(names, pictures[:2]) == ["by stem", "by name"]
    with pytest.raises(HollowError, match=r"has no prompt for 2\.png\. Add"):
        read_prompts(names, pictures)
    names.write_text('[{"file": "elsewhere/3.png", "prompt": "as sampled", "seed": 0}]')
    assert read_prompts(names, pictures[3:]) == ["as sampled"]


def test_missing_weights_say_what_to_download(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(HollowError, match=r"run once: hf download facebook/dino-vits16 .+ --revision refs/pr/1$"):
        load()
    with pytest.raises(HollowError, match=re.escape(f"no config.json and model.safetensors of {tmp_path}, neither")):
        load(str(tmp_path), str(folders[1]))
    with pytest.raises(HollowError, match="holds a model of type 'vit', not 'clip'"):
        load(str(folders[0]), str(folders[0]))


def test_the_hubs_cache_is_found_in_any_revision(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = tmp_path / "models--facebook--dino-vits16" / "snapshots"
    (snapshots / "0").mkdir(parents=True)
    (snapshots / "0" / "pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    folders[0].rename(snapshots / "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load(clip=str(folders[1])).dino.config.patch_size == 112
    (snapshots / "1").rename(folders[0])


def test_the_command_scores_two_folders(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    (tmp_path / "real").mkdir()
    (tmp_path / "drawn").mkdir()
    picture(1).save(tmp_path / "real" / "photo.png")
    for number, color in enumerate(colors):
        Image.new("RGB", (300, 200), color).save(tmp_path / "drawn" / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(prompt.replace("dog", "sks dog") for prompt in PROMPTS))

    def evaluate(*more: object) -> tuple[object, str, str]:
        given = ["evaluate", "--references", tmp_path / "real", "--generated", tmp_path / "drawn", "--device", "cpu"]
        given += ["--dino", folders[0], "--clip", folders[1], *more]
        monkeypatch.setattr("sys.argv", ["hollow", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    grid = tmp_path / "grid.png"
    status, out, err = evaluate("--prompts", tmp_path / "prompts.txt", "--grid", grid, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert [each["prompt"] for each in told["pictures"]] == PROMPTS  # without the identifier
    assert told["mean"]["clip_t"] == pytest.approx(sum(each["clip_t"] for each in told["pictures"]) / 3)
    assert told["references"] is None  # a single one
    with Image.open(grid) as sheet:
        counts = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height) or []}
    assert all(counts[color] == 216 * 144 for color in colors)  # each whole, none squashed

    status, out, err = evaluate("--grid", tmp_path / "drawn" / "grid.png")  # it would be scored the next time
    assert (status, out) == (1, "")
    assert "drawn is a folder of your pictures" in err
    status, out, err = evaluate()
    assert status == 0, err
    assert "3 pictures" in out
    (tmp_path / "drawn" / "0.png").write_text("no picture")
    status, out, err = evaluate("--json")
    assert (status, out) == (1, "")
    assert "cannot be read as a picture" in " ".join(err.split())
