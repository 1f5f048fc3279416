"""The optimizers, and their levers: fused into backward it does the same, in 8 bits nearly; and all go on."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import BreakAt, Broken, content, same, tiny_beginning

from hollow_core.errors import HollowError
from hollow_core.lora.layers import ALL_LAYERS, lora_parameters
from hollow_core.memory.dry_run import BLOCK, DryRun
from hollow_core.training.optimizer import ALL_AT_ONCE, Optimizer
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train

FEW = TrainSettings(rank=2, steps=6, learning_rate=1e-3, max_grad_norm=math.inf)
FUSED = replace(FEW, fused_backward=True)


@pytest.fixture
def begin(tmp_path):
    def begin(priors=0):
        return tiny_beginning(tmp_path / f"store {priors}", priors)

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_does_the_same_bit_by_bit(begin, tmp_path, checkpointing):
    apart = train(*begin(), FEW, folder=tmp_path / "apart")
    fused = train(*begin(), replace(FUSED, gradient_checkpointing=checkpointing), folder=tmp_path / "fused")
    assert fused.losses == apart.losses
    assert same(fused.state, apart.state)
    assert content(tmp_path / "fused") == content(tmp_path / "apart")


@pytest.mark.slow
def test_fused_or_not_may_change_on_the_way(begin, tmp_path):
    train(*begin(), replace(FUSED, steps=3), folder=tmp_path / "run")
    assert same(
        train(*begin(), FEW, folder=tmp_path / "run").state, train(*begin(), FEW, folder=tmp_path / "one").state
    )


@pytest.mark.slow
def test_never_more_than_one_gradient_is_there_when_fused(begin, tmp_path, monkeypatch):
    network, schedule, store = begin()
    there = []
    consume = Optimizer._consume

    def watched(self, *arguments):
        there.append(sum(parameter.grad is not None for parameter in lora_parameters(network.module)))
        consume(self, *arguments)

    monkeypatch.setattr(Optimizer, "_consume", watched)
    train(network, schedule, store, FUSED, folder=tmp_path)
    assert there == [1] * FUSED.steps * len(lora_parameters(network.module))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in lora_parameters(network.module))


def test_a_non_finite_gradient_leaves_the_lora_from_before_it(begin, tmp_path):
    network, schedule, store = begin()
    start = train(network, schedule, store, FUSED, folder=tmp_path / "start", stop=lambda: True).state
    network.module.conv_out.register_full_backward_hook(lambda module, to_input, _: (to_input[0] * math.inf,))
    result = train(network, schedule, store, FUSED, folder=tmp_path / "run")
    assert (result.stopped, result.steps) == ("non-finite gradient", 0)
    assert same(result.state, start)


@pytest.mark.slow
def test_a_lora_in_bf16_is_near_in_half_the_bytes_and_goes_on(begin, tmp_path):
    settings = replace(FEW, lora_precision="bf16")
    exact = train(*begin(), FEW, folder=tmp_path / "fp32")
    half = train(*begin(), settings, folder=tmp_path / "bf16")
    assert half.losses == pytest.approx(exact.losses, rel=0.03)
    assert {tensor.dtype for tensor in half.state.values()} == {torch.bfloat16}
    saved = load_file(tmp_path / "bf16" / "checkpoint.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "exp_avg" in name} == {torch.bfloat16}
    train(*begin(), replace(settings, steps=3), folder=tmp_path / "run")
    assert same(train(*begin(), settings, folder=tmp_path / "run").state, half.state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_grad_norm": 1.0}, r"does not go with max_grad_norm 1\.0\. Set it to infinity"),
        ({"batch": 2}, r"does not go with batch 2\. Set it to 1"),
        ({"precision": "fp16"}, r"does not go with precision fp16\. Choose bf16 or fp32"),
        ({"optimizer": "prodigy", "learning_rate": None}, r"does not go with optimizer prodigy\. Choose another"),
        ({"optimizer": "schedulefree"}, r"does not go with optimizer schedulefree\. Choose another"),
    ],
)
def test_what_fused_cannot_do_is_refused(change, said):
    with pytest.raises(HollowError, match=said):
        replace(FUSED, **change)


def test_fused_with_records_of_the_class_is_refused(begin, tmp_path):
    with pytest.raises(HollowError, match=r"one record a step, but there are pictures of the class"):
        train(*begin(priors=1), FUSED, folder=tmp_path / "run")
    assert train(*begin(priors=1), replace(FUSED, prior_weight=0), folder=tmp_path / "run").stopped == "finished"


def test_an_unknown_optimizer_and_a_missing_extra_are_told(monkeypatch):
    with pytest.raises(HollowError, match=r"optimizer is 'sgd'\. Choose adamw, .* or schedulefree"):
        TrainSettings(optimizer="sgd")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(HollowError, match=r"needs bitsandbytes\. Install it \(pip install 'hollow\[bitsandbytes\]'\)"):
        Optimizer([torch.nn.Parameter(torch.zeros(2))], "adamw8bit", learning_rate=1e-3, weight_decay=0.0)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    said = r"needs pytorch-optimizer\. Install it \(pip install 'hollow\[optimizers\]'\)"
    with pytest.raises(HollowError, match=f"The optimizer lion {said}"):
        Optimizer([torch.nn.Parameter(torch.zeros(2))], "lion", learning_rate=1e-3, weight_decay=0.0)


class TestEightBits:
    """Of matrices with 4096 elements and more; bitsandbytes leaves smaller ones in 32 bits."""

    EIGHT = replace(FEW, optimizer="adamw8bit", rank=512, targets=("to_q", "to_out.0"), steps=4)

    @pytest.fixture(autouse=True)
    def _extra(self):
        pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")

    def test_it_is_near_to_32_bits_in_a_quarter_of_the_bytes(self, begin, tmp_path):
        exact = train(*begin(), replace(self.EIGHT, optimizer="adamw"), folder=tmp_path / "32")
        eight = train(*begin(), self.EIGHT, folder=tmp_path / "8")
        assert not same(eight.state, exact.state)
        assert eight.losses == pytest.approx(exact.losses, rel=0.02)
        parameters = [torch.nn.Parameter(torch.zeros(64, 1024)) for _ in range(2)]
        sizes = {}
        for name in ("adamw", "adamw8bit"):
            optimizer = Optimizer(parameters, name, learning_rate=1e-3, weight_decay=0.0)
            with optimizer.watching():
                sum(parameter.sum() for parameter in parameters).backward()
            optimizer.step()
            sizes[name] = sum(part.nbytes for parts in optimizer.state().values() for part in parts.values())
        assert sizes["adamw8bit"] < 0.27 * sizes["adamw"]

    @pytest.mark.slow
    @pytest.mark.parametrize("fused", [False, True])
    def test_broken_off_and_gone_on_it_ends_with_the_same_lora(self, begin, tmp_path, fused):
        settings = replace(self.EIGHT, fused_backward=fused)
        whole = train(*begin(), settings, folder=tmp_path / "whole")
        with pytest.raises(Broken):
            train(*begin(), replace(settings, save_every=2), folder=tmp_path / "run", progress=BreakAt(4))
        result = train(*begin(), settings, folder=tmp_path / "run")
        assert result.losses == whole.losses
        assert same(result.state, whole.state)
        assert content(tmp_path / "run") == content(tmp_path / "whole")

    def test_a_checkpoint_of_the_other_optimizer_is_refused(self, begin, tmp_path):
        train(*begin(), self.EIGHT, folder=tmp_path)
        with pytest.raises(HollowError, match=r"optimizer \(adamw8bit there, adamw asked\)"):
            train(*begin(), replace(self.EIGHT, optimizer="adamw"), folder=tmp_path)


class TestOthers:
    """Those of the package pytorch-optimizer."""

    @pytest.fixture(autouse=True)
    def _extra(self):
        pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "rate"), [("adafactor", 3e-2), ("lion", 1e-2), ("schedulefree", 3e-2)])
    def test_loss_falls(self, begin, tmp_path, name, rate):
        settings = replace(FEW, optimizer=name, learning_rate=rate, steps=48, targets=ALL_LAYERS[:5])
        losses = train(*begin(), settings, folder=tmp_path).losses
        assert sum(losses[-8:]) < 0.8 * sum(losses[:8])

    @pytest.mark.slow
    def test_prodigy_finds_its_rate_and_lowers_the_loss(self, begin, tmp_path):
        settings = replace(FEW, optimizer="prodigy", learning_rate=None, steps=96, targets=ALL_LAYERS[:5])
        losses = train(*begin(), settings, folder=tmp_path).losses
        assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
        saved = load_file(tmp_path / "checkpoint.safetensors")
        assert saved["optimizer backward group d"] > 10 * 1e-5  # where it begins

    @pytest.mark.slow
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("name", ["prodigy", "adafactor", "lion", "schedulefree"])
    def test_broken_off_and_gone_on_it_ends_with_the_same_lora(self, begin, tmp_path, name, fused):
        if fused and name in ALL_AT_ONCE:
            pytest.skip("never fused")
        settings = replace(FEW, optimizer=name, learning_rate=None, warmup=2)
        whole = train(*begin(), settings, folder=tmp_path / "whole")
        first = replace(settings, save_every=2, fused_backward=fused)
        with pytest.raises(Broken):
            train(*begin(), first, folder=tmp_path / "run", progress=BreakAt(4))
        result = train(*begin(), settings, folder=tmp_path / "run")
        assert result.losses == whole.losses
        assert same(result.state, whole.state)
        assert content(tmp_path / "run") == content(tmp_path / "whole")

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("name", ["prodigy", "adafactor", "lion", "schedulefree"])
    def test_a_dry_run_counts_the_states_that_there_are(self, name, precision):
        def states(device):
            shapes = [(16, 320), (320, 16), (16, 320, 3, 3), (320, 16, 1, 1)]
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
            optimizer = Optimizer(parameters, name, learning_rate=1.0, weight_decay=1e-2)
            with optimizer.watching():
                torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
            optimizer.step()
            return [each for state in optimizer._optimizers[0].state.values() for each in state.values()]

        with DryRun() as run:
            planned = [each for each in states("meta") if isinstance(each, torch.Tensor)]
        real = [each for each in states("cpu") if isinstance(each, torch.Tensor)]
        assert [(each.shape, each.dtype) for each in planned] == [(each.shape, each.dtype) for each in real]
        assert run.peak().bytes["optimizer"] == sum(-(-each.nbytes // BLOCK) * BLOCK for each in real)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"optimizer": "prodigy"}, r"learning rate 0\.001 is too low for prodigy.* Set it to 1, or leave it out"),
            (
                {"strategy": "selective", "optimizer": "schedulefree"},
                "selective does not go with optimizer schedulefree",
            ),
            ({"lr_schedule": "cosine", "optimizer": "schedulefree"}, r"cosine does not go with .*\. Choose constant"),
            (
                {"ema": 0.9, "optimizer": "schedulefree"},
                r"ema 0\.9 does not go with optimizer schedulefree\. Leave it out",
            ),
        ],
    )
    def test_what_does_not_belong_together_is_refused(self, change, said):
        with pytest.raises(HollowError, match=said):
            replace(FEW, **change)
