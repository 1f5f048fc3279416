"""Two paths in ComfyUI's own samplers: the native model where both see the same, the library's two paths where not."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.controlnet
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from hollow_pack.hollow_core.errors import HollowError
from hollow_pack.nodes.handles import HollowLora
from hollow_pack.nodes.host.two_path import two_path_model
from hollow_pack.nodes.host.unet import diffusers_unet
from quantised_models import FORMATS, quantised_model
from tiny_models import POOLED_WIDTH, SIZE, TOKEN_WIDTH, tiny_flux, tiny_model, tiny_unet
from two_path_reference import Reference

from hollow_core.lora import file as lora_file
from hollow_core.lora.dialects import parse, spell
from hollow_core.lora.layers import ATTENTION, add_lora, lora_parameters, lora_state
from hollow_core.lora.metadata import Recipe
from hollow_core.nets.unet import hollow

Conditionings = list[list[Any]]
Trained = Callable[..., HollowLora]

CUTS = [("sd15", 0), ("sd15", 3), ("sd15", 6), ("sd15", 11), ("sdxl", 0), ("sdxl", 2), ("sdxl", 8)]
EVERY_KIND = (
    *("conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2", "proj_in", "proj_out"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "ff.net.0.proj", "ff.net.2", *ATTENTION),
)


@cache
def native(layout: str = "sd15") -> ModelPatcher:
    return tiny_model(layout)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The factory of LoRA files that change a lot: `trained("sd15", 3)`."""

    @cache
    def make(layout: str, cut: int | None, targets: tuple[str, ...] = ("conv1", *ATTENTION)) -> HollowLora:
        unet, generator = tiny_unet(layout), torch.Generator().manual_seed(1)
        part = unet if cut is None else hollow(unet, cut, timesteps=None)
        there = [target for target in targets if any(name.endswith(target) for name, _ in part.named_modules())]
        add_lora(part, 4, targets=there, generator=generator)
        for matrix in lora_parameters(part):
            matrix.data.copy_(torch.randn(matrix.shape, generator=generator) / 8)
        path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
        recipe = Recipe(cut, "sks", "dog", "a photo of a sks dog", "a photo of a dog")
        lora_file.save(path, lora_state(part), unet.config, alpha=2.0, layout=layout, recipe=recipe)
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        return HollowLora(state, recipe, metadata)

    return make


def prompt(seed: int, tokens: int = 5, width: int = TOKEN_WIDTH, **values: Any) -> Conditionings:
    """One random prompt, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, tokens, width, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, POOLED_WIDTH, generator=generator), **values}]]


PERSONAL, GENERIC, NEGATIVE = prompt(1), prompt(2), prompt(3)


@torch.inference_mode()  # as ComfyUI runs nodes
def draw(
    model: ModelPatcher,
    positive: Conditionings = PERSONAL,
    negative: Conditionings = NEGATIVE,
    *,
    steps: int = 2,
    cfg: float = 4.0,
    batch: int = 1,
    sampler: str = "euler",
) -> Tensor:
    """Latents of a few steps, always from the same noise."""
    latents = torch.zeros(batch, 4, SIZE, SIZE)
    noise = comfy.sample.prepare_noise(latents, seed=0)
    options = {"disable_pbar": True, "seed": 0}
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "normal", positive, negative, latents, **options)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Of the largest value, as guidance and noise levels scale rounding errors too."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_different(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize(("layout", "cuts"), [("sd15", range(12)), ("sdxl", range(9))])
def test_the_same_prompt_at_strength_0_is_the_native_model(layout: str, cuts: range, trained: Trained) -> None:
    lora, expected = trained(layout, cuts[-1]), draw(native(layout), GENERIC)
    for cut in cuts:
        at_cut = lora._replace(recipe=lora.recipe._replace(cut=cut))
        assert torch.equal(draw(two_path_model(native(layout), at_cut, GENERIC, strength=0.0), GENERIC), expected)


@pytest.mark.parametrize(("layout", "cut"), CUTS)
def test_it_is_what_the_library_predicts(layout: str, cut: int, trained: Trained, tmp_path: Path) -> None:
    lora = trained(layout, cut)
    ours = draw(two_path_model(native(layout), lora, GENERIC))
    assert_same(ours, draw(Reference(tiny_unet(layout), lora, tmp_path, GENERIC).patched(native(layout))))
    assert_different(ours, draw(native(layout)))
    assert_different(ours, draw(two_path_model(native(layout), lora, None)))  # the generic prompt matters


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_lora_on_every_kind_of_layer(layout: str, trained: Trained, tmp_path: Path) -> None:
    lora = trained(layout, 3, EVERY_KIND)
    ours = draw(two_path_model(native(layout), lora, GENERIC, strength=0.5))
    assert_same(ours, draw(Reference(tiny_unet(layout), lora, tmp_path, GENERIC, strength=0.5).patched(native(layout))))


@pytest.mark.parametrize(("layout", "of"), [("sd15", "outputs"), ("sdxl", "outputs"), ("sd15", "inputs")])
def test_a_dora(layout: str, of: str, trained: Trained, tmp_path: Path) -> None:
    lora, unet = trained(layout, 3, EVERY_KIND), tiny_unet(layout)
    content, layers = parse(lora.state, unet.config), {}
    for module, layer in content.layers.items():
        weight = unet.get_submodule(module).weight.detach()
        if of == "inputs":
            layers[module] = layer._replace(dora_scale=1.1 * weight.transpose(0, 1).flatten(1).norm(dim=1)[None])
        else:
            layers[module] = layer._replace(dora_scale=1.1 * weight.flatten(1).norm(dim=1))
    dora = lora._replace(state=spell(layers, {}, unet.config, "kohya", ldm=layout == "sdxl"))
    ours = draw(two_path_model(native(layout), dora, GENERIC, strength=0.5))
    assert_same(ours, draw(Reference(unet, dora, tmp_path, GENERIC, strength=0.5).patched(native(layout))))
    assert_different(ours, draw(two_path_model(native(layout), lora, GENERIC, strength=0.5)))


def box(*sides: int) -> dict[str, Any]:
    mask = torch.zeros(1, SIZE, SIZE)
    top, bottom, left, right = sides
    mask[:, top:bottom, left:right] = 1.0
    return {"mask": mask}


RUNS: dict[str, dict[str, Any]] = {
    "without guidance": {"cfg": 1.0},
    "a batch": {"batch": 2},
    "prompts of different length": {"positive": prompt(1, 6), "negative": prompt(3, 4)},
    "areas": {
        "positive": [*PERSONAL, *prompt(4, area=(8, 16, 0, 0)), *prompt(5, area=(8, 16, 8, 0), strength=0.7)],
        "batch": 2,
    },
    "masks": {"positive": [*prompt(1, **box(0, 16, 0, 9)), *prompt(4, **box(4, 16, 6, 16), set_area_to_bounds=True)]},
    "time ranges": {"positive": [*prompt(1, end_percent=0.3), *prompt(4, start_percent=0.3)]},
}


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        *((run, {}) for run in RUNS),
        *((run, {"refresh": 2}) for run in ("a batch", "areas", "time ranges")),
        *((run, {"lora_on_negatives": False}) for run in ("a batch", "areas")),
    ],
    ids=str,
)
def test_what_comfyui_does_with_prompts(run: str, settings: Any, trained: Trained, tmp_path: Path) -> None:
    layout = "sdxl" if settings else "sd15"
    lora, drawing = trained(layout, 2), RUNS[run]
    reference = Reference(tiny_unet(layout), lora, tmp_path, GENERIC, **settings).patched(native(layout))
    assert_same(draw(two_path_model(native(layout), lora, GENERIC, **settings), **drawing), draw(reference, **drawing))


def test_prompts_that_memory_does_not_batch(trained: Trained) -> None:
    model = tiny_model("sd15")
    patched = two_path_model(model, trained("sd15", 3), GENERIC, refresh=2)
    expected = draw(patched, **RUNS["areas"])
    model.model.memory_usage_factor = 1e12
    with base_passes(model) as counted:
        assert_same(draw(patched, **RUNS["areas"]), expected)
    assert len(counted) == 6


def test_other_guiders_have_other_negatives(trained: Trained, tmp_path: Path) -> None:
    lora, settings = trained("sd15", 3), {"lora_on_negatives": False}

    @torch.inference_mode()
    def guided(model: ModelPatcher) -> Tensor:
        guider = Guider_PerpNeg(model)
        guider.set_conds(PERSONAL, NEGATIVE, prompt(4))
        guider.set_cfg(4.0, 1.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        latents = torch.zeros(1, 4, SIZE, SIZE)
        noise, sampler = comfy.sample.prepare_noise(latents, 0), comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latents, sampler, sigmas, disable_pbar=True, seed=0)

    reference = Reference(tiny_unet("sd15"), lora, tmp_path, GENERIC, **settings)
    assert_same(guided(two_path_model(native(), lora, GENERIC, **settings)), guided(reference.patched(native())))


def test_an_ordinary_lora_takes_the_ordinary_path(trained: Trained) -> None:
    for layout in ("sd15", "sdxl"):
        lora = trained(layout, None, EVERY_KIND)
        expected = draw(comfy.sd.load_lora_for_models(native(layout), None, lora.state, 0.5, 0.0)[0])
        assert_same(draw(two_path_model(native(layout), lora, GENERIC, strength=0.5)), expected)


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler(sampler: str, trained: Trained) -> None:
    patched = two_path_model(native("sdxl"), trained("sdxl", 3), None, strength=0.0)
    assert torch.equal(draw(patched, sampler=sampler, cfg=1.0), draw(native("sdxl"), sampler=sampler, cfg=1.0))


PATCHES: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "FreeU": lambda model: FreeU().patch(model, 1.1, 1.2, 0.9, 0.2)[0],
    "FreeU V2": lambda model: FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0],
    "Deep Shrink": lambda model: PatchModelAddDownscale.execute(
        model, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ).result[0],
    "Deep Shrink, skips too": lambda model: PatchModelAddDownscale.execute(
        model, 3, 2.0, 0.0, 1.0, False, "bicubic", "bicubic"
    ).result[0],
    "EasyCache": lambda model: EasyCacheNode.execute(model, 0.5, 0.0, 1.0, False).result[0],
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("cut", [3, 8])
def test_patches_of_other_nodes(patch: str, cut: int, trained: Trained) -> None:
    """Before ours and after, they do what they do to the native model."""
    lora, other, drawing = trained("sd15", cut), PATCHES[patch], {"steps": 6 if patch == "EasyCache" else 2}
    expected = draw(other(native()), **drawing)
    assert not torch.equal(expected, draw(native(), **drawing))
    assert torch.equal(draw(two_path_model(other(native()), lora, None, strength=0.0), **drawing), expected)
    assert torch.equal(draw(other(two_path_model(native(), lora, None, strength=0.0)), **drawing), expected)


@pytest.mark.parametrize("cut", [0, 3, 8])
def test_attention_patches_see_the_blocks_under_their_numbers(cut: int, trained: Trained) -> None:
    def seen(model: ModelPatcher) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        patched = model.clone()
        patched.set_model_attn2_patch(
            lambda q, k, v, options: (calls.append((*options["block"], options["transformer_index"])), (q, k, v))[1]
        )
        draw(patched, steps=1)
        return calls

    whole, both = seen(native()), seen(two_path_model(native(), trained("sd15", cut), GENERIC))
    base = [(side, block, _) for side, block, _ in whole if side != "output" or block < cut]
    hollowed = {"input": range(12 - cut, 12), "middle": range(1), "output": range(cut)}
    assert both == base + [(side, block, _) for side, block, _ in whole if block not in hollowed[side]]


class Residuals(comfy.controlnet.ControlBase):
    """Stands in for a ControlNet and a T2I-Adapter: random residuals for every place that has them."""

    def __init__(self, model: ModelPatcher) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        blocks = model.model.diffusion_model.input_blocks
        hooks = [
            block[-1].register_forward_hook(lambda *call: self.shapes.append(call[-1].shape[1:])) for block in blocks
        ]
        draw(model, steps=1, cfg=1.0)
        for hook in hooks:
            hook.remove()

    def get_control(self, *_: Any) -> dict[str, list[Tensor | None]]:
        generator = torch.Generator().manual_seed(5)
        skips = [torch.randn(1, *shape, generator=generator) for shape in self.shapes]
        adapter = [skip if block % 3 == 2 else None for block, skip in enumerate(skips)]
        return {
            "input": adapter[::-1],
            "middle": [torch.randn(1, *self.shapes[-1], generator=generator)],
            "output": skips,
        }


@pytest.mark.parametrize("cut", [0, 3, 8])
def test_a_controlnet(cut: int, trained: Trained) -> None:
    positive = prompt(1, control=Residuals(native()), control_apply_to_uncond=True)
    expected = draw(native(), positive)
    assert_different(expected, draw(native()))
    assert torch.equal(draw(two_path_model(native(), trained("sd15", cut), None, strength=0.0), positive), expected)


def test_an_earlier_lora_is_part_of_the_model(trained: Trained) -> None:
    def styled(model: ModelPatcher) -> ModelPatcher:
        return comfy.sd.load_lora_for_models(model, None, trained("sd15", None).state, 0.2, 0.0)[0]

    lora, expected = trained("sd15", 3), draw(styled(native()))
    assert torch.equal(draw(two_path_model(styled(native()), lora, None, strength=0.0)), expected)
    personal = draw(two_path_model(styled(native()), lora, GENERIC))
    assert_different(personal, expected)
    assert torch.equal(draw(styled(two_path_model(native(), lora, GENERIC))), personal)

    small = tiny_model("sd15", patcher=LittleMemory)
    assert_same(draw(two_path_model(styled(small), lora, GENERIC)), personal)
    assert small.model.model_lowvram


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="This ComfyUI knows no bypass")
def test_an_earlier_lora_with_bypass_is_part_of_the_model_in_drawing_but_not_in_training(trained: Trained) -> None:
    state, lora = trained("sd15", None).state, trained("sd15", 3)
    patched = comfy.sd.load_lora_for_models(native(), None, state, 0.2, 0.0)[0]
    bypassed = comfy.sd.load_bypass_lora_for_models(native(), None, state, 0.2, 0.0)[0]
    assert_same(draw(two_path_model(bypassed, lora, GENERIC)), draw(two_path_model(patched, lora, GENERIC)), 1e-4)
    with pytest.raises(HollowError, match=r"with bypass, so that its weights do not hold it\. Turn bypass off in its"):
        diffusers_unet(bypassed)
    bypassed.set_injections("bypass_lora", [])
    bypassed.injections = {"motion": []}
    with pytest.raises(HollowError, match="motion changes this MODEL while it samples, unseen by training"):
        diffusers_unet(bypassed)


class LittleMemory(ModelPatcher):
    """Keeps most weights where they are, patched and cast at every use."""

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, **options: Any) -> int:
        return super().partially_load(device_to, extra_memory=1000, **options)


def test_weights_of_8_bits(trained: Trained) -> None:
    stored, rounded = tiny_model("sd15", storage=torch.float8_e4m3fn), tiny_model("sd15")
    for weight in rounded.model.parameters():
        weight.data.copy_(weight.to(torch.float8_e4m3fn))
    for settings in ({"strength": 0.0}, {}):
        ours = draw(two_path_model(stored, trained("sd15", 3), GENERIC, **settings))
        assert_same(ours, draw(two_path_model(rounded, trained("sd15", 3), GENERIC, **settings)))
    assert next(stored.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_quantised_weights(name: str, trained: Trained) -> None:
    stored, _ = quantised_model("sd15", name)
    lora, expected = trained("sd15", 3), draw(stored)
    assert_same(draw(two_path_model(stored, lora, None, strength=0.0)), expected)
    personal = draw(two_path_model(stored, lora, GENERIC))
    assert_different(personal, expected)
    assert_same(personal, draw(two_path_model(native(), lora, GENERIC)), tolerance=0.5)


def test_computing_in_16_bits(trained: Trained) -> None:
    half = native().clone()
    half.set_model_compute_dtype(torch.bfloat16)
    lora = trained("sd15", 3)
    assert torch.equal(draw(two_path_model(half, lora, None, strength=0.0)), draw(half))
    assert_same(
        draw(two_path_model(half, lora, GENERIC, lora_on_negatives=False)),
        draw(two_path_model(native(), lora, GENERIC, lora_on_negatives=False)),
        tolerance=0.1,
    )


@contextmanager
def base_passes(model: ModelPatcher) -> Iterator[list[None]]:
    """How often the middle block, which only the base path has, ran."""
    passes: list[None] = []
    hook = model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("sampler", "steps", "passes"),
    [
        ("euler", 5, {1: 5, 2: 3, 3: 2, 9: 1}),
        ("heun", 4, {1: 7, 2: 3, 4: 1}),  # at the noise levels 0 1 1 2 2 3 3
        ("dpm_2", 4, {1: 7, 2: 4, 4: 2}),  # between 0 and 1 too, and so on
    ],
)
def test_refresh_counts_steps(sampler: str, steps: int, passes: dict[int, int], trained: Trained) -> None:
    for refresh, expected in passes.items():
        with base_passes(native()) as counted:
            draw(two_path_model(native(), trained("sd15", 3), GENERIC, refresh=refresh), steps=steps, sampler=sampler)
        assert len(counted) == expected


def test_guidance_that_asks_twice_keeps_two_activations(trained: Trained) -> None:
    """As self-attention guidance does, on other latents the second time."""
    apart: list[float] = []

    def ask_again(args: dict[str, Any]) -> Tensor:
        changed = args["input"] if apart else -args["input"]
        [again] = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], changed, args["sigma"], args["model_options"]
        )
        apart.append(float((again - args["cond_denoised"]).abs().max()))
        return args["denoised"]

    patched = two_path_model(native(), trained("sd15", 8), GENERIC, refresh=3)
    patched.set_model_sampler_post_cfg_function(ask_again)
    draw(patched, steps=3)
    assert apart[1] > 1e-3


@pytest.mark.parametrize("patch", ["FreeU", "FreeU V2"])
def test_what_writes_into_an_activation_meets_it_fresh_at_every_reuse(patch: str, trained: Trained) -> None:
    came_in: list[Tensor] = []

    def look(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if options["block"][1] == 3:
            came_in.append(h.clone())
        return h, skip

    patched = two_path_model(native(), trained("sd15", 3), GENERIC, refresh=4)
    patched.set_model_output_block_patch(look)
    draw(PATCHES[patch](patched), steps=4, cfg=1.0)
    assert len(came_in) == 4
    assert all(torch.equal(each, came_in[0]) for each in came_in)


def test_a_second_run_starts_anew(trained: Trained) -> None:
    patched = two_path_model(native(), trained("sd15", 3), GENERIC, refresh=3)
    expected = draw(patched)
    draw(patched, prompt(4))
    assert torch.equal(draw(patched), expected)
    gc.collect()
    assert not [kept for kept in gc.get_objects() if type(kept).__name__ == "_Run"]


@pytest.mark.parametrize("at", [None, "the base path", "the personal path"])
def test_afterwards_the_model_is_as_before(at: str | None, trained: Trained) -> None:
    model = tiny_model("sd15")
    unet, patched = model.model.diffusion_model, two_path_model(model, trained("sd15", 3), GENERIC, refresh=2)
    ours = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q
    ours.forward = another = type(ours).forward.__get__(ours)  # another extension's
    modules, weights = dict(model.model.named_modules()), {k: v.clone() for k, v in model.model.state_dict().items()}
    expected, options = draw(patched), str(patched.model_options)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise comfy.model_management.InterruptProcessingException

    places: dict[str | None, nn.Module] = {
        "the base path": unet.middle_block[0], "the personal path": unet.output_blocks[-1][0]
    }  # fmt: skip
    if at:
        hook = places[at].register_forward_pre_hook(interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            draw(patched, steps=4)
        hook.remove()
    after = dict(model.model.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert {name for name, module in modules.items() if "forward" in vars(module)} == {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    }
    assert ours.forward is another
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())
    assert str(patched.model_options) == options
    assert [len(wrappers) for kind in patched.wrappers.values() for wrappers in kind.values()] == [1]
    assert not model.wrappers
    assert torch.equal(draw(patched), expected)


def test_layers_in_the_hollow_are_left_out(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    whole = trained("sd15", None)
    with caplog.at_level(logging.WARNING):
        patched = two_path_model(native(), whole._replace(recipe=whole.recipe._replace(cut=3)), GENERIC)
    assert "layers of the LoRA lie in the hollow" in caplog.text
    [[wrapper]] = patched.wrappers["outer_sample"].values()
    there = [layer.path for layer in wrapper.__self__.layers]
    assert {path.rsplit(".", 1)[0] for path in there if path.startswith("input_blocks.8.1.")}
    assert not [path for path in there if path.startswith(("input_blocks.9.", "middle_block", "output_blocks.2."))]


def compiled(model: ModelPatcher) -> ModelPatcher:
    patched = model.clone()
    set_torch_compile_wrapper(patched, backend="eager")
    return patched


def split(model: ModelPatcher) -> ModelPatcher:
    """As "MultiGPU CFG Split" leaves it: the other devices have U-Nets of their own."""
    patched = model.clone()
    patched.set_additional_models("multigpu", [native().clone()])
    return patched


def refusal(model: ModelPatcher, lora: HollowLora, generic: Conditionings | None = GENERIC, **settings: Any) -> str:
    with pytest.raises(HollowError) as refused:
        two_path_model(model, lora, generic, **settings)
    return str(refused.value)


def test_what_cannot_run_is_refused(trained: Trained) -> None:
    lora, xl = trained("sd15", 3), trained("sdxl", 3)
    assert "is a Flux, which has no U-Net to hollow. Load an" in refusal(tiny_flux(), lora)
    assert "cannot run every 0 steps. Choose a refresh" in refusal(native(), lora, refresh=0)
    assert "strength of a LoRA cannot be nan. Take 1" in refusal(native(), lora, strength=float("nan"))
    deep = lora._replace(recipe=lora.recipe._replace(cut=12))
    assert "with cut 12, but this MODEL has cuts from 0 to 11. Use it" in refusal(native(), deep)
    negative = lora._replace(recipe=lora.recipe._replace(cut=-1))
    assert "with cut -1, but" in refusal(native(), negative)
    assert "4, 1, 1), but this MODEL needs" in refusal(native(), xl)
    assert "The LoRA changes lora_unet_" in refusal(native("sdxl"), lora)
    assert "which this MODEL has not. Use it with the kind" in refusal(native("sdxl"), lora)
    assert "two paths already. Connect the MODEL" in refusal(two_path_model(native(), lora, GENERIC), lora)
    assert "is compiled, and two paths cannot" in refusal(compiled(native()), lora)
    assert "spread over several GPUs, and two paths run on one. Take" in refusal(split(native()), lora)
    assert "The generic prompt holds 2 prompts" in refusal(native(), lora, GENERIC + PERSONAL)
    assert "prompt is 20 wide, but this MODEL reads 16. Encode it" in refusal(native(), lora, prompt(2, width=20))
    assert "no pooled embedding, which SDXL needs" in refusal(native("sdxl"), xl, [[GENERIC[0][0], {}]])
    with pytest.raises(HollowError, match="is compiled"):
        draw(compiled(two_path_model(native(), lora, GENERIC)))
    with pytest.raises(HollowError, match="over several GPUs"):
        draw(split(two_path_model(native(), lora, GENERIC)))


def test_a_lora_that_is_not_whole_is_refused(trained: Trained) -> None:
    lora = trained("sd15", 3)
    down = next(key for key in lora.state if key.endswith("lora_down.weight"))
    name = down.partition(".")[0]

    def changed(key: str, value: Tensor | None) -> str:
        state = {**lora.state, key: value}
        return refusal(native(), lora._replace(state={key: value for key, value in state.items() if value is not None}))

    assert f"has only one of two matrices for {name}. Get or make" in changed(down, None)
    assert f"The LoRA for {name} has shapes (4, 3" in changed(down, torch.zeros(4, 3))
    assert f"no plain LoRA: it holds {name}.hada_w1. Choose" in changed(f"{name}.hada_w1", torch.ones(1))
    assert f"has 1 magnitudes for {name}, not " in changed(f"{name}.dora_scale", torch.ones(1))
    small = tiny_model("sd15")
    small.model.diffusion_model.to(torch.float8_e4m3fn)
    dora = {key.replace("alpha", "dora_scale"): torch.ones(8, 1) for key in lora.state if key.endswith("alpha")}
    assert "needs the weights of this MODEL as they are, but they are in torch.float8_e4m3fn. Load" in refusal(
        small, lora._replace(state={**lora.state, **dora})
    )
