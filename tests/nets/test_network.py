"""Another kind of network, made here: whoever trains and plans asks nothing of it but what the protocol says.

It is a small transformer of one stream, hollowed as those are: a record keeps the state that enters the first block
that is left, and what the last ones add.
"""

from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_training import BreakAt, Broken, content, tiny_schedule
from torch import nn

from hollow_core.lora.layers import add_lora
from hollow_core.memory.planner import Planner
from hollow_core.memory.setting import Setting
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.network import Network, Targets, removed_fraction
from hollow_core.nets.schedule import NoiseSchedule, PredictionKind
from hollow_core.nets.unet import UNet
from hollow_core.training.precompute import Example, precompute
from hollow_core.training.settings import TrainSettings
from hollow_core.training.steps import Part, part_loss
from hollow_core.training.store import Record
from hollow_core.training.train import train

BLOCKS, WIDTH = 6, 16
FEW = TrainSettings(rank=2, targets=("to_q",), steps=5, learning_rate=1e-2, save_every=2)


class Flow(PredictionKind):
    """Flow matching, a kind of prediction made elsewhere: the numbers are σ_t, and ε − z is predicted."""

    name = "flow"

    def scales(self, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - number, number

    def snr(self, number: float) -> float:
        return ((1 - number) / number) ** 2

    def target(self, latents: Any, noise: Any, alpha: Any, sigma: Any) -> torch.Tensor:
        return noise - latents

    def clean(self, noisy: Any, predicted: Any, alpha: Any, sigma: Any) -> torch.Tensor:
        return noisy - sigma * predicted

    def error(self, snr: float) -> float:
        return (1 + snr**0.5) ** 2


FLOW = NoiseSchedule(Flow(), torch.arange(1, 1001) / 1000)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return tokens + torch.tanh(self.to_q(tokens) + self.text(text.mean(1, keepdim=True)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(4, WIDTH), nn.Embedding(1000, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def enter(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.embed(noisy.flatten(2).mT) + self.time(timesteps)[:, None]

    def leave(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.out(tokens).mT.reshape_as(like)


@dataclass(frozen=True)
class Toy:
    """A `Network`; a cut leaves out so many blocks from the first on, and as many from the last, but for two."""

    module: Any
    cut: int | None = None
    config = MappingProxyType({"blocks": BLOCKS})
    dtype = torch.float32
    record_dtype = torch.float16
    levels = 1
    usual_cut = 1
    token_side = None
    within = ("",)
    targets = Targets(("to_q",), ("to_q", "text"))
    kept = ()

    def check_inputs(self, name: str, latents: torch.Tensor, prompts: Any) -> None:
        assert latents.shape[1] == 4, name

    def cuts(self) -> range:
        return range(1, BLOCKS // 2)

    def check_cut(self, cut: int) -> None:
        assert cut in self.cuts()

    def blocks(self, cut: int) -> list[str]:
        return [*map(str, [*range(cut), *range(BLOCKS - cut, BLOCKS)])]

    def removed(self, cut: int) -> list[str]:
        return [f"blocks.{name}" for name in self.blocks(cut)]

    def behind(self, cut: int) -> list[str]:
        return ["out"]

    def leaves_attention(self, cut: int) -> bool:
        return True

    def stored_shapes(self, cut: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("state", "residual"), (height * width, WIDTH))

    def inputs(self, height: int, width: int) -> tuple[torch.Tensor, Conditioning]:
        return torch.zeros(1, 4, height, width), Conditioning(torch.zeros(1, 3, WIDTH))

    def base(self, cut: int) -> "ToyBase":
        return ToyBase(self.module, cut)

    def hollow(self, cut: int, timesteps: Any) -> "Toy":
        view = Transformer()
        view.embed, view.time, view.out = self.module.embed, self.module.time, self.module.out
        view.blocks = self.module.blocks[cut : BLOCKS - cut]
        return Toy(view, cut)

    def predict(self, noisy: torch.Tensor, timesteps: Any, conditioning: Conditioning, stored: Any) -> torch.Tensor:
        device = self.module.out.weight.device
        tokens = (
            stored["state"].to(device, torch.float32)
            if stored
            else self.module.enter(noisy.to(device), torch.tensor(timesteps, device=device))
        )
        for block in self.module.blocks:
            tokens = block(tokens, conditioning.encoder_hidden_states.to(device))
        if stored:
            tokens = tokens + stored["residual"].to(device, torch.float32)
        return self.module.leave(tokens, noisy)

    def checkpoint(self, levels: int | None) -> None:
        raise AssertionError


@dataclass(frozen=True)
class ToyBase:
    module: Any
    cut: int
    sees_identifier = False

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timesteps: Any, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        device = self.module.out.weight.device
        states = [self.module.enter(noisy.to(device), torch.tensor(timesteps, device=device))]
        for block in self.module.blocks:
            states.append(block(states[-1], conditioning.encoder_hidden_states.to(device)))
        return {"state": states[self.cut], "residual": states[-1] - states[BLOCKS - self.cut]}


@pytest.fixture
def toy() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(Transformer().eval().requires_grad_(False))


@pytest.fixture
def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    prompt = Conditioning(torch.randn(1, 3, WIDTH, generator=generator))
    latents = torch.randn(2, 4, 4, 4, generator=generator).split(1)
    return [Example(each, prompt, prompt, "a photo of a sks dog", "a photo of a dog") for each in latents]


@pytest.mark.parametrize("schedule", [tiny_schedule(), FLOW], ids=["epsilon", "flow"])
def test_it_is_precomputed_and_trained_and_goes_on(toy, examples, schedule, tmp_path):
    store = precompute(toy, schedule, examples, tmp_path / "store", cut=2, samples=10, dtype=torch.float32)
    with safe_open(store.folder / "records-00001.safetensors", "pt") as shard:
        assert {*shard.keys()} == {f"{index} {name}" for index in (8, 9) for name in ("state", "residual")}
    assert store.fingerprint.schedule.startswith(schedule.prediction.name)

    hollowed = toy.hollow(2, None)
    records = [store.record(index) for index in range(10)]
    inputs = [store.inputs(record.image) for record in records]
    for record, given in zip(records, inputs, strict=True):
        whole = Part.of(schedule, [record._replace(stored={})], [given], [1.0], snr_gamma=5.0)
        part = Part.of(schedule, [record], [given], [1.0], snr_gamma=5.0)
        torch.testing.assert_close(part_loss(hollowed, part), part_loss(toy, whole))

    expected = train(hollowed, schedule, store, FEW, folder=tmp_path / "whole")
    assert {key.split(".")[1] for key in expected.state} == {"0", "1"}  # what is left, by its place there
    with pytest.raises(Broken):
        train(hollowed, schedule, store, FEW, folder=tmp_path / "broken", progress=BreakAt(4))
    again = train(hollowed, schedule, store, FEW, folder=tmp_path / "broken")
    assert all(torch.equal(again.state[key], expected.state[key]) for key in expected.state)
    assert content(tmp_path / "broken").keys() == content(tmp_path / "whole").keys()


def test_the_loss_of_flow_matching_is_that_of_its_papers(tiny_unet, examples):
    """‖(ε − z) − v(z_t)‖² at z_t = (1 − σ) z + σ ε, on a U-Net."""
    network = UNet(tiny_unet("sd15", cross_attention_dim=WIDTH))
    record, (latents, prompt) = Record(0, "image", 399, 7), (examples[0].latents, examples[0].personal)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    predicted = network.module(0.6 * latents + 0.4 * noise, 399, **prompt.kwargs()).sample
    loss = part_loss(network, Part.of(FLOW, [record], [(latents, prompt)], [1.0]))
    assert loss.item() == pytest.approx((noise - latents - predicted).square().mean().item(), rel=1e-4)


def test_it_is_planned(toy, examples, tmp_path):
    def outline(dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            network = Toy(Transformer().eval().requires_grad_(False))
        return SimpleNamespace(
            network=network, schedule=FLOW, pixels_per_latent=8, resolution=32, vae=None, text_encoders=()
        )

    planner = Planner(outline)
    assert planner.cuts() == [1, 2]
    peaks = [planner.peak("train", Setting(cut, training=FEW)) for cut in (None, 1, 2)]
    assert [peak.bytes["weights"] for peak in peaks] == sorted([peak.bytes["weights"] for peak in peaks], reverse=True)
    assert planner.store_bytes(Setting(2, samples=10)) == 10 * 2 * 16 * WIDTH * 2  # fp16
    kept = sum(parameter.numel() for parameter in toy.hollow(2, None).module.parameters())
    assert removed_fraction(toy, 2) == pytest.approx(1 - kept / sum(p.numel() for p in toy.module.parameters()))


def test_a_lora_goes_into_what_is_left_and_shows_in_the_whole(toy, examples):
    hollowed = toy.hollow(1, None)
    add_lora(hollowed.module, 2, targets=FEW.targets, generator=torch.Generator().manual_seed(0))
    [latents], prompt = [examples[0].latents], examples[0].personal
    before = toy.predict(latents, [5], prompt, {})
    for name, parameter in hollowed.module.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3
    assert not torch.equal(toy.predict(latents, [5], prompt, {}), before)
