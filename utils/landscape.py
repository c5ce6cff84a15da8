"""The loss around saved members and between them, for a picture of the landscape."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from utils.hessian import top_eigenpairs
from utils.training import evaluating

Batches = list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy in eval mode, in nats."""
    with evaluating(model):
        sums = [F.cross_entropy(model(images).double(), labels, reduction="sum") for images, labels in batches]
    return (sum(sums) / sum(len(labels) for _, labels in batches)).item()


def random_direction(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A filter-normalised Gaussian direction, a tensor for each parameter.

    Each filter (row of the first dimension) gets the norm of the model's own; biases and BatchNorm parameters stay.

    Source: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4.
    """
    direction = []
    for parameter in model.parameters():
        weight = parameter.detach()
        if weight.ndim < 2:
            direction.append(torch.zeros_like(weight))
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        norms = [tensor.flatten(1).norm(dim=1) for tensor in (weight, drawn)]
        scale = norms[0] / norms[1].clamp(min=1e-12)
        direction.append(drawn * scale.view(-1, *[1] * (weight.ndim - 1)))
    return direction


def top_direction(model: nn.Module, batches: Batches) -> tuple[list[Tensor], float, float]:
    """The top eigenvector of the Hessian of `mean_loss` over `batches`, as long as a random direction.

    H v = lambda v with the largest lambda and ||v||_2 = 1, in all parameters together. The direction is r v, where r is
    the norm of all parameters of two dimensions or more: the length of each `random_direction`, so that a step means
    the same for both. Along it, the second derivative of `mean_loss` by the step, at 0, is lambda r^2. The sign of v
    means nothing.

    Args:
        model: all its parameters trainable; measured in eval mode, BatchNorm's statistics stay.
        batches: (images, labels), those that the loss is drawn of.

    Returns:
        the direction, a tensor for each parameter; lambda [nats / weight^2]; r [weight].

    Raises:
        ValueError: if there are no images or fewer than two parameters.
    """
    with evaluating(model):
        values, vectors, _ = top_eigenpairs(model, batches)
    weights = list(model.parameters())
    length = sum(w.detach().double().square().sum() for w in weights if w.ndim > 1).sqrt().item()
    parts = (length * vectors[:, 0]).split([w.numel() for w in weights])
    return [part.view(w.shape).to(w) for part, w in zip(parts, weights, strict=True)], values[0].item(), length


def losses_along(model: nn.Module, direction: list[Tensor], steps: Sequence[float], batches: Batches) -> list[float]:
    """The loss at weights + step * direction for each step; BatchNorm's statistics and the model itself stay."""
    moved, found = copy.deepcopy(model), []
    for step in steps:
        with torch.no_grad():
            for parameter, start, way in zip(moved.parameters(), model.parameters(), direction, strict=True):
                parameter.copy_(start + step * way)
        found.append(mean_loss(moved, batches))
    return found


def losses_between(
    first: nn.Module, second: nn.Module, steps: Sequence[float], batches: Batches, training: Batches
) -> list[float]:
    """The loss at (1 - step) * first + step * second for each step from 0 to 1.

    BatchNorm's statistics belong to no point between: at each one, the ends included, they are taken anew from
    `training` (batches of training images), without which the loss would mostly show that they are wrong.
    """
    direction = [b.detach() - a.detach() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    moved, found = copy.deepcopy(first), []
    for step in steps:
        with torch.no_grad():
            for parameter, start, way in zip(moved.parameters(), first.parameters(), direction, strict=True):
                parameter.copy_(start + step * way)
        update_bn(training, moved)
        found.append(mean_loss(moved, batches))
    return found
