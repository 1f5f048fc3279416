"""Train Hollowed LoRA: the training itself, with progress, preview and Cancel."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowActivationsType, HollowLoraType, HollowUNetType, LoraModel, LossMap, showing_schema

LAYERS = ("attention", "all layers")
ALL_BEFORE = "attention, convolutions and feed-forward"  # what older graphs call all layers
STRATEGIES = ("bp", "zo", "selective")
PRECISIONS = ("bf16", "fp16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedulefree")
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
LORA_PRECISIONS = ("fp32", "bf16")
FACE = ("rank", "steps", "learning_rate", "precision", "gradient_checkpointing", "batch")  # what most people change


class HollowTrainLoRA(io.ComfyNode):
    """Stage 2 of Hollowed Net."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return showing_schema(
            node_id="HollowTrainLoRA",
            display_name="Train Hollowed LoRA",
            category=CATEGORY,
            description="Trains a LoRA on the hollowed U-Net, which alone is in memory meanwhile. Cancel stops within "
            "a step and keeps what is done; the same settings again go on from there.",
            hidden=[io.Hidden.unique_id],
            face=FACE,
            inputs=[
                HollowUNetType.Input("hollow_unet", tooltip="The one that went into Precompute Activations."),
                HollowActivationsType.Input("activations", tooltip="From Precompute Activations."),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Size of the LoRA. 4 is small and stiff, 128 the paper's; 16 suits most subjects.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip="The LoRA counts alpha / rank times. 0 means as much as the rank, which is usual here.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="1000 is the paper's for four or five pictures. With more, a finished training goes on.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    tooltip="1e-4 is the paper's. Lower it where pictures burn, raise it where nothing is learned. 0 "
                    "means the optimizer's usual one, which prodigy needs.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How much the class pictures count, if there are any. 0 leaves them out.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    tooltip="Of weights and arithmetic: bf16 for RTX 30 and newer, fp16 for older, fp32 on a CPU.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Needs much less memory and about a third more time. Turn it on when memory runs out. "
                    "Where the cut -1 of Hollow U-Net asks for it, it is on in any case.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # left out, the front end would draw a new one, and train anew
                    tooltip="Of the LoRA's start and the order of the records.",
                ),
                io.Int.Input(
                    "save_every",
                    default=100,
                    min=0,
                    max=100_000,
                    tooltip="Steps from one checkpoint to the next, in case the power fails. 0 saves at the end only.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100_000,
                    tooltip="Steps from one preview to the next: what the U-Net now makes of one noisy training "
                    "picture. 0 shows the loss only.",
                ),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Records a step. Costs time, and memory only for what is together.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=LAYERS[0],
                    optional=True,
                    tooltip="Which layers get a LoRA. Attention only is the paper's and gives a small file.",
                ),
                io.Combo.Input(
                    "strategy",
                    options=list(STRATEGIES),
                    default=STRATEGIES[0],
                    optional=True,
                    tooltip="bp: backpropagation. zo: forward passes only, at an inference's memory, slow to learn. "
                    "selective: bp on small pictures, and more and more zo on large ones; it needs the small "
                    "pictures' latents in Precompute Activations.",
                ),
                io.Float.Input(
                    "selective_gamma",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="For the strategy selective: how soon zo takes over. 0 leaves all to bp.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    default=OPTIMIZERS[0],
                    optional=True,
                    tooltip="adamw8bit keeps AdamW's states in 8 bits: a quarter of their memory, which counts at high "
                    "ranks. It needs bitsandbytes. prodigy finds its rate itself (set learning_rate to 0), adafactor "
                    "and lion take little memory, schedulefree gives out an average. They need pytorch-optimizer.",
                ),
                io.Combo.Input(
                    "lora_precision",
                    options=list(LORA_PRECISIONS),
                    default=LORA_PRECISIONS[0],
                    optional=True,
                    tooltip="bf16 halves the LoRA, its gradients and AdamW's states, and rounds small updates away.",
                ),
                io.Boolean.Input(
                    "fused_backward",
                    default=False,
                    optional=True,
                    tooltip="Update each matrix as its gradient comes, so that gradients never all exist. Without "
                    "clipping, for batch 1 without class pictures, in bf16 or fp32.",
                ),
                io.Int.Input(
                    "together",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="How many of a step's records, those of the class included, pass the U-Net at once: "
                    "faster, for the memory of so many. The plan of Hollow U-Net counts one.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=list(LR_SCHEDULES),
                    default=LR_SCHEDULES[0],
                    optional=True,
                    tooltip="How the learning rate goes along the steps: it stays, or falls to 0. One that falls ends "
                    "with the last step, so more steps begin anew.",
                ),
                io.Int.Input(
                    "warmup",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Steps over which the learning rate rises from 0 first.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    round=0.0001,
                    optional=True,
                    tooltip="Decay of an average over the steps that comes out in the LoRA's place, such as 0.99: "
                    "calmer than the last step. 0 does without.",
                ),
                io.Boolean.Input(
                    "dora",
                    default=False,
                    optional=True,
                    tooltip="Train a magnitude for each output of a layer, too (DoRA): slower, and in fp32.",
                ),
                io.Int.Input(
                    "validate_every",
                    default=50,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Steps from one look at the loss of held-out pictures to the next, if Precompute "
                    "Activations holds out any. 0 looks at the start and the end only.",
                ),
                io.String.Input(
                    "save_files",
                    default="",
                    optional=True,
                    tooltip="A name in the loras folder, such as hollow/my-subject: each checkpoint on the way leaves "
                    "a file there, my-subject-000200 and so on, of which the last ten stay. Empty leaves none.",
                ),
            ],
            outputs=[
                HollowLoraType.Output("hollow_lora", display_name="hollow LoRA"),
                LoraModel.Output("lora_model", display_name="LoRA", tooltip="For ComfyUI's own LoRA nodes."),
                LossMap.Output("loss_map", display_name="loss", tooltip="For ComfyUI's own Plot Loss Graph."),
            ],
        )

    @classmethod
    def validate_inputs(cls, layers: str = LAYERS[0]) -> bool | str:
        """ComfyUI looks into the list itself where this does not; saved graphs may have the former value."""
        return layers in (*LAYERS, ALL_BEFORE) or f"layers is {layers!r}. Choose one of: {', '.join(LAYERS)}."

    @classmethod
    def execute(
        cls,
        hollow_unet: Any,
        activations: Any,
        alpha: float,
        learning_rate: float,
        preview_every: int,
        layers: str = LAYERS[0],
        fused_backward: bool = False,
        ema: float = 0.0,
        save_files: str = "",
        **settings: Any,
    ) -> io.NodeOutput:
        """The LoRA in both spellings of the graph, and its losses; shown: their course, and what was learned."""
        import math

        from comfy_api.v0_0_2 import ui

        from ..hollow_core.lora.layers import ALL_LAYERS, ATTENTION
        from ..hollow_core.training.settings import TrainSettings
        from .host.pictures import to_image
        from .host.train import train

        targets = ATTENTION if layers == LAYERS[0] else ALL_LAYERS
        clipping = {"max_grad_norm": math.inf} if fused_backward else {}
        chosen = TrainSettings(
            alpha=alpha or None,
            learning_rate=learning_rate or None,
            targets=targets,
            fused_backward=fused_backward,
            ema=ema or None,
            **clipping,
            **settings,
        )
        name = save_files.strip()
        trained = train(hollow_unet, activations, chosen, preview_every, name, node_id=cls.hidden.unique_id)
        shown = ui.PreviewImage(to_image(trained.picture)).as_dict() | {"text": (trained.told,)}
        return io.NodeOutput(trained.lora, trained.lora.state, {"loss": trained.losses}, ui=shown)
