"""Slow and obvious versions of what the repository computes fast. The tests compare the two."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap


def sharpbalance_step(
    model, momentum_buffers, images, labels, sam_mask, rho, lr, momentum, weight_decay, adaptive=False
):
    """One step on the lists of parameters and momentum buffers, by autograd.grad and loops over tensors."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    loss_sum = 0.0
    normal, sam = ~sam_mask, sam_mask
    if normal.any():
        loss = F.cross_entropy(model(images[normal]), labels[normal])
        share = normal.sum().item() / len(images)
        for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            t += share * g
        loss_sum += share * loss.item()
    if sam.any():
        loss = F.cross_entropy(model(images[sam]), labels[sam])
        share = sam.sum().item() / len(images)
        loss_sum += share * loss.item()
        gradients = torch.autograd.grad(loss, parameters)
        weights = [p.detach().clone() for p in parameters]
        squares = 0.0
        for w, g in zip(weights, gradients, strict=True):
            squares += ((w.abs() * g if adaptive else g) ** 2).sum().item()
        for p, w, g in zip(parameters, weights, gradients, strict=True):
            direction = w**2 * g if adaptive else g
            p.data += rho * direction / (math.sqrt(squares) + 1e-12)
        loss = F.cross_entropy(model(images[sam]), labels[sam])
        for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            t += share * g
        for p, w in zip(parameters, weights, strict=True):
            p.data.copy_(w)
    for i, (p, t) in enumerate(zip(parameters, total, strict=True)):
        step = t + weight_decay * p.data
        if momentum_buffers[i] is None:
            momentum_buffers[i] = step.clone()
        else:
            momentum_buffers[i] = momentum * momentum_buffers[i] + step
        p.data -= lr * momentum_buffers[i]
    return loss_sum


def fisher_by_samples(model, images, labels):
    """Squared gradient norms by one backward pass for each sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        norms.append(sum((g**2).sum() for g in torch.autograd.grad(loss, parameters)))
    return torch.stack(norms).detach()


def fisher_by_vmap(model, images, labels):
    """Squared gradient norms by vmap over one-sample gradients."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=16)(parameters, images, labels)
    return sum(g.flatten(1).square().sum(1) for g in gradients.values())


def sharpness_aware_sets(scores, flat_ratio, select, unselected):
    """The SAM sets by set algebra on sorted lists: a list of sets, one for each member."""
    members, samples = scores.shape
    count = int(flat_ratio * samples)
    picks = []
    for row in scores:
        order = sorted(range(samples), key=lambda i, row=row: (row[i], i))
        picks.append(set(order[:count]) if select == "flattest" else set(order[samples - count :]))
    rest = sorted(set(range(samples)) - set().union(*picks))
    sets = []
    for i in range(members):
        others = set().union(*(picks[j] for j in range(members) if j != i))
        own = set(rest[i::members])
        sets.append(others | {"normal": set(), "one": own, "others": set(rest) - own}[unselected])
    return sets


def crop(image, row, column, mirror, padding):
    """One uint8 image [H, W, C], zero-padded, cropped at (row, column) and perhaps mirrored."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 2 * padding, width + 2 * padding, image.shape[2]), dtype=image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    piece = padded[row : row + height, column : column + width]
    return piece[:, ::-1] if mirror else piece


def randomize_batch_norm(model):
    """Give BatchNorm layers statistics, scales and shifts that are not those of the start."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
    return model
