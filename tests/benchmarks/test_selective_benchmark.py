"""What a zeroth-order step can do, on a function whose gradient and greatest fall are known."""

from typing import Any

import pytest
import torch

from benchmarks.selective import WAYS, _dot, _fall, _gradient, edge, falling
from hollow_core.training.steps import ZerothOrder, backpropagate

Matrices = list[torch.Tensor]


@pytest.fixture
def parameters() -> Matrices:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (2, 2))]
    norm = sum(each.square().sum() for each in found) ** 0.5
    return [(0.08 * each / norm).requires_grad_() for each in found]


def bowl(of: Matrices) -> Any:
    """Half the squared distance from zero: its gradient is the place itself."""
    return lambda part: sum(each.square().sum() for each in of) / 2


def test_the_gradient_leads_to_the_ground(parameters: Matrices) -> None:
    gradient = _gradient(backpropagate, bowl(parameters), [None], parameters)  # type: ignore[list-item]
    assert all(torch.equal(mine, place) for mine, place in zip(gradient, parameters, strict=True))
    assert _fall(bowl(parameters), [None], parameters, gradient) == pytest.approx(0.08**2 / 2)  # type: ignore[list-item]
    assert all(parameter.grad is None for parameter in parameters)


def test_many_queries_find_the_gradient_and_few_a_share_of_it(parameters: Matrices) -> None:
    """The squared cosine of q queries in d dimensions is about q / d."""
    gradient = _gradient(backpropagate, bowl(parameters), [None], parameters)  # type: ignore[list-item]
    before = [parameter.detach().clone() for parameter in parameters]

    def squared_cosine(queries: int, drawn: Matrices, seed: int = 0) -> float:
        estimate = ZerothOrder(drawn, seed=1000 * seed, queries=queries)
        step = _gradient(estimate, bowl(parameters), [None], parameters)  # type: ignore[list-item]
        return _dot(step, gradient) ** 2 / (_dot(step, step) * _dot(gradient, gradient))

    assert squared_cosine(3000, parameters) > 0.95
    few = [squared_cosine(1, parameters, seed) for seed in range(300)]
    assert sum(few) / 300 == pytest.approx(1 / 10, rel=0.25)
    inside = before[0].square().sum() / 0.08**2  # what of the gradient the first matrix holds
    assert squared_cosine(3000, parameters[:1]) == pytest.approx(inside.item(), rel=0.05)
    assert all(torch.allclose(now, then) for now, then in zip(parameters, before, strict=True))


def test_ways_differ_in_when_and_on_what_they_go_back() -> None:
    assert [edge(t, s) for t, s in ((0.9, 0.0), (0.9, 0.2), (0.1, 0.8), (0.1, 1.0))] == [1, 0, 1, 0]
    assert WAYS["selective, γ = 1, half size"].probability(0.5, 1.0) == falling(1.0)(0.5, 1.0)
    assert len({(w.strategy, w.low, w.probability, w.cut, str(w.zo)) for w in WAYS.values()}) == len(WAYS)
