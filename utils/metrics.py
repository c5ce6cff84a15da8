"""Accuracy and negative log-likelihood, and the mean of softmax of an ensemble, all from log-probabilities."""

import math

import torch
from torch import Tensor


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """Log of the members' mean probability: logsumexp over members minus log M, [M, N, C] -> [N, C]."""
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest entry is at the label; log_probs [N, C], labels [N], 0 to 1."""
    return (log_probs.argmax(dim=1) == labels).double().mean().item()


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over samples of -log p(label), in nats; log_probs [N, C], labels [N]."""
    return -log_probs.double().gather(1, labels[:, None]).mean().item()
