"""What is in a LoRA: figures against merged weights and dense matrices, the U's names, cuts, flags, pictures."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import original_checkpoint, tiny_pipeline

from hollow_core.analysis.base_weights import base_weights
from hollow_core.analysis.change import measure, together
from hollow_core.analysis.picture import picture
from hollow_core.analysis.report import analyze, analyze_file, analyze_files, spread, suggest
from hollow_core.errors import HollowError
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import Lora
from hollow_core.lora.file import write_dialect
from hollow_core.lora.layers import add_lora, lora_parameters, lora_state
from hollow_core.nets.unet import hollow
from hollow_core.nets.unet_layers import hollowed_layers, layers

TinyUNet = Callable[..., UNet2DConditionModel]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "downsamplers.0.conv")
ALPHA = 4.0


def trained(unet: UNet2DConditionModel, inside: float = 1.0, cut: int = 3, seed: int = 1) -> dict[str, LoraLayer]:
    """Puts a random LoRA of rank 2 on all of `unet`; its changes inside the hollow of `cut` are scaled by `inside`."""
    generator = torch.Generator().manual_seed(seed)
    add_lora(unet, 2, alpha=ALPHA, targets=TARGETS, generator=generator)
    for matrix in lora_parameters(unet):
        matrix.data = torch.randn(matrix.shape, generator=generator)
    outside = set(lora_state(hollow(unet, cut)))
    state = {key: matrix * (1 if key in outside else inside) for key, matrix in lora_state(unet).items()}
    names = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state)
    return {name: LoraLayer(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], ALPHA) for name in names}


def test_the_change_is_that_of_the_merged_weights(layout: str, tiny_unet: TinyUNet) -> None:
    """Eq. 3 of every block, with the LoRA really fused into the weights by peft, in double precision."""
    unet = tiny_unet(layout)
    before = {name: weight.double() for name, weight in unet.state_dict().items()}
    lora = trained(unet)
    unet.double()
    for module in unet.modules():
        if hasattr(module, "merge"):
            module.merge()
    after = {name.replace(".base_layer", ""): weight for name, weight in unet.state_dict().items()}
    analysis = analyze("it", lora, unet.config, base=lambda module: before[f"{module}.weight"])
    for block in layers(unet.config):
        weights = [
            f"{module}.weight" for module in lora if any(f"{module}.".startswith(f"{path}.") for path in block.modules)
        ]
        found = analysis.block(block)
        if not weights:
            assert found is None
            continue
        assert found is not None
        change = torch.cat([(after[name] - before[name]).flatten() for name in weights])
        base = torch.cat([before[name].flatten() for name in weights])
        assert found.mean == pytest.approx(change.abs().mean().item(), rel=1e-6)
        assert found.relative == pytest.approx((change.norm() / base.norm()).item(), rel=1e-6)
    queries = [name for name in before if name.endswith("attn2.to_k.weight")]
    change = torch.cat([(after[name] - before[name]).flatten() for name in queries])
    assert analysis.projection("attn2.k").mean == pytest.approx(change.abs().mean().item(), rel=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [((40, 30), 8), ((12, 6, 3, 3), 5), ((3, 50), 7)])
def test_ranks_are_those_of_the_dense_matrix(shape: tuple[tuple[int, ...], int]) -> None:
    """The last case has a rank above what its matrix can have."""
    (out, *into), rank = shape
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(rank, *into, generator=generator) * torch.logspace(0, -2, rank).view(-1, *[1] * len(into))
    up = torch.randn(out, rank, *[1] * (len(into) - 1), generator=generator)
    found = measure(LoraLayer(down, up, alpha=3.0))
    dense = 3.0 / rank * up.flatten(1).double() @ down.flatten(1).double()
    squares = torch.linalg.svdvals(dense)[: len(found.squares)] ** 2
    assert found.squares == pytest.approx(squares.tolist(), rel=1e-4, abs=1e-9)
    assert found.squared == pytest.approx(dense.norm().item() ** 2, rel=1e-6)
    kept = squares.cumsum(0) / squares.sum()
    assert found.effective_rank == int((kept < 0.95).sum()) + 1
    assert found.kept(2) == pytest.approx(kept[1].item(), rel=1e-5)


def test_a_large_matrix_is_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LoraLayer(torch.randn(2, 9), torch.randn(10, 2), 2.0, torch.rand(10))
    weight = torch.randn(10, 9)
    whole = measure(layer, weight)
    monkeypatch.setattr("hollow_core.analysis.change.CHUNK", 20)
    parts = measure(layer, weight)
    assert parts.squares == whole.squares
    assert (parts.mean, parts.relative) == pytest.approx((whole.mean, whole.relative))


def test_doras_magnitudes_count_as_peft_applies_them() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).double()
    weight = model[0].weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"]), model)
    layer = model[0]
    down, up = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    magnitude = layer.lora_magnitude_vector["default"].weight
    for matrix in (down, up, magnitude):
        matrix.data = torch.randn(matrix.shape, dtype=torch.float64).abs()
    found = measure(LoraLayer(down, up, 3.0, magnitude.detach()), weight)
    layer.merge()
    change = layer.base_layer.weight - weight
    assert found.mean == pytest.approx(change.abs().mean().item(), rel=1e-5)
    assert found.squared == pytest.approx(change.norm().item() ** 2, rel=1e-5)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_magnitudes_of_inputs_count_by_columns(kernel: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, magnitudes = torch.randn(10, 6, *kernel, generator=generator), torch.rand(1, 6, generator=generator)
    layer = LoraLayer(torch.randn(2, 6, *kernel), torch.randn(10, 2, *[1] * len(kernel)), 3.0, magnitudes)
    moved = weight + (3.0 / 2 * layer.up.flatten(1) @ layer.down.flatten(1)).view_as(weight)
    columns = moved.transpose(0, 1).flatten(1)
    moved = (columns * (magnitudes[0] / columns.norm(dim=1))[:, None]).view(6, 10, *kernel).transpose(0, 1)
    monkeypatch.setattr("hollow_core.analysis.change.CHUNK", 100)
    found = measure(layer, weight)
    assert found.mean == pytest.approx((moved - weight).abs().mean().item(), rel=1e-5)
    assert found.squared == pytest.approx((moved - weight).square().sum().item(), rel=1e-5)


@pytest.mark.slow
def test_full_differences_are_counted_and_what_is_not_is_told(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    """As LyCORIS and ComfyUI's extraction of a LoRA write them; a cut that hollows them out is not recommended."""
    unet, path = tiny_unet("sd15"), tmp_path / "a.safetensors"
    lora = trained(unet, inside=0.01, cut=4)
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    del lora[module]
    write_dialect(path, Lora("kohya", lora, {}, ()), unet.config, {}, dtype=torch.float32)
    difference = 1e4 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    more = {f"lora_unet_{module.replace('.', '_')}.diff": difference}
    others = {"lora_unet_conv_norm_out.w_norm": torch.ones(8), "lora_unet_conv_in.diff_b": torch.ones(8)}
    save_file(load_file(path) | more | others | {"bundle_emb.x.clip_l": torch.ones(1, 4)}, path)
    analysis = analyze_file(path, unet.config, base=lambda name: unet.get_submodule(name).base_layer.weight)
    assert analysis.changes[module].total == pytest.approx(difference.abs().sum().item(), rel=1e-5)
    weight = unet.get_submodule(module).base_layer.weight
    assert analysis.changes[module].relative == pytest.approx((difference.norm() / weight.norm()).item(), rel=1e-5)
    assert analysis.hollow_share(0) > 0.9
    assert suggest([analysis]) is None
    assert analysis.besides == (
        "It holds full differences of 1 weights, too, which are counted. It also holds lora_unet_conv_in.diff_b, the "
        "change of a bias, and 1 more, which no figure here counts: they may be most of what it does."
    )
    assert analysis.row()["besides"] == analysis.besides
    assert picture([analysis]).width > 100
    small = {next(iter(more)): difference[:12]}
    save_file(load_file(path) | small, path)
    with pytest.raises(HollowError, match=r"another kind of model: lora_unet_mid\S+diff has shape \(12, 24\), unlike"):
        analyze_file(path, unet.config)


def test_untrained_layers_have_no_figure(tiny_unet: TinyUNet) -> None:
    unet = hollow(tiny_unet("sd15"), 3)
    add_lora(unet, 2, targets=TARGETS, generator=torch.Generator())
    state = lora_state(unet)
    names = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state)
    lora = {name: LoraLayer(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], 2.0) for name in names}
    analysis = analyze("it", lora, unet.config, cut=3)
    rows = {row["block"]: row for row in analysis.row()["blocks"]}
    assert rows["5-1"]["mean"] is None
    assert rows["5-1"]["hollowed"]
    assert rows["9-1"]["mean"] == 0  # trained, though nothing was learned yet
    assert rows["9-1"]["effective_rank"] == 0
    assert not rows["9-1"]["hollowed"]
    assert picture([analysis]).width > 100


def test_the_suggested_cut_leaves_out_little(tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    small_inside = analyze("it", trained(unet, inside=0.01, cut=4), unet.config)
    suggestion = suggest([small_inside])
    assert suggestion is not None
    assert suggestion.cut == 4
    hollowed = hollowed_layers(unet.config, 4)
    held = sum(change.total for block in hollowed if (change := small_inside.block(block)))
    assert suggestion.share == pytest.approx(held / small_inside.whole().total)
    assert (
        suggestion.block_weights == "1,1,1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1"
    )  # of 26 slots: IN08 … OUT03
    alike = analyze("it", trained(tiny_unet("sd15")), unet.config)
    assert suggest([alike], share=0) is None
    everything = suggest([alike], share=1)
    assert everything is not None
    assert everything.cut == 11
    with pytest.raises(HollowError, match="2 is no share of the change"):
        suggest([alike], share=2)


def test_mean_and_spread_are_over_the_loras(tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    analyses = [analyze(str(seed), trained(unet, seed=seed), unet.config) for seed in range(3)]
    block = layers(unet.config)[0]
    means = torch.tensor([each.block(block).mean for each in analyses], dtype=torch.float64)  # type: ignore[union-attr]
    found = spread([each.block(block) for each in analyses])
    assert found is not None
    assert found == pytest.approx((means.mean().item(), means.std(correction=0).item()))
    assert together([]) is None


def test_what_looks_wrong_is_flagged_and_the_rest_measured(tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    lora = trained(unet)
    nan, huge, zero, odd, outlier, *_ = lora
    lora[nan].up[0, 0] = math.nan
    lora[huge].up[0, 0] = 1e30  # finite, but its square is not
    lora[zero].up.zero_()
    lora[odd] = lora[odd]._replace(alpha=1000.0, up=lora[odd].up / 250)
    lora[outlier] = lora[outlier]._replace(up=lora[outlier].up * 100)
    analysis = analyze("it", lora, unet.config)
    flagged = {flag.module: flag.what for flag in analysis.flags}
    assert set(flagged) == {nan, huge, zero, odd, outlier}
    assert flagged[nan] == flagged[huge] == "holds NaN, infinity or the like"
    assert flagged[zero] == "has no effect: its up matrix is all zero"
    assert flagged[odd] == "has an odd alpha, 1000 at rank 2"
    assert "times as much as is usual here" in flagged[outlier]
    assert math.isfinite(analysis.whole().mean)
    assert analysis.row()["modules"][nan]["mean"] is None
    assert picture([replace(analysis, name="a $name$ of 日本" * 9)]).width > 100


@pytest.mark.slow
def test_two_pictures_have_the_same_colours_for_the_same_change(tiny_unet: TinyUNet) -> None:
    """One LoRA beside another a hundred times as strong, and alone: its block is of the same colour."""
    unet = tiny_unet("sd15")
    lora = {module: layer._replace(up=layer.up / 1000) for module, layer in trained(unet).items()}
    strong = {module: layer._replace(up=layer.up * 100) for module, layer in lora.items()}
    alone = picture([analyze("weak", lora, unet.config)], share=0)
    both = picture([analyze(name, each, unet.config) for name, each in (("weak", lora), ("strong", strong))], share=0)
    colours = {colour for _, colour in alone.getcolors(2**24) or [] if colour[0] + 40 < colour[2]}
    assert len(colours & {colour for _, colour in both.getcolors(2**24) or []}) > 10
    assert both.width > 1.5 * alone.width


def test_another_models_lora_is_refused(tiny_unet: TinyUNet) -> None:
    layer = LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    with pytest.raises(HollowError, match="it changes no layer of this U-Net"):
        analyze("it", {"somewhere": layer}, tiny_unet("sd15").config)
    with pytest.raises(HollowError, match=r"changes 2 × 2 weights, the model has \(3, 3\) there"):
        measure(layer, torch.zeros(3, 3))


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_models_weights_are_read_one_by_one(layout: str, tmp_path: Path) -> None:
    """From a folder in full or half precision or in several files, and from a checkpoint."""
    pipeline = tiny_pipeline(layout)
    unet = pipeline.unet
    wanted = unet.state_dict()
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"
    unet.save_pretrained(tmp_path / "whole" / "unet")
    unet.save_pretrained(tmp_path / "parts" / "unet", max_shard_size="40KB")
    assert len(list((tmp_path / "parts" / "unet").glob("*.safetensors"))) > 1
    unet.save_pretrained(tmp_path / "half" / "unet", variant="fp16")
    save_file(original_checkpoint(pipeline, layout), tmp_path / "file.safetensors")
    for place in ("whole", "parts", "half", "file.safetensors"):
        weight = base_weights(tmp_path / place, unet.config)
        assert torch.equal(weight(name).flatten(), wanted[f"{name}.weight"].flatten()), place
    with pytest.raises(HollowError, match=r"has no mid_block.nothing.weight. Give the model that the LoRA was made"):
        base_weights(tmp_path / "whole", unet.config)("mid_block.nothing")
    with pytest.raises(HollowError, match=r"has no diffusion_pytorch_model.safetensors"):
        base_weights(tmp_path, unet.config)


@pytest.mark.slow
def test_files_of_every_dialect_are_analyzed_alike(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.save_pretrained(tmp_path / "model")
    lora = trained(tiny_unet("sd15"))
    for dialect in ("kohya", "diffusers", "comfy"):
        path = tmp_path / f"{dialect}.safetensors"
        write_dialect(path, Lora("kohya", lora, {}, ()), pipeline.unet.config, {}, dialect=dialect, dtype=torch.float32)
    asked: list[tuple[int, int]] = []
    paths = [tmp_path / f"{dialect}.safetensors" for dialect in ("kohya", "diffusers", "comfy")]
    analyses = analyze_files(paths, tmp_path / "model", lambda done, of: asked.append((done, of)))
    assert [each.name for each in analyses] == [path.name for path in paths]
    assert asked[-1][0] == asked[-1][1]
    first, *others = (each.whole() for each in analyses)
    for other in others:
        assert (other.mean, other.relative) == pytest.approx((first.mean, first.relative), rel=1e-5)
    assert picture(analyses).width > 100
    with pytest.raises(HollowError, match="base model is not named"):
        analyze_files(paths)  # so narrow a model is of no known family
