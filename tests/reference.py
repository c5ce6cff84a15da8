"""Slow and obvious versions of what the repository computes fast. The tests compare the two."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap


def smoothed_loss(logits, labels, smoothing):
    """Mean over samples of the cross-entropy with targets (1 - s) onehot + s / C."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        log_probs = row - torch.logsumexp(row, 0)
        losses.append(-(1 - smoothing) * log_probs[label] - smoothing * log_probs.mean())
    return torch.stack(losses).mean()


def summed_gradient(model, images, labels, sam_mask, rho, adaptive=False, smoothing=0.0, clip_norm=None):
    """The gradient that the base optimizer gets, and the loss, by autograd.grad and loops over tensors."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    loss_sum = 0.0
    normal, sam = ~sam_mask, sam_mask

    def loss_of(part):
        return smoothed_loss(model(images[part]), labels[part], smoothing)

    if normal.any():
        loss = loss_of(normal)
        share = normal.sum().item() / len(images)
        for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            t += share * g
        loss_sum += share * loss.item()
    if sam.any():
        random = torch.get_rng_state()
        loss = loss_of(sam)
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
        torch.set_rng_state(random)  # dropout draws the same in both passes
        loss = loss_of(sam)
        for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            t += share * g
        for p, w in zip(parameters, weights, strict=True):
            p.data.copy_(w)
    norm = math.sqrt(sum((t**2).sum().item() for t in total))
    if clip_norm is not None and norm > clip_norm:
        total = [t * clip_norm / (norm + 1e-6) for t in total]
    return total, loss_sum


def sharpbalance_step(
    model, momentum_buffers, images, labels, sam_mask, rho, lr, momentum, weight_decay, adaptive=False
):
    """One step of SGD on the lists of parameters and momentum buffers."""
    parameters = list(model.parameters())
    total, loss_sum = summed_gradient(model, images, labels, sam_mask, rho, adaptive)
    for i, (p, t) in enumerate(zip(parameters, total, strict=True)):
        step = t + weight_decay * p.data
        if momentum_buffers[i] is None:
            momentum_buffers[i] = step.clone()
        else:
            momentum_buffers[i] = momentum * momentum_buffers[i] + step
        p.data -= lr * momentum_buffers[i]
    return loss_sum


def adamw_step(parameters, gradients, moments, step, lr, weight_decay):
    """Loshchilov and Hutter, ICLR 2019: step t = 1, 2, ... on the lists of parameters and of pairs of moments."""
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        first, second = moments[i] or (torch.zeros_like(g), torch.zeros_like(g))
        moments[i] = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        corrected = moments[i][0] / (1 - 0.9**step), moments[i][1] / (1 - 0.999**step)
        p.data -= lr * (weight_decay * p.data + corrected[0] / (corrected[1].sqrt() + 1e-8))


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


def accuracy(probs, labels):
    """Share of right predictions."""
    return sum(int(p.argmax()) == int(y) for p, y in zip(probs, labels, strict=True)) / len(labels)


def nll(probs, labels):
    """Mean negative logarithm of the label's probability."""
    return sum(-math.log(p[y]) for p, y in zip(probs.tolist(), labels.tolist(), strict=True)) / len(labels)


def brier(probs, labels):
    """Mean squared distance from the one-hot label."""
    total = 0.0
    for p, y in zip(probs.tolist(), labels.tolist(), strict=True):
        total += sum((value - (c == y)) ** 2 for c, value in enumerate(p))
    return total / len(labels)


def ece(probs, labels, bins):
    """Expected calibration error, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = []
        for p, y in zip(probs.tolist(), labels.tolist(), strict=True):
            confidence = max(p)
            if b / bins <= confidence < (b + 1) / bins or (b == bins - 1 and confidence == 1):
                inside.append((p.index(confidence) == y, confidence))
        if inside:
            gap = np.mean([right for right, _ in inside]) - np.mean([confidence for _, confidence in inside])
            total += len(inside) / len(labels) * abs(gap)
    return total


def out_of_distribution(scores_in, scores_out, weights_in=None, weights_out=None):
    """Pair by pair, and threshold by threshold; weights are shares of the images of a kind, times their number."""
    weights = []
    for scores, given in ((scores_in, weights_in), (scores_out, weights_out)):
        given = given or [1] * len(scores)
        weights.append([weight * len(scores) / sum(given) for weight in given])
    low, high = (list(zip(*both, strict=True)) for both in zip((scores_in, scores_out), weights, strict=True))
    auroc = sum(v * w * ((a < b) + (a == b) / 2) for a, v in low for b, w in high) / (len(low) * len(high))
    aupr, before, fpr95 = 0.0, 0.0, 1.0
    for threshold in sorted({*scores_in, *scores_out}, reverse=True):
        false, true = (sum(weight for score, weight in scores if score >= threshold) for scores in (low, high))
        recall = true / len(high)
        aupr += (recall - before) * true / (true + false) if true else 0
        if recall >= 0.95:
            fpr95 = min(fpr95, false / len(low))
        before = recall
    return {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}


def risks_over_all_orders(confidence, correct):
    """The risk at each coverage, mean over all orders of samples whose confidence falls."""
    orders = [
        order
        for order in itertools.permutations(range(len(confidence)))
        if all(confidence[i] >= confidence[j] for i, j in itertools.pairwise(order))
    ]
    risks = [[np.mean([1 - correct[i] for i in order[: n + 1]]) for n in range(len(order))] for order in orders]
    return np.mean(risks, axis=0)


def aurc(confidence, correct, weights):
    """AURC of samples with weights, none of equal confidence."""
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    total = reached = wrong = 0.0
    for i in order:
        reached, wrong = reached + weights[i], wrong + weights[i] * (1 - correct[i])
        total += weights[i] * wrong / reached
    return total / sum(weights)


def cka_by_gram(x, y, debiased):
    """Linear CKA from the two Gram matrices."""
    n = len(x)

    def hsic(K, L):
        if not debiased:
            H = np.eye(n) - 1 / n
            return np.sum((H @ K @ H) * (H @ L @ H))
        K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
        one = np.ones(n)
        first = np.trace(K @ L)
        second = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return first + second - 2 / (n - 2) * (one @ K @ L @ one)

    K, L = x @ x.T, y @ y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def phi_by_moments(i, j, eta, rho, ratio):
    """The function phi as an exact rational number: the trinomial series over the Marchenko-Pastur law's moments."""
    from fractions import Fraction

    def moment(q):
        if q == 0:
            return Fraction(1)
        narayana = (Fraction(math.comb(q, m) * math.comb(q, m - 1), q) * ratio**m for m in range(1, q + 1))
        return sum(narayana)

    total = Fraction(0)
    for b in range(i + 1):
        for c in range(i + 1 - b):
            count = math.factorial(i) // (math.factorial(b) * math.factorial(c) * math.factorial(i - b - c))
            total += count * (-eta) ** (b + c) * rho**c * moment(b + 2 * c + j)
    return total


def phi_by_integral(mpmath, i, j, eta, rho, ratio):
    """The function phi by adaptive quadrature in high precision, and the largest value that the integrand takes."""
    eta, rho, ratio = (mpmath.mpf(repr(v)) for v in (eta, rho, ratio))
    low, high = abs(mpmath.sqrt(ratio) - 1), mpmath.sqrt(ratio) + 1

    def value(x):
        return (1 - eta * x - eta * rho * x**2) ** i * x**j

    # In x = sqrt(l) the density is sqrt((b - x^2)(x^2 - a)) / (pi x), and bounded at ratio 1.
    def integrand(x):
        if x == 0:
            return value(mpmath.mpf(0)) * mpmath.sqrt(high**2) / mpmath.pi
        return value(x**2) * mpmath.sqrt(abs((high**2 - x**2) * (x**2 - low**2))) / (mpmath.pi * x)

    points = [low + (high - low) * step / 24 for step in range(25)]
    total = mpmath.quad(integrand, points)
    if j == 0 and ratio < 1:
        total += 1 - ratio
    largest = max(abs(value(x**2)) for x in points)
    return float(total), float(max(largest, 1e-300))


def _sharpness_of(data, error, rho0):
    """Maximum of f(w + e) - f(w) over the ball, by the secular equation solved with bisection on explicit matrices."""
    X = data.T @ data
    g = X @ error
    values, vectors = np.linalg.eigh(X)
    coefficients = vectors.T @ g
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho0 + 1e-12
    for _ in range(300):
        middle = (low + high) / 2
        length = np.linalg.norm(coefficients / (middle - values))
        low, high = (middle, high) if length > rho0 else (low, middle)
    e = vectors @ (coefficients / (high - values))
    e *= rho0 / np.linalg.norm(e)
    return g @ e + e @ X @ e / 2


def _sam_steps(data, error, eta, rho, k):
    """Take k steps of un-normalised SAM on ||A e||^2 / 2, one at a time."""
    for _ in range(k):
        gradient = data.T @ (data @ error)
        error = error - eta * data.T @ (data @ (error + rho * gradient))
    return error


def simulate_sam_step_by_step(data, teacher, starts, eta, rho, k, rho0):
    """Variance and sharpness of SAM members, by steps with explicit matrices."""
    ends = np.array([_sam_steps(data, start - teacher, eta, rho, k) for start in starts])
    mean = _sam_steps(data, -teacher, eta, rho, k)
    return {
        "variance": sum(np.var(column, ddof=1) for column in ends.T) / len(teacher),
        "sharpness": _sharpness_of(data, mean, rho0),
        "member_sharpness": np.mean([_sharpness_of(data, end, rho0) for end in ends]),
    }


def simulate_blocks_step_by_step(parts, teacher, starts, eta, rho, k, rho0):
    """The same where each member sees one block of the rows."""
    data, d = np.concatenate(parts), len(teacher)
    means = [_sam_steps(part, -teacher, eta, rho, k) for part in parts]
    ends = [
        [_sam_steps(part, start - teacher, eta, rho, k) for start in block]
        for part, block in zip(parts, starts, strict=True)
    ]
    within = np.mean([sum(np.var(column, ddof=1) for column in np.array(block).T) / d for block in ends])
    centre = sum(means) / len(means)
    between = np.mean([np.sum((mean - centre) ** 2) / d for mean in means])
    return {
        "variance": within + between,
        "sharpness": _sharpness_of(data, centre, rho0),
        "member_sharpness": np.mean([_sharpness_of(data, end, rho0) for block in ends for end in block]),
    }


def apgd_as_released(model, images, labels, rho, norm, stale=True, n_iters=20):
    """The authors' adaptive APGD on one batch, with bisection in the projection and stale steps after a cut, or not."""
    parameters = list(model.parameters())
    start = torch.cat([p.detach().flatten() for p in parameters])
    size = start.abs()

    def place(delta):
        with torch.no_grad():
            for p, piece in zip(parameters, (start + delta).split([p.numel() for p in parameters]), strict=True):
                p.copy_(piece.view(p.shape))

    def loss_and_gradient():
        loss = F.cross_entropy(model(images), labels)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    def project(z):
        if (z / size).norm() <= rho:
            return z
        low, high = 0.0, 1.0
        while (z * size / (size**2 + high)).norm() > rho:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (z * size / (size**2 + middle)).norm() > rho else (low, middle)
        return z * size**2 / (size**2 + high)

    first, gradient = loss_and_gradient()
    best, last, last_best = first, first, first
    best_gradient, best_delta = gradient, torch.zeros_like(start)
    delta, before = torch.zeros_like(start), torch.zeros_like(start)
    step, last_step, rises, checked = 2 * rho, 2 * rho, 0, 0
    for i in range(1, n_iters + 1):
        if norm == "l2":
            z = project(delta + step * size * gradient / gradient.norm())
        else:
            z = torch.minimum(torch.maximum(delta + step * size * gradient.sign(), -rho * size), rho * size)
        delta, before = 0.75 * z + 0.25 * before, delta
        place(delta)
        loss, gradient = loss_and_gradient()
        rises += loss > last
        last = loss
        if loss > best:
            best, best_gradient, best_delta = loss, gradient, delta
        if i in (5, 9, 12, 15, 16, 18, 19, 20):
            rare, stuck = rises < 0.75 * (i - checked), step == last_step and best == last_best
            last_step, last_best, rises, checked = step, best, 0, i
            if rare or stuck:
                step, gradient = step / 2, best_gradient
                if not stale:
                    delta = before = best_delta
    place(torch.zeros_like(start))
    return best - first


def scaled(image, size):
    """A square image [S, S, C] scaled to [size, size, C] in float64: each pixel a mean with weights like a triangle.

    The triangle is as wide, to either side, as a pixel of the larger of the two images.
    """

    def matrix(old, new):
        rows = []
        for i in range(new):
            middle, reach = (i + 0.5) * old / new, max(old / new, 1)
            weights = [max(0.0, 1 - abs(j + 0.5 - middle) / reach) for j in range(old)]
            rows.append([weight / sum(weights) for weight in weights])
        return np.array(rows)

    height, width = image.shape[:2]
    return np.einsum("ij,kl,jlc->ikc", matrix(height, size), matrix(width, size), image.astype(np.float64))
