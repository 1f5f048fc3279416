"""The nodes, one file each, in the order in which a graph uses them."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .demo_model import HollowDemoModel
from .hollow_unet import HollowUNet
from .layer_weight_analyzer import HollowLayerWeightAnalyzer
from .load_pictures import HollowLoadPictures
from .lora_files import HollowConvertLoRA, HollowLoadLoRA, HollowSaveLoRA
from .personalization_score import HollowPersonalizationScore
from .precompute_activations import HollowPrecompute
from .scale_blocks import HollowScaleBlocks
from .split_prompt import HollowSplitPrompt
from .train_lora import HollowTrainLoRA
from .two_path_model import HollowTwoPathModel
from .two_path_sampler import HollowTwoPathSampler


class HollowExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of Hollow."""
        return [
            HollowLoadPictures,
            HollowSplitPrompt,
            HollowUNet,
            HollowPrecompute,
            HollowTrainLoRA,
            HollowSaveLoRA,
            HollowLoadLoRA,
            HollowTwoPathSampler,
            HollowTwoPathModel,
            HollowLayerWeightAnalyzer,
            HollowScaleBlocks,
            HollowConvertLoRA,
            HollowPersonalizationScore,
            HollowDemoModel,
        ]
