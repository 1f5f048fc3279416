"""Patches of a transformer: from pictures to a LoRA, each record at its place."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_pipelines import tiny_vae
from tiny_transformers import tiny_prompt, tiny_transformer

from hollow_core.data.images import TrainingImage
from hollow_core.errors import HollowError
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import encode_images
from hollow_core.models.transformer_model import TransformerModel
from hollow_core.request import Request, patch_examples
from hollow_core.training.precompute import Example, plan_for, precompute
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train


def beginning(patches: int) -> tuple[TransformerModel, Request, list[Example]]:
    """A tiny FLUX without text encoders, whose prompts are random, and two pictures of colours that change."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = TransformerModel(tiny_transformer("flux").module, tiny_vae(), {}, (), scheduler, 128, 8)
    ramp = Image.linear_gradient("L").resize((128, 96))
    pictures = [Image.merge("RGB", (ramp, ramp.rotate(180), ramp.rotate(turn))) for turn in (0, 180)]
    images = [TrainingImage(picture, None, f"{n}.png", (0, 0, 128, 96)) for n, picture in enumerate(pictures)]
    training = TrainSettings(rank=2, steps=6, batch=2, together=2, targets=("to_q",))
    request = Request(images, "dog", setting=Setting((1, 1), samples=12, patches=patches, training=training))
    prompts = [tiny_prompt(model.network, seed=seed) for seed in (1, 2)]
    latents = encode_images(model, images)
    return model, request, [Example(z, *prompts, "a photo of a sks dog", "a photo of a dog") for z in latents]


def test_each_record_is_learned_at_its_place(tmp_path: Path) -> None:
    model, request, examples = beginning(64)
    schedule, network = model.schedule, model.network
    examples, records = patch_examples(model, request, examples, plan_for(examples, 12, schedule, 0), [])
    places = [example.personal.crop for example in examples]
    assert all(place is not None for place in places)
    assert len(set(places)) > 3
    for record, place in zip(records, places, strict=True):
        assert place is not None
        taken = 64 + round(schedule.noise(record.timestep) * 8) * 4
        assert (place.rows, place.columns) == tuple(int(side / (16 * taken / 64) + 0.5) for side in (96, 128))

    def trained(folder: Path, together: int) -> dict[str, torch.Tensor]:
        made = {"cut": (1, 1), "samples": 12, "together": together, "records": records}
        store = precompute(network, schedule, examples, folder / "store", **made, dtype=torch.float32)
        assert [store.inputs(record.image)[1].crop for record in store.records] == places
        hollowed = beginning(64)[0].network.hollow((1, 1), None)
        return train(hollowed, schedule, store, request.setting.training, folder=folder).state

    one_by_one, together = (trained(tmp_path / str(number), number) for number in (1, 4))
    assert all(torch.allclose(one_by_one[key], together[key], atol=1e-5) for key in one_by_one)
    assert all(matrix.any() for matrix in one_by_one.values())


def test_a_patch_is_of_whole_tokens() -> None:
    model, request, examples = beginning(72)
    with pytest.raises(HollowError, match="The side of patches, 72, is no multiple of 16 pixels"):
        patch_examples(model, request, examples, plan_for(examples, 12, model.schedule, 0), [])
