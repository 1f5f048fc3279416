"""A judge that nobody trained: what the drawn world itself knows of a subject.

The subject, cut out of its ground in several sizes, is laid over a picture wherever it fits best. Under its mask there,
colours are compared by their histograms, and shapes by structural similarity (SSIM, Wang et al. 2004).
"""

from collections.abc import Sequence
from functools import cache
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hollow_core.demo import world

SIDES = tuple(world.SIZE * (0.60 + 0.025 * step) for step in range(5))
"""Of the square that a subject is drawn into: as the world draws it, in pixels."""
BINS = 4  # of each colour, each way
WINDOW = 7  # of SSIM, pixels
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for values in 0…1


class Likeness(NamedTuple):
    """From 0 (or less) to 1."""

    colour: float
    """The intersection of the histograms of colours under the mask."""
    shape: float
    """The mean SSIM under the mask."""


def likeness(drawn: Sequence[Image.Image], subject: world.Subject) -> Likeness:
    """Of square pictures of full size to the subject, the mean over them."""
    found = [_likeness(picture, subject) for picture in (world.to_tensor(list(drawn)) + 1) / 2]
    return Likeness(mean(one.colour for one in found), mean(one.shape for one in found))


def _likeness(picture: Tensor, subject: world.Subject) -> Likeness:
    """Of one (3, height, width) in 0…1, where the subject fits best: where the mean square distance under its mask is
    least."""
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for truth, mask in _cutouts(subject):
        reach = truth.shape[-1] // 4  # a flag may be cut off at the edge, and its margin is empty
        padded, inside = (F.pad(each[None], [reach] * 4) for each in (picture, torch.ones_like(picture[:1])))
        seen = F.conv2d(inside, mask[None])
        distance = (
            F.conv2d(padded.square(), mask.expand(3, -1, -1)[None])
            - 2 * F.conv2d(padded, (truth * mask)[None])
            + F.conv2d(inside, (truth.square().sum(0, keepdim=True) * mask)[None])
        ) / seen.clamp(min=1)
        distance[seen < 0.9 * mask.sum()] = torch.inf
        least = int(distance.argmin())
        top, left = divmod(least, distance.shape[-1])
        place = (..., slice(top, top + truth.shape[-2]), slice(left, left + truth.shape[-1]))
        if best is None or distance.flatten()[least] < best[0]:
            best = distance.flatten()[least].item(), padded[0][place], truth, mask * inside[0][place]
    assert best is not None
    _, there, truth, mask = best
    under = mask[0] > 0
    ours, theirs = (_histogram(each[:, under]) for each in (there, truth))
    similar = _ssim(there, torch.where(mask > 0, truth, there))
    return Likeness(torch.minimum(ours, theirs).sum().item(), similar[:, under].mean().item())


@cache
def _cutouts(subject: world.Subject) -> list[tuple[Tensor, Tensor]]:
    """Picture (3, side, side) in 0…1 and mask (1, side, side) in each size."""
    found = []
    for side in SIDES:
        picture, mask = world.cutout(subject, side)
        covered = world.to_tensor([mask])[0, :1].add(1).div(2)
        found.append(((world.to_tensor([picture])[0] + 1) / 2, covered))
    return found


def _histogram(colours: Tensor) -> Tensor:
    """Of (3, pixels): shares of the cells of a cube."""
    cells = (colours * BINS).long().clamp(max=BINS - 1)
    return torch.bincount((cells[0] * BINS + cells[1]) * BINS + cells[2], minlength=BINS**3) / colours.shape[1]


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """The map (3, height, width) of structural similarity."""

    def blurred(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[None], WINDOW, 1, WINDOW // 2, count_include_pad=False)[0]

    means = blurred(one), blurred(other)
    variances = blurred(one.square()) - means[0].square(), blurred(other.square()) - means[1].square()
    covariance = blurred(one * other) - means[0] * means[1]
    alike = (2 * means[0] * means[1] + C1) * (2 * covariance + C2)
    return alike / ((means[0].square() + means[1].square() + C1) * (sum(variances) + C2))
