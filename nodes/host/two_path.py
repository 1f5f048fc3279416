"""Two-path sampling as a patch of ComfyUI's MODEL, for any of its samplers (Hollowed Net, section 4.3).

At every call of the U-Net the base path runs first, without the LoRA and on the generic prompt, up to the exit.
The personal path, hollowed and with the LoRA, takes its activation from there and predicts.

All hooks are wrappers of ComfyUI. The one on the MODEL starts a run; the run's own, and all that it keeps, live
as long as the run. The generic prompt travels with each personal one as further conditions, which ComfyUI repeats,
casts and batches like its own, so that guidance, areas, masks and time ranges are its business and not ours.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_base
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ...hollow_core.errors import HollowError
from ...hollow_core.sampling.two_path import check_paths
from ..handles import HollowLora
from .conditioning import Conditionings, only, pooled_embedding
from .paths import Inputs, max_cut, run_from_exit, run_to_exit
from .scoped_lora import LoraLayer, ScopedLora, lora_layers
from .unet import unet_of

Cond = dict[str, Any]  # a prompt as a guider holds it

KEY = "hollow_two_path"


def two_path_model(
    model: ModelPatcher,
    lora: HollowLora,
    generic: Conditionings | None,
    *,
    strength: float = 1.0,
    refresh: int = 1,
    lora_on_negatives: bool = True,
) -> ModelPatcher:
    """A clone of the MODEL that predicts on two paths, at the cut of the LoRA's recipe.

    `generic` is the prompt without the identifier. The base path sees it in place of each positive prompt; a
    negative prompt stands for itself, and with None so does every prompt. `strength` scales the LoRA, 1 is as
    trained. `refresh` runs the base path at every n-th sampling step only and uses its activation again between
    (as DeepCache does). `lora_on_negatives` False spares negative prompts the LoRA. An ordinary LoRA, whose recipe
    has no cut, takes the ordinary path, without generic prompt.
    Raises HollowError for a MODEL that is no U-Net, is compiled, runs on several GPUs or has two paths already, for a
    cut or a LoRA that does not fit it, for a strength that is no finite number, for a refresh below 1, and for a
    generic prompt that is not a single one of this model's.
    """
    check_paths(strength, refresh)
    _refuse_compiled_or_split(model)
    unet = unet_of(model)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise HollowError("This MODEL has two paths already. Connect the MODEL as it was before them.")
    cut = lora.recipe.cut if isinstance(lora.recipe.cut, int) else None
    if cut is not None and not 0 <= cut <= max_cut(unet):
        raise HollowError(
            f"The LoRA was trained with cut {cut}, but this MODEL has cuts from 0 to {max_cut(unet)}. "
            "Use it with the kind of model on which it was trained."
        )
    if generic is not None:
        _check_generic(model, generic)
    layers = _outside_the_hollow(lora_layers(model, lora.state), unet, cut)
    patched = model.clone()
    paths = _TwoPaths(cut, layers, generic, strength, refresh, lora_on_negatives)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, paths.sample)
    return patched


class _TwoPaths(NamedTuple):
    """The settings of the patch."""

    cut: int | None
    layers: list[LoraLayer]
    generic: Conditionings | None
    strength: float
    refresh: int
    lora_on_negatives: bool

    def sample(self, executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE: one run of a sampler, on two paths."""
        guider = executor.class_obj
        _refuse_compiled_or_split(guider.model_patcher)  # after us, that is
        run = _Run(self, guider.model_patcher.get_model_object("diffusion_model"))
        options, conds = guider.model_options, guider.conds
        try:
            guider.conds = self._with_base(conds, guider.model_patcher.model, noise, latent_image)
            guider.model_options = create_model_options_clone(options)
            # Added last, they are innermost: to other wrappers both paths are one prediction.
            wrappers: dict[str, Callable[..., Tensor]] = {WrappersMP.DIFFUSION_MODEL: run.predict}
            if self.refresh > 1:
                wrappers[WrappersMP.PREDICT_NOISE] = run.begin_evaluation
            for kind, wrapper in wrappers.items():
                add_wrapper_with_key(kind, KEY, wrapper, guider.model_options, is_model_options=True)
            return executor(noise, latent_image, *args, **kwargs)
        finally:
            guider.model_options, guider.conds = options, conds

    def _with_base(
        self, conds: dict[str, list[Cond]], model: Any, noise: Tensor, latent: Tensor
    ) -> dict[str, list[Cond]]:
        """A guider's prompts, each with what the base path sees in its place and with its share of the LoRA."""
        noise, latent = noise.to(model.device), latent.to(model.device)

        def with_base(group: str, cond: Cond) -> Cond:
            negative = cond.get("prompt_type", group) == "negative"
            added = {}
            if self.generic is not None:
                seen = [cond if negative else cond | _as_cond(self.generic)]
                [encoded] = comfy.samplers.encode_model_conds(
                    model.extra_conds, seen, noise, model.device, group, latent_image=latent
                )
                encoded = encoded["model_conds"]
                added = {f"hollow_{name}": encoded[name] for name in ("c_crossattn", "y") if name in encoded}
            if not self.lora_on_negatives:
                added["hollow_rows"] = comfy.conds.CONDRegular(torch.tensor([0.0 if negative else 1.0]))
            return cond | {"model_conds": cond["model_conds"] | added}

        return {group: [with_base(group, cond) for cond in of_group] for group, of_group in conds.items()}


class _Run:
    """What is kept between the steps of one run."""

    def __init__(self, paths: _TwoPaths, unet: UNetModel) -> None:
        self.cut, self.refresh, self.unet = paths.cut, paths.refresh, unet
        self.lora = ScopedLora(paths.layers, paths.strength)
        self.calls: Counter[Any] = Counter()
        self.exit_activations: dict[tuple[Any, ...], Tensor] = {}

    def begin_evaluation(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """PREDICT_NOISE: at every n-th step forget. Steps count, not evaluations, of which one may take several."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]  # falling; a step lasts until the next one
        steps_begun = int((sigmas >= timestep.flatten()[0].to(sigmas) * 0.9999).sum())
        if (steps_begun - 1) % self.refresh == 0:
            self.exit_activations.clear()
        self.calls.clear()
        return executor(x, timestep, model_options, *args, **kwargs)

    def predict(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        *,
        hollow_c_crossattn: Tensor | None = None,
        hollow_y: Tensor | None = None,
        hollow_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """DIFFUSION_MODEL: `UNetModel.forward`, on two paths."""
        personal = Inputs(x, timesteps, context, y, control, transformer_options)
        if executor.class_obj is not self.unet:  # another extension's, run under the same options
            return executor(*personal, **kwargs)
        if self.cut is None:
            with self.lora.on(self.unet, hollow_rows):
                return executor(*personal, **kwargs)
        base = personal
        if hollow_c_crossattn is not None:
            base = personal._replace(context=hollow_c_crossattn, y=hollow_y)
        exit_activation = self._exit_activation(executor, self.cut, base, **kwargs)
        with self.lora.on(self.unet, hollow_rows):
            return run_from_exit(executor, self.cut, exit_activation, personal, **kwargs)

    def _exit_activation(self, executor: Any, cut: int, base: Inputs, **kwargs: Any) -> Tensor:
        if self.refresh == 1:
            return run_to_exit(executor, cut, base, **kwargs)
        # A batch holds prompts as memory allows, so each has its own. Not the prompt alone tells them apart: with
        # an area its negative has the same name, and guidance may ask for one twice in an evaluation.
        uuids, keys = base.transformer_options["uuids"], []
        for uuid, rows in zip(uuids, base.x.chunk(len(uuids)), strict=False):
            keys.append((uuid, self.calls[uuid], rows.shape))
            self.calls[uuid] += 1
        if not self.exit_activations.keys() >= set(keys):
            fresh = run_to_exit(executor, cut, base, **kwargs).chunk(len(uuids))
            self.exit_activations = dict(zip(keys, fresh, strict=True)) | self.exit_activations
        # a copy in any case, as FreeU for one writes into it
        return torch.cat([self.exit_activations[key] for key in keys])


def _refuse_compiled_or_split(model: ModelPatcher) -> None:
    compiled = hasattr(model.get_model_object("diffusion_model"), "_orig_mod")
    if compiled or model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        raise HollowError("This MODEL is compiled, and two paths cannot run compiled. Take the compile node out.")
    if model.get_additional_models_with_key("multigpu"):  # other U-Nets, which would take the ordinary path
        raise HollowError("This MODEL is spread over several GPUs, and two paths run on one. Take that node out.")


def _check_generic(model: ModelPatcher, generic: Conditionings) -> None:
    embedding, values = only("generic", generic)
    width = model.model.model_config.unet_config.get("context_dim")
    if isinstance(width, int) and embedding.shape[-1] != width:
        raise HollowError(
            f"The generic prompt is {embedding.shape[-1]} wide, but this MODEL reads {width}. "
            "Encode it with this model's CLIP."
        )
    if isinstance(model.model, comfy.model_base.SDXL | comfy.model_base.SDXLRefiner):
        pooled_embedding("generic", values)


def _as_cond(generic: Conditionings) -> Cond:
    """What a prompt says, without where and when it applies."""
    embedding, values = generic[0]
    return {"cross_attn": embedding, "pooled_output": values.get("pooled_output")}


def _outside_the_hollow(layers: list[LoraLayer], unet: UNetModel, cut: int | None) -> list[LoraLayer]:
    if cut is None:
        return layers
    blocks = [f"input_blocks.{i}" for i in range(len(unet.input_blocks) - cut, len(unet.input_blocks))]
    hollowed = tuple(f"{block}." for block in [*blocks, "middle_block", *(f"output_blocks.{i}" for i in range(cut))])
    outside = [layer for layer in layers if not layer.path.startswith(hollowed)]
    if inside := len(layers) - len(outside):
        logging.warning("Hollow: %d layers of the LoRA lie in the hollow and have no effect.", inside)
    return outside
