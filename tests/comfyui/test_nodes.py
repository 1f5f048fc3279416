"""The nodes on the embedded model, as a graph runs them."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from hollow_pack.hollow_core import scores
from hollow_pack.nodes import (
    demo_model,
    hollow_unet,
    layer_weight_analyzer,
    lora_files,
    personalization_score,
    precompute_activations,
    split_prompt,
    train_lora,
    two_path_model,
    two_path_sampler,
)
from PIL import Image
from tiny_models import tiny_flux
from tiny_scorers import save_tiny_scorers

SETTINGS: dict[str, Any] = {
    "rank": 2,
    "alpha": 0.0,
    "steps": 3,
    "learning_rate": 1e-3,
    "prior_weight": 1.0,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "seed": 0,
    "save_every": 0,
    "preview_every": 2,
}


@pytest.fixture(autouse=True)
def _as_in_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nodes run in inference mode, know their id, and write into ComfyUI's folders."""
    folder_paths.set_output_directory(str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    hidden = SimpleNamespace(unique_id="7")
    monkeypatch.setattr(precompute_activations.HollowPrecompute, "hidden", hidden)
    monkeypatch.setattr(train_lora.HollowTrainLoRA, "hidden", hidden)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo() -> Any:
    with torch.inference_mode():
        model, clip, vae, images, captions = demo_model.HollowDemoModel.execute().args
        prompts = [split_prompt.HollowSplitPrompt.execute(clip, caption, "sks").args for caption in captions]
        latents = [{"samples": vae.encode(image)} for image in images]
    return SimpleNamespace(
        model=model,
        clip=clip,
        images=images,
        latents=latents,
        personal=[prompt[0] for prompt in prompts],
        generic=[prompt[1] for prompt in prompts],
    )


def precomputed(demo: Any, cut: int = 3) -> tuple[Any, Any]:
    hollowed = hollow_unet.HollowUNet.execute(demo.model, cut).args[0]
    stored = precompute_activations.HollowPrecompute.execute(
        [hollowed], demo.latents, demo.personal, demo.generic, [6], [0], ["float32"], ["subject"]
    )
    return hollowed, stored.args[0]


def test_a_graph_trains_saves_and_samples(demo: Any, tmp_path: Path) -> None:
    hollowed, activations = precomputed(demo)
    lora, plain, losses = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS).args
    assert len(losses["loss"]) == 3
    assert lora.recipe.generic_prompt == lora.recipe.personal_prompt.replace("sks ", "")

    loadable = comfy.lora.model_lora_keys_unet(demo.model.model, {})
    matched = comfy.lora.load_lora(plain, loadable)
    assert len(matched) == len(plain) // 3  # ComfyUI's own loader: down, up and alpha of every layer

    path = Path(lora_files.HollowSaveLoRA.execute(lora, "hollow/cup").args[0])
    assert path == tmp_path / "loras" / "hollow" / "cup.safetensors"
    again, _ = lora_files.HollowLoadLoRA.execute("hollow/cup.safetensors").args
    assert again.recipe == lora.recipe
    assert again.state.keys() == lora.state.keys()

    drawn = two_path_sampler.HollowTwoPathSampler.execute(
        model=demo.model,
        hollow_lora=again,
        generic=demo.generic[0],
        strength=1.0,
        refresh=2,
        positive=demo.personal[0],
        negative=demo.generic[0],
        latent_image={"samples": torch.zeros(1, 8, 16, 16)},
        seed=1,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="sgm_uniform",
        denoise=1.0,
    ).args[0]
    assert drawn["samples"].shape == (1, 8, 16, 16)
    assert drawn["samples"].isfinite().all()
    assert two_path_model.HollowTwoPathModel.execute(demo.model, again, 1.0, 1, True).args[0] is not demo.model

    chart, _, cut = layer_weight_analyzer.HollowLayerWeightAnalyzer.execute(lora, demo.model).args
    assert chart.shape[0] == 1
    assert cut == 3  # nothing was trained inside


def test_pictures_are_scored(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture has all of its own score; the numbers are the library's, which tests/test_scores.py checks."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    dino, clip = save_tiny_scorers(tmp_path)
    run = personalization_score.HollowPersonalizationScore.execute
    one, other = demo.images[:2]
    given = ([one], [torch.cat([one, other])], ["a sks cup"], ["sks"], ["dino"], ["clip"])
    grid, dino_score, clip_i, clip_t, text = run(*given).args
    figures = json.loads(text)
    assert grid.ndim == 4
    assert figures["pictures"][0]["dino"] == pytest.approx(1)
    assert figures["pictures"][1]["dino"] < 0.99
    assert figures["mean"] == {"dino": dino_score, "clip_i": clip_i, "clip_t": clip_t}
    judge = scores.load(str(dino), str(clip))
    picture = Image.fromarray((other[0] * 255).round().byte().numpy())
    assert figures["pictures"][1]["clip_t"] == pytest.approx(
        (judge.features([picture]).clip @ judge.prompt_features(["a cup"]).T).item(), abs=1e-5
    )
    assert torch.tensor(run(*given[:2], [""], *given[3:]).args[3]).isnan()

    with pytest.raises(Exception, match="does not stay inside"):
        run(*given[:4], ["../dino"], ["clip"])
    with pytest.raises(Exception, match="run once: hf download facebook/dino-vits16"):
        run(*given[:4], ["facebook/dino-vits16"], ["clip"])


def test_the_base_is_as_before(demo: Any) -> None:
    before = {key: weight.clone() for key, weight in demo.model.model.state_dict().items()}
    hollowed, activations = precomputed(demo)
    train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS)
    after = demo.model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_cancel_keeps_what_is_done_and_run_goes_on(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hollowed, activations = precomputed(demo)
    whole, _, _ = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS, batch=2).args

    asked = 0

    def cancel_at_the_third_question() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            comfy.model_management.interrupt_current_processing()
        return asked >= 3

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "processing_interrupted", cancel_at_the_third_question)
        patch.setattr(precompute_activations.HollowPrecompute, "hidden", SimpleNamespace(unique_id="8"))
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | {"seed": 5}, batch=2)
    assert asked == 3  # two steps were done
    cancelled, _, losses = train_lora.HollowTrainLoRA.execute(
        hollowed, activations, **SETTINGS | {"seed": 5}, batch=2
    ).args
    assert len(losses["loss"]) == 3
    assert cancelled.state.keys() == whole.state.keys()


def test_the_same_again_costs_nothing(demo: Any) -> None:
    _, first = precomputed(demo)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    _, second = precomputed(demo)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in second.folder.iterdir()} == written


def test_another_cut_gets_a_store_of_its_own(demo: Any) -> None:
    _, three = precomputed(demo)
    hollowed, two = precomputed(demo, cut=2)
    assert three.folder.parent == two.folder.parent
    assert three.folder != two.folder
    with pytest.raises(Exception, match="precomputed for cut 3, but this Hollow U-Net has cut 2"):
        train_lora.HollowTrainLoRA.execute(hollowed, three, **SETTINGS)


def test_wrong_wires_are_refused(demo: Any) -> None:
    hollowed = hollow_unet.HollowUNet.execute(demo.model, 3).args[0]
    run = precompute_activations.HollowPrecompute.execute
    rest = ([6], [0], ["float32"], ["subject"])
    with pytest.raises(Exception, match="2 personal prompts for 5 pictures"):
        run([hollowed], demo.latents, demo.personal[:2], demo.generic, *rest)
    with pytest.raises(Exception, match=r"latents of example 0 have shape \(1, 4, 16, 16\)"):
        run([hollowed], [{"samples": torch.zeros(1, 4, 16, 16)}], demo.personal[:1], demo.generic[:1], *rest)
    with pytest.raises(Exception, match="personal prompt holds 2 prompts"):
        run([hollowed], demo.latents, [demo.personal[0] * 2], demo.generic, *rest)
    with pytest.raises(Exception, match="does not stay inside"):
        run([hollowed], demo.latents, demo.personal, demo.generic, [6], [0], ["float32"], ["../away"])
    nothing = [{"samples": torch.zeros(0, 8, 16, 16)}]
    with pytest.raises(Exception, match=r"There are no pictures to learn from\. Connect four or five"):
        run([hollowed], nothing, demo.personal, demo.generic, *rest)
    with pytest.raises(Exception, match="no cut 12"):
        hollow_unet.HollowUNet.execute(demo.model, 12)
    with pytest.raises(Exception, match="This MODEL is a Flux, which has no U-Net to hollow"):
        hollow_unet.HollowUNet.execute(tiny_flux(), 3)


def test_selective_trains_on_smaller_twins_of_all_pictures(demo: Any) -> None:
    hollowed = hollow_unet.HollowUNet.execute(demo.model, 3).args[0]
    drawn = [{"samples": torch.cat([latent["samples"]] * 2)} for latent in demo.latents[:2]]
    low, low_drawn = (
        [{"samples": torch.nn.functional.avg_pool2d(batch["samples"], 2)} for batch in batches]
        for batches in (demo.latents, drawn)
    )
    run = precompute_activations.HollowPrecompute.execute
    given = ([hollowed], demo.latents, demo.personal, demo.generic, [8], [0], ["float32"], ["selective"])
    class_prompts = demo.generic[3:]  # one for each of two batches
    activations = run(*given, drawn, class_prompts, low, low_drawn).args[0]
    fingerprint = json.loads((activations.folder / "store.json").read_text())["fingerprint"]
    assert fingerprint["kinds"] == ["image"] * 5 + ["prior"] * 4 + ["low image"] * 5 + ["low prior"] * 4
    generic = [prompt["generic"] for prompt in fingerprint["prompts"]]
    assert generic[5:9] == generic[14:] == [generic[3]] * 2 + [generic[4]] * 2

    settings = SETTINGS | {"steps": 10, "preview_every": 5, "strategy": "selective", "selective_gamma": 3.0}
    losses = train_lora.HollowTrainLoRA.execute(hollowed, activations, **settings).args[2]["loss"]
    assert len(losses) == 10

    with pytest.raises(Exception, match="2 prompts for 6 class pictures in 3 batches"):
        run(*given, [*drawn, drawn[0]], class_prompts)
    with pytest.raises(Exception, match="at the lower resolution are 16×16, but 16×16 at full"):
        run(*given, None, None, demo.latents)
