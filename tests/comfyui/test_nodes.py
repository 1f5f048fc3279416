"""The nodes on the embedded model, as a graph runs them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy_api.v0_0_2 import io
from hollow_pack.hollow_core.errors import HollowError
from hollow_pack.hollow_core.evaluation import scores
from hollow_pack.hollow_core.training.settings import TrainSettings
from hollow_pack.hollow_core.training.store import Store
from hollow_pack.nodes import (
    demo_model,
    handles,
    hollow_unet,
    layer_weight_analyzer,
    lora_files,
    personalization_score,
    precompute_activations,
    scale_blocks,
    split_prompt,
    train_lora,
    two_path_model,
    two_path_sampler,
)
from hollow_pack.nodes.host import files, plan, progress, train_preview
from hollow_pack.nodes.host import precompute as host_precompute
from hollow_pack.nodes.host import sampling as sampling_host
from hollow_pack.nodes.host import train as host_train
from hollow_pack.nodes.host.unet import frozen_network
from PIL import Image, ImageColor
from safetensors import safe_open
from tiny_models import tiny_flux
from tiny_scorers import save_tiny_scorers
from tiny_training import OutOfMemoryAt

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
    monkeypatch.setattr(hollow_unet.HollowUNet, "hidden", hidden)
    monkeypatch.setattr(precompute_activations.HollowPrecompute, "hidden", hidden)
    monkeypatch.setattr(train_lora.HollowTrainLoRA, "hidden", hidden)
    monkeypatch.setattr(lora_files.HollowSaveLoRA, "hidden", hidden)
    monkeypatch.setattr(lora_files.HollowConvertLoRA, "hidden", hidden)
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


def precomputed(demo: Any, cut: int = 3, **levers: Any) -> tuple[Any, Any]:
    hollowed = handles.HollowedModel(demo.model, cut, **levers)
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
    save_and_convert(lora, demo, tmp_path / "loras" / "hollow")

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


def test_a_graph_looks_into_loras_and_scales_them(demo: Any, tmp_path: Path) -> None:
    hollowed, activations = precomputed(demo)
    lora, _, _ = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS).args
    analyze = layer_weight_analyzer.HollowLayerWeightAnalyzer.execute
    chart, figures, cut, weights = analyze(lora, demo.model).args
    assert chart.shape[0] == 1
    assert cut >= 3  # nothing was trained inside
    assert len(weights.split(",")) == 17  # LoRA on the attention only
    (row,) = json.loads(figures)["loras"]
    assert all(block["mean"] is None for block in row["blocks"] if block["hollowed"])

    weaker, plain = scale_blocks.HollowScaleBlocks.execute(lora, "IN04=0.5", demo.model).args
    assert plain.keys() == lora.state.keys()
    lora_files.HollowSaveLoRA.execute(weaker, "hollow/weaker", model=demo.model)
    _, figures, _, _ = analyze(lora, demo.model, "hollow/weak*").args
    first, second = (loaded["blocks"][3] for loaded in json.loads(figures)["loras"])
    assert first["slot"] == "IN04"
    assert second["mean"] == pytest.approx(first["mean"] / 2, rel=1e-2)
    assert second["relative"] == pytest.approx(first["relative"] / 2, rel=1e-2)

    with pytest.raises(HollowError, match="The loras folder has no 'cup'"):
        analyze(None, demo.model, "cup")
    with pytest.raises(HollowError, match="nothing to analyze"):
        analyze(None, demo.model)


def test_patches_of_the_graph_count_as_the_models_weights(demo: Any) -> None:
    """Twice the weights, by a patch: half the relative change."""
    hollowed, activations = precomputed(demo)
    lora, _, _ = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS).args
    doubled = demo.model.clone()
    keys = [key for key in doubled.model.state_dict() if key.endswith(".weight")]
    doubled.add_patches({key: (torch.zeros(1),) for key in keys}, 0.0, strength_model=2.0)
    relative = [
        json.loads(layer_weight_analyzer.HollowLayerWeightAnalyzer.execute(lora, model).args[1])["loras"][0]["whole"]
        for model in (demo.model, doubled)
    ]
    assert relative[1]["relative"] == pytest.approx(relative[0]["relative"] / 2, rel=1e-5)


def save_and_convert(lora: Any, demo: Any, folder: Path) -> None:
    """In another dialect, padded with zeros and with a thumbnail; and back."""
    saved = lora_files.HollowSaveLoRA.execute(
        lora, "hollow/d", dialect="diffusers", zero_pad=True, thumbnail=torch.rand(1, 40, 30, 3), model=demo.model
    )
    assert re.match(r"hollow/d\.safetensors, read back:\n\d+ layers, largest \|ΔW\| [\d.e-]+\.$", saved.ui["text"][0])
    with safe_open(folder / "d.safetensors", "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118 - no dict
        assert file.metadata()["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    converted = lora_files.HollowConvertLoRA.execute("hollow/d.safetensors", "hollow/k", model=demo.model)
    assert Path(converted.args[0]) == folder / "k.safetensors"
    with safe_open(folder / "k.safetensors", "pt") as file:
        keys = set(file.keys())
    assert lora.state.keys() < keys  # and the zeros
    peft = lora_files.HollowSaveLoRA.execute(lora, "hollow/p", dialect="peft", model=demo.model).args[0]
    assert sorted(path.name for path in Path(peft).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(Exception, match=r"for none of SD1\.5, SD2\.1 and SDXL\. Connect its model"):
        lora_files.HollowSaveLoRA.execute(lora, "hollow/d", dialect="diffusers")


@pytest.mark.parametrize(
    ("levers", "settings"),
    [
        ({}, {"precision": "bf16", "gradient_checkpointing": True}),
        ({"base_bits": 8, "streaming": True}, {"lora_precision": "bf16", "fused_backward": True}),
        ({"base_bits": 4}, {"optimizer": "adamw8bit"}),
        ({}, {"optimizer": "prodigy", "learning_rate": 0.0, "lr_schedule": "cosine", "warmup": 1, "ema": 0.9}),
    ],
)
def test_the_base_is_as_before(demo: Any, levers: dict[str, Any], settings: dict[str, Any]) -> None:
    before = {key: weight.clone() for key, weight in demo.model.model.state_dict().items()}
    hollowed, activations = precomputed(demo, **levers)
    losses = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | settings).args[2]["loss"]
    assert len(losses) == 3
    after = demo.model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_prodigy_at_another_optimizers_rate_is_told_what_to_set(demo: Any) -> None:
    with pytest.raises(Exception, match=r"rate 0\.001 is too low for prodigy.* leave it out \(0 in the node\)"):
        train_lora.HollowTrainLoRA.execute(*precomputed(demo), **SETTINGS | {"optimizer": "prodigy"})


def test_streaming_gives_the_same_lora_from_the_same_records(demo: Any) -> None:
    plain, streamed = (precomputed(demo, streaming=streaming) for streaming in (False, True))
    assert streamed[1] == plain[1]
    expected, found = (
        train_lora.HollowTrainLoRA.execute(*each, **SETTINGS | {"save_every": index}).args[1]  # not to go on
        for index, each in enumerate((plain, streamed))
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_dora_goes_into_a_file_and_onto_two_paths(demo: Any) -> None:
    lora, *_ = train_lora.HollowTrainLoRA.execute(*precomputed(demo), **SETTINGS | {"dora": True}).args
    magnitudes = {key: scale for key, scale in lora.state.items() if key.endswith("dora_scale")}
    assert {scale.dtype for scale in magnitudes.values()} == {torch.float32}
    saved = lora_files.HollowSaveLoRA.execute(lora, "hollow/dora", model=demo.model).args[0]
    with safe_open(saved, "pt") as file:
        assert all(torch.equal(file.get_tensor(key), scale) for key, scale in magnitudes.items())
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"
    assert two_path_model.HollowTwoPathModel.execute(demo.model, lora, 1.0, 1, True).args[0] is not demo.model


def test_the_plan_is_shown_and_a_budget_picks_cut_and_levers(demo: Any) -> None:
    asked = handles.HollowedModel(demo.model, 3)
    known = plan.plan(asked, 0.0, 0, 16, node_id="7")
    assert known.hollowed == asked
    assert 3 in [row.cut for row in known.rows]
    assert {row.cut for row in known.rows} <= set(range(7))
    assert all(row.fits for row in known.rows)  # into main memory
    assert known.advice.startswith("Cut 3 fits: 0.03 of ")
    run = hollow_unet.HollowUNet.execute(demo.model, 3)
    assert run.args[0] == asked
    assert len(run.ui.as_dict()["images"]) == 1

    wide = plan.plan(asked._replace(cut=plan.AUTO), 1.0, 0, 16, node_id="7")
    assert wide.hollowed == asked._replace(cut=0)
    budget = (wide.rows[0].needed - 1) / 2**30
    tight = plan.plan(asked._replace(cut=plan.AUTO), budget, 0, 16, node_id="7")
    assert tight.hollowed == asked._replace(cut=0, gradient_checkpointing=True, checkpoint_levels=1)
    assert tight.rows[0].fits
    assert tight.advice.startswith("Taken: cut 0 in fp32, gradient checkpointing of 1 level, 0.0")


def test_what_does_not_fit_is_refused_before_it_starts(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hollowed, activations = precomputed(demo)
    setting = plan.setting_of(hollowed, [torch.zeros(1, 8, 16, 16)], samples=6)
    needed = plan.planner_of(demo.model).peak("train", setting).total
    with monkeypatch.context() as patch:
        patch.setattr(host_train, "free_bytes", lambda _: needed - 1)
        said = r"The stage train needs 0.03 GiB with cut 3 in fp32, but .* free\. Take gradient checkpointing: then"
        with pytest.raises(Exception, match=said):
            train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | {"rank": 16})
        assert not list(activations.folder.glob("training-*"))
        patch.setattr(host_precompute, "free_bytes", lambda _: needed // 2)
        _, same = precomputed(demo, 4)  # the middle is streamed
        patch.setattr(host_precompute, "free_bytes", lambda _: 2**20)
        with pytest.raises(
            Exception, match=r"precompute needs 0.0\d GiB .*, streamed middle, but 0.00 GiB are free\. Even"
        ):
            precomputed(demo, 3)
    _, resident = precomputed(demo, 4)
    assert same == resident  # and finished: with the same records


def test_a_folder_that_another_comfyui_works_in_is_left_alone(demo: Any) -> None:
    hollowed, activations = precomputed(demo)
    program = "import sys; from pathlib import Path; from hollow_core.lock import holding\n"
    program += "with holding(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    settings = TrainSettings(rank=2, steps=3, save_every=2)
    training, _ = host_train._begun(Store.open(activations.folder), settings)
    for folder in (activations.folder.parent, training):
        command = [sys.executable, "-c", program, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(HollowError, match=rf"is in use by process {holder.pid} on"):
                precomputed(demo, 2) if folder == activations.folder.parent else host_train.train(
                    hollowed, activations, settings, 0, node_id="7"
                )
    assert not training.exists()


def test_a_plan_is_for_the_largest_picture_as_it_lies(demo: Any) -> None:
    hollowed = handles.HollowedModel(demo.model, 3)
    pictures = [torch.zeros(1, 8, *size) for size in ((16, 24), (20, 18), (8, 12))]
    setting = plan.setting_of(hollowed, pictures, low_latents=pictures[2:])
    assert setting.size == (192, 128)  # pixels, wide and high
    assert setting.low_resolution is not None
    assert setting.resolution == 2 * setting.low_resolution
    needed = [plan.planner_of(demo.model).peak("train", each).total for each in (setting, replace(setting, size=None))]
    assert needed[0] != needed[1]


def test_out_of_memory_is_told_and_run_goes_on(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hollowed, activations = precomputed(demo)
    whole = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS).args[1]
    for folder in activations.folder.glob("training-*"):
        shutil.rmtree(folder)

    def on_a_full_device(*given: Any) -> Any:
        network = frozen_network(*given)
        network.module.down_blocks[0].register_forward_hook(OutOfMemoryAt(2))
        return network

    with monkeypatch.context() as patch:
        patch.setattr(host_train, "frozen_network", on_a_full_device)
        said = r"in the stage train: 0.03 GiB were predicted, .* Take gradient checkpointing: then it is .* goes on"
        with pytest.raises(Exception, match=said):
            train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS)
    told: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(host_train.NodeProgress, "tell", lambda _, done, *shown: told.append(done.step))
        again = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS).args[1]
    assert told == [2, 3]
    assert all(torch.equal(again[key], whole[key]) for key in whole)


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
    said: list[str] = []
    monkeypatch.setattr(progress, "say", lambda text, _: said.append(text))
    resumed = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | {"seed": 5}, batch=2)
    cancelled, _, losses = resumed.args
    assert len(losses["loss"]) == 3
    assert cancelled.state.keys() == whole.state.keys()
    [last] = said  # what is shown goes on as well: the mean is that of all three
    mean = sum(losses["loss"]) / 3
    assert last.endswith(f" min left,\nloss {losses['loss'][2]:.4f} (mean {mean:.4f})")
    assert resumed.ui["text"][0].startswith("3 steps: 2 were there, 1 new, ")


def test_a_style_has_no_identifier_and_several_subjects_have_one_each(demo: Any) -> None:
    split = split_prompt.HollowSplitPrompt.execute
    styled = [split(demo.clip, "a cup on grass", "").args, split(demo.clip, "a dog", " ").args]
    assert [prompt[2:] for prompt in styled] == [("a cup on grass",) * 2, ("a dog",) * 2]
    hollowed = handles.HollowedModel(demo.model, 3)

    def learned(personal: list[Any], generic: list[Any]) -> Any:
        stored = precompute_activations.HollowPrecompute.execute(
            [hollowed], demo.latents[:2], personal, generic, [4], [0], ["float32"], ["styled"]
        )
        return train_lora.HollowTrainLoRA.execute(hollowed, stored.args[0], **SETTINGS).args[0]

    lora = learned([prompt[0] for prompt in styled], [prompt[1] for prompt in styled])
    assert lora.recipe.identifier == ""
    assert lora.recipe.personal_prompt == lora.recipe.generic_prompt == "a cup on grass"
    assert lora.metadata["modelspec.trigger_phrase"] == ""
    path = lora_files.HollowSaveLoRA.execute(lora, "styled").args[0]
    assert lora_files.HollowLoadLoRA.execute(Path(path).name).args[0].recipe == lora.recipe
    latent = {"samples": torch.zeros(1, 8, 16, 16)}
    sampling = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    patched = two_path_model.HollowTwoPathModel.execute(demo.model, lora, 1.0, 1, True).args[0]
    empty = split(demo.clip, "", "").args[0]
    alone = sampling_host.sample(patched, styled[0][0], empty, latent, **sampling)["samples"]
    drawn = two_path_sampler.HollowTwoPathSampler.execute(
        demo.model, lora, styled[0][1], 1.0, 1, positive=styled[0][0], negative=empty, latent_image=latent, **sampling
    ).args[0]["samples"]
    assert drawn.abs().max() > 0
    assert torch.equal(drawn, alone)

    both = split(demo.clip, "a sks dog and an xyz cup", "sks, xyz").args
    assert both[3] == "a dog and a cup"
    each = [split(demo.clip, f"a {word} dog", word).args for word in ("sks", "xyz")]
    assert learned([prompt[0] for prompt in each], [prompt[1] for prompt in each]).recipe.identifier == "sks, xyz"


def test_a_mask_of_the_graph_weighs_the_loss(demo: Any) -> None:
    """Of any size, in a batch or for all of it; a white one is none, and so is not another store."""
    hollowed = handles.HollowedModel(demo.model, 3)
    left = torch.zeros(1, 64, 64)
    left[..., :36] = 1

    def store(*masks: torch.Tensor | None) -> Any:
        batch = {"samples": torch.cat([latent["samples"] for latent in demo.latents[:2]])}
        given = [batch | {"noise_mask": mask} if mask is not None else batch for mask in masks]
        activations = precompute_activations.HollowPrecompute.execute(
            [hollowed], given, demo.personal[:1], demo.generic[:1], [4], [0], ["float32"], ["masked"]
        ).args[0]
        return Store.open(activations.folder), activations

    plain, _ = store(None)
    assert store(torch.ones(1, 1, 30, 30))[0].id == plain.id
    masked, activations = store(left)
    for image in range(2):
        mask = masked.mask(image)
        assert mask is not None
        assert mask.shape == (1, 1, 16, 16)
        assert mask[..., :9].eq(1).all()
        assert mask[..., 9:].eq(0).all()
    of_each, _ = store(torch.stack([left, torch.full((1, 64, 64), 0.5)]), None)
    assert [None if mask is None else mask.mean().item() for mask in map(of_each.mask, range(4))] == [
        pytest.approx(9 / 16),
        0.5,
        None,
        None,
    ]
    losses = [
        train_lora.HollowTrainLoRA.execute(hollowed, each, **SETTINGS).args[2]["loss"]
        for each in (activations, store(None)[1])
    ]
    assert losses[0] != losses[1]
    with pytest.raises(Exception, match=r"Mask 2 of 2 is black all over\. Paint white what is to be learned"):
        store(torch.stack([left, torch.zeros(1, 64, 64)]))


def test_held_out_pictures_are_looked_at_and_not_learned(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hollowed = handles.HollowedModel(demo.model, 3)

    def held_out(every: int, latents: Any = demo.latents, low: Any = None) -> Any:
        return precompute_activations.HollowPrecompute.execute(
            *([hollowed], latents, demo.personal, demo.generic, [6], [0], ["float32"], ["held out"]),
            low_latents=low,
            hold_out=[every],
        ).args[0]

    activations = held_out(2)
    store = Store.open(activations.folder)
    assert store.fingerprint.kinds == ["image", "held-out image"] * 2 + ["image"]
    said: list[str] = []
    monkeypatch.setattr(progress, "say", lambda text, _: said.append(text))
    curves: list[Any] = []

    class Curve(train_preview.LossCurve):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            curves.append(self)

    monkeypatch.setattr(host_train, "LossCurve", Curve)
    trained = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS, validate_every=2)
    assert [step for step, _ in curves[-1].held_out] == [0, 2, 3]
    before, middle, after = (loss for _, loss in curves[-1].held_out)
    assert [f"held out {loss:.4f}" for loss in (before, middle, middle)] == [text.rpartition(", ")[2] for text in said]
    assert trained.ui["text"][0].endswith(f", held out {after:.4f}.")
    assert after < before

    low = [{"samples": torch.nn.functional.avg_pool2d(batch["samples"], 2)} for batch in demo.latents]
    kinds = Store.open(held_out(5, low=low).folder).fingerprint.kinds
    assert kinds == ["image"] * 4 + ["held-out image"] + ["low image"] * 4
    for every in (1, 6):
        with pytest.raises(
            HollowError, match=f"hold_out is {every}, and there are 5 pictures. Give 0 to hold out none"
        ):
            held_out(every)


def test_nodes_say_what_was_there(demo: Any) -> None:
    def run(prompts: list[Any], samples: int) -> tuple[Any, str]:
        stored = precompute_activations.HollowPrecompute.execute(
            [hollowed], demo.latents, demo.personal, prompts, [samples], [0], ["float32"], ["said"]
        )
        return stored.args[0], stored.ui["text"][0]

    hollowed = handles.HollowedModel(demo.model, 3)
    records = "6 records in output/hollow/said:\n"
    activations, first = run(demo.generic, 6)
    assert re.fullmatch(records + r"all new, \d+:\d\d min\.", first)
    assert run(demo.generic, 6)[1] == records + "all were there."
    others = [*demo.personal[1:], demo.personal[0]]
    assert run(others, 6)[1].endswith(" min. Changed: prompts.")
    assert run(others, 7)[1].endswith(" min. Changed: samples.")  # against the nearest
    assert run(demo.generic[:1], 8)[1].endswith(" min. Changed: samples, prompts.")
    (activations.folder / "records-00000.safetensors").unlink()
    assert run(demo.generic, 6)[1].startswith(records + "all new")

    trained = [
        train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | changed)
        for changed in ({}, {"save_every": 1}, {"steps": 4})
    ]
    told = [each.ui["text"][0].partition(".\nMean loss of the last ") for each in trained]
    assert told[0][0].startswith("3 steps: all new, ")
    assert told[1][0] == "3 steps: all were there"
    assert told[2][0].startswith("4 steps: 3 were there, 1 new, ")
    assert [len(each.ui["images"]) for each in trained] == [1, 1, 1]
    losses = trained[2].args[2]["loss"]
    assert told[2][2] == f"4: {sum(losses) / 4:.4f}."


def test_the_curve_has_round_numbers_at_its_axes() -> None:
    assert train_preview.ticks(0.1234, 0.3781) == pytest.approx([0.15, 0.2, 0.25, 0.3, 0.35])
    assert train_preview.ticks(0.000121, 0.000129) == pytest.approx([0.000122, 0.000124, 0.000126, 0.000128])
    assert train_preview.ticks(0, 400) == [0, 100, 200, 300, 400]
    for losses in ([0.5], [0.0, 0.0], [0.2, 0.1], [1 / step for step in range(1, 5001)]):
        for held_out in ([], [(0, 0.7)], [(0, 0.7), (1, 0.6)]):
            picture = train_preview.LossCurve(losses, held_out).draw()
            assert picture.size == (train_preview.SIDE, train_preview.SIDE)
            colors = {color for _, color in picture.getcolors(1 << 18)}
            assert (ImageColor.getrgb(train_preview.HELD_OUT) in colors) == bool(held_out)


def test_a_node_keeps_a_short_face_where_the_host_knows_of_one() -> None:
    described = train_lora.HollowTrainLoRA.GET_NODE_INFO_V1()["input"]
    told = {
        name: more.get("advanced") for part in ("required", "optional") for name, (_, more) in described[part].items()
    }
    visible = {"hollow_unet", "activations", *train_lora.FACE}
    if hasattr(io.Int.Input("of a host that knows"), "advanced"):
        assert told == {name: None if name in visible else True for name in told}
    else:
        assert set(told.values()) == {None}


def test_what_a_node_says_is_no_html(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text may hold a name of a graph from anywhere, and ComfyUI's front ends take it for HTML."""
    sent: list[str] = []
    server = SimpleNamespace(send_progress_text=lambda text, _: sent.append(text))
    monkeypatch.setattr(progress.PromptServer, "instance", server, raising=False)
    progress.say("hollow/<img src=x>, |ΔW| 0.1", "7")
    assert sent == ["hollow/&lt;img src=x&gt;, |ΔW| 0.1"]


def test_training_leaves_the_models_own_weights_as_they_are(demo: Any) -> None:
    """Even where ComfyUI has moved them outside of inference mode, as Unload Models does: they are ordinary then."""
    with torch.inference_mode(False):
        demo.model.model.to(torch.float16).to(torch.float32)
    weights = dict(demo.model.model.named_parameters())
    assert not any(weight.is_inference() for weight in weights.values())
    hollowed, activations = precomputed(demo)
    train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | {"precision": "bf16"})
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_files_along_the_way_are_loras_like_the_last(demo: Any, tmp_path: Path) -> None:
    hollowed, activations = precomputed(demo)
    folder = tmp_path / "loras" / "hollow"
    folder.mkdir(parents=True)
    for kept in ("cup.safetensors", "cup-2.safetensors", "cups-000001.safetensors"):
        (folder / kept).write_bytes(b"")
    named = {"steps": 13, "save_every": 1, "save_files": " hollow/cup.safetensors "}
    last = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | named).args[0]
    written = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
    assert written == [f"cup-{step:06}.safetensors" for step in range(4, 14)]
    assert {"cup.safetensors", "cup-2.safetensors", "cups-000001.safetensors"} < {
        path.name for path in folder.iterdir()
    }

    whole = train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | {"steps": 5}).args[0]
    fifth = lora_files.HollowLoadLoRA.execute("hollow/cup-000005.safetensors").args[0]
    assert fifth.recipe == last.recipe
    assert fifth.metadata["ss_output_name"] == "cup-000005"
    assert all(torch.equal(fifth.state[key], whole.state[key]) for key in whole.state)

    for settings, said in (({"save_files": "../cup"}, "does not stay inside"), ({"save_every": 0}, "save_every is 0")):
        with pytest.raises(HollowError, match=said):
            train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS | named | settings)


def test_fewer_steps_begin_anew_beside_what_was_done(demo: Any) -> None:
    hollowed, activations = precomputed(demo)
    few = SETTINGS | {"steps": 2}
    wanted, _, _ = train_lora.HollowTrainLoRA.execute(hollowed, activations, **few).args
    shutil.rmtree(next(activations.folder.glob("training-*")))
    train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS)
    lora, _, losses = train_lora.HollowTrainLoRA.execute(hollowed, activations, **few).args
    assert len(losses["loss"]) == 2
    assert all(torch.equal(lora.state[key], wanted.state[key]) for key in wanted.state)


def test_deleted_activations_are_told(demo: Any) -> None:
    hollowed, activations = precomputed(demo)
    shutil.rmtree(activations.folder)
    with pytest.raises(HollowError, match=r"were deleted\. Give Precompute Activations another name, or restart"):
        train_lora.HollowTrainLoRA.execute(hollowed, activations, **SETTINGS)


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


def test_names_stay_inside_comfyuis_folders_but_may_follow_its_links(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "loras", tmp_path / "big disk"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "SD15").symlink_to(elsewhere)
    assert files.inside(folder, "SD15/mine").resolve() == elsewhere / "mine"
    (tmp_path / "linked").symlink_to(folder)
    assert files.inside(tmp_path / "linked", "mine") == tmp_path / "linked" / "mine"
    for name in ("../mine", "SD15/../../mine", str(elsewhere / "mine"), ".", " ", "SD15/.."):
        with pytest.raises(Exception, match="does not stay inside"):
            files.inside(folder, name)


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
    with pytest.raises(Exception, match=r"to the text encoder the same as the generic one.* Write 'sks' into it, near"):
        run([hollowed], demo.latents, demo.personal, [*demo.generic[:4], demo.personal[4]], *rest)
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
