"""MeZO's step against autograd, and that it leaves no trace but a gradient."""

import weakref

import pytest
import torch
from tiny_training import tiny_examples, tiny_schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hollow_core.lora.layers import add_lora, lora_parameters
from hollow_core.nets.unet import UNet
from hollow_core.training.steps import Part, ZerothOrder, backpropagate, part_loss
from hollow_core.training.store import Record


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def problem(tiny_unet):
    """The LoRA of a tiny U-Net, all of it in use, and the loss of its two records."""
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    add_lora(unet, 1, targets=["attn2.to_q", "attn2.to_v"], generator=seeded())
    for parameter in lora_parameters(unet):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(len(parameter)))
    examples, records = tiny_examples(unet), [Record(0, "image", 731, 11), Record(1, "image", 40, 12)]

    def loss_of(part):
        [(index, weight)] = part
        example = examples[index]
        inputs = [(example.latents, example.personal)]
        return part_loss(UNet(unet), Part.of(schedule, [records[index]], inputs, [weight]))

    return lora_parameters(unet), loss_of


def test_estimate_is_the_gradient_in_expectation():
    """Of a curved function of 12 numbers, within four standard errors of 4,000 queries, against autograd."""
    start = torch.randn(3, 4, generator=seeded(1))
    slope = torch.randn(3, 4, generator=seeded(2))
    parameters = [torch.nn.Parameter(start[:1].clone()), torch.nn.Parameter(start[1:].clone())]

    def loss_of(part):
        [(record, weight)] = part
        return weight * (record * slope * torch.cat(parameters)).sin().sum()

    parts = [[(1, 0.7)], [(2, 0.3)]]
    backpropagate(loss_of, parts, scale=3.0)
    expected = torch.cat([parameter.grad for parameter in parameters])
    estimates = []
    for seed in range(2000):
        for parameter in parameters:
            parameter.grad = None
        ZerothOrder(parameters, seed=7919 * seed, epsilon=1e-2, queries=2)(loss_of, parts, scale=3.0)
        estimates.append(torch.cat([parameter.grad for parameter in parameters]))
    drawn = torch.stack(estimates)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    assert (expected.abs() > 8 * error).any()  # so it could have failed
    # more queries, less variance: σ² / n
    alone = torch.stack([_estimate(parameters, loss_of, parts, seed, 1) for seed in range(500)])
    many = torch.stack([_estimate(parameters, loss_of, parts, seed, 8) for seed in range(500)])
    assert many.var(0).sum() / alone.var(0).sum() == pytest.approx(1 / 8, rel=0.3)


def _estimate(parameters, loss_of, parts, seed, queries):
    for parameter in parameters:
        parameter.grad = None
    ZerothOrder(parameters, seed=7919 * seed, epsilon=1e-2, queries=queries)(loss_of, parts)
    return torch.cat([parameter.grad for parameter in parameters])


def test_projected_gradient_is_the_directional_derivative_by_autograd(problem):
    parameters, loss_of = problem
    parts = [[(0, 1.0)], [(1, 0.5)]]
    loss = backpropagate(loss_of, parts)
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    told = ZerothOrder(parameters, seed=5, epsilon=1e-2, queries=1)(loss_of, parts)
    estimate = torch.cat([parameter.grad.flatten() for parameter in parameters])
    directions = torch.randn(len(gradient), generator=seeded(5))
    torch.testing.assert_close(estimate, (gradient @ directions) * directions, rtol=1e-2, atol=1e-5)
    assert told.item() == pytest.approx(loss.item(), rel=1e-2)


def test_in_strengths_it_is_found_how_much_each_matrix_should_be_scaled(problem):
    """z is each matrix times a number: against the derivative along the matrices themselves, by autograd."""
    parameters, loss_of = problem
    backpropagate(loss_of, [[(0, 1.0)]])
    along = torch.stack([(each.grad * each).sum() for each in parameters])  # d loss / d log strength
    for each in parameters:
        each.grad = None
    ZerothOrder(parameters, seed=5, epsilon=1e-2, queries=1, strengths=True)(loss_of, [[(0, 1.0)]])
    numbers = torch.randn(len(parameters), generator=seeded(5))
    for number, each in zip(numbers, parameters, strict=True):
        expected = (along.detach() @ numbers) * number * each.detach()
        torch.testing.assert_close(each.grad, expected, rtol=2e-2, atol=1e-5)


def test_gradients_add_up_as_backpropagations_do(problem):
    parameters, loss_of = problem
    step = ZerothOrder(parameters, seed=5)
    step(loss_of, [[(0, 1.0)]])
    once = [parameter.grad.clone() for parameter in parameters]
    step(loss_of, [[(0, 1.0)]], scale=2.0)
    for parameter, first in zip(parameters, once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * first)


def test_the_lora_is_bit_equal_after_a_thousand_perturbations():
    parameters = [torch.nn.Parameter(torch.randn(40, 30, generator=seeded(1)) * scale) for scale in (1e-3, 1.0, 1e3)]
    before = [parameter.detach().clone() for parameter in parameters]
    seen = []

    def loss_of(_):
        seen.append(all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)))
        return parameters[0].square().sum()

    for seed in range(250):
        ZerothOrder(parameters, seed)(loss_of, [[(0, 1.0)]])
    assert len(seen) == 1000
    assert not any(seen)  # each time the LoRA was another
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_the_lora_is_bit_equal_after_a_loss_that_breaks_off():
    parameter = torch.nn.Parameter(torch.randn(8, generator=seeded()))
    before = parameter.detach().clone()

    def loss_of(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ZerothOrder([parameter], 0)(loss_of, [[(0, 1.0)]])
    assert torch.equal(parameter, before)
    assert parameter.grad is None


class Live(TorchDispatchMode):
    """The most bytes alive at once of what was made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]:
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return out

    def gone(self, size):
        self.now -= size


def test_no_graph_is_built_and_the_peak_is_that_of_an_inference(problem):
    parameters, loss_of = problem
    graphs = []

    def watched(part):
        loss = loss_of(part)
        graphs.append(loss.grad_fn)
        return loss

    with torch.no_grad(), Live() as inference:
        loss_of([(0, 1.0)])
    with Live() as zeroth_order:
        ZerothOrder(parameters, 0)(watched, [[(0, 1.0)]])
    with Live() as backpropagation:
        backpropagate(loss_of, [[(0, 1.0)]])
    assert graphs == [None] * 4
    lora = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    assert zeroth_order.peak <= inference.peak + 3 * lora  # a copy, z, at the end a gradient
    assert backpropagation.peak > 2 * inference.peak
