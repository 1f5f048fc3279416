"""Personalization Score: DINO, CLIP-I and CLIP-T of pictures."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY


class HollowPersonalizationScore(io.ComfyNode):
    """The paper's three scores, as numbers and as a sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowPersonalizationScore",
            display_name="Personalization Score",
            category=CATEGORY,
            description="Scores pictures as the papers do: DINO and CLIP-I say how much they show your subject, CLIP-T "
            "how well they fit their prompts. Nothing is downloaded.",
            is_input_list=True,  # pictures come as a batch, or as a list where they differ in size
            inputs=[
                io.Image.Input("references", tooltip="Real pictures of your subject: those you trained on."),
                io.Image.Input("images", tooltip="The pictures to score."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What was asked for: one line for all pictures, or a line for each. Empty: no CLIP-T.",
                ),
                io.String.Input(
                    "identifier",
                    default="sks",
                    tooltip="The rare word in the prompts, which CLIP does not know: it is left out.",
                ),
                io.String.Input(
                    "dino",
                    default="facebook/dino-vits16",
                    tooltip="A folder in ComfyUI/models with DINO's config.json and model.safetensors, or its name in "
                    "the hub's cache.",
                ),
                io.String.Input(
                    "clip",
                    default="openai/clip-vit-base-patch32",
                    tooltip="The same of CLIP, text and vision together.",
                ),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid"),
                io.Float.Output("dino_score", display_name="DINO"),
                io.Float.Output("clip_i", display_name="CLIP-I"),
                io.Float.Output("clip_t", display_name="CLIP-T", tooltip="Not a number without prompts."),
                io.String.Output("json", display_name="JSON"),
            ],
        )

    @classmethod
    def execute(
        cls,
        references: list[Any],
        images: list[Any],
        prompts: list[str],
        identifier: list[str],
        dino: list[str],
        clip: list[str],
    ) -> io.NodeOutput:
        """The sheet, the means, and all numbers as JSON."""
        import json
        import math

        from ..hollow_core.data.prompts import generic_prompt
        from ..hollow_core.evaluation import scores
        from ..hollow_core.evaluation.score_grid import score_grid
        from .host.pictures import to_image, to_pictures
        from .host.scores import scorers

        real, drawn = to_pictures(references), to_pictures(images)
        text, texts = "\n".join(prompts), None
        if text.strip():
            texts = [generic_prompt(each, identifier[0]) for each in scores.split_prompts(text, len(drawn))]
        with scorers(dino[0], clip[0]) as judge:
            of_real, of_drawn = judge.features(real), judge.features(drawn)
            each = scores.score(of_real, of_drawn, None if texts is None else judge.prompt_features(texts))
        mean, among = scores.mean(each), scores.among(of_real)
        figures = {
            "mean": mean._asdict(),
            "references": among and among._asdict(),
            "pictures": [score._asdict() for score in each],
        }
        return io.NodeOutput(
            to_image(score_grid(real, drawn, each, texts, among)),
            mean.dino,
            mean.clip_i,
            math.nan if mean.clip_t is None else mean.clip_t,
            json.dumps(figures, indent=1),
        )
