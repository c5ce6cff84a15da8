"""How much the members of an ensemble differ."""

import torch
from torch import Tensor


def disagreement(predictions: Tensor) -> Tensor:
    """Share of samples on which each pair of members predicts different classes.

    d_ij = 1 - (1/N) sum_x 1[prediction_i(x) = prediction_j(x)]; the diagonal is 0.

    Args:
        predictions: predicted classes, whole numbers [M, N].

    Returns:
        float64 [M, M].

    Example: [[0, 1], [0, 2]] gives 0.5 off the diagonal.
    """
    differ = predictions[:, None] != predictions[None]
    return differ.to(torch.float64).mean(dim=2)
