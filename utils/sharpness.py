"""Worst-case and average-case sharpness of a network: how much the loss rises when the weights move.

    kappa(w, rho) = max L(w + delta) - L(w)  over  ||T^-1 delta||_p <= rho,    T = diag(|w|) if adaptive, else I

taken for each batch alone and averaged over batches (m-sharpness with m the batch size), in eval mode. In the
coordinates u = T^-1 delta the ball is the unit ball times rho, the gradient is T g, and a weight that is exactly 0
stays there. Where the loss overflows within the ball it counts as inf, also where the logits do, which makes it nan.

Source: Kwon et al., "ASAM", ICML 2021; Andriushchenko et al., "A modern look at the relationship between sharpness and
generalization", ICML 2023, whose protocol the authors use.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.hessian import Batches, full_float32, matching_parameters, refuse_train_mode

NORMS = ("l2", "linf")
MAXIMISERS = ("tight", "apgd")
AVERAGED_STEPS = 6
SMALLEST = 1e-37  # avoids 0 / 0
MAX_RADIUS = 1e30  # so that steps of twice the radius are far from float32's largest number, 3.4e38


@full_float32()
def worst_case_sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float,
    norm: str = "l2",
    adaptive: bool = True,
    n_iters: int = 20,
    maximiser: str = "tight",
    params: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float | list[float]]:
    """The largest rise of the mean cross-entropy that a maximiser finds within the ball, averaged over batches.

    All batches weigh the same, as in the authors' protocol: where the images do not fill the last batch, it counts like
    a whole one, though the ball's maximum over fewer images is mostly larger. Give batches of one size for m-sharpness.

    Each maximiser makes one forward-backward pass at w and one an iteration; the largest loss of them all counts.

    tight: works in u, along the steepest direction of the ball: s = rho T g / ||T g||_2 (l2) or rho sign(T g) (linf).
    The first point is s at w, one step of (A)SAM, so that the result is never below it, and more iterations never lower
    it. l2: conditional gradient from the best point so far u*, to (1 - gamma) u* + gamma s, put back on the sphere;
    gamma starts at 1/2 and is cut to 0.7 of itself where the loss does not rise, so that on a convex loss every step
    rises. linf: six steps from 0 to 0.75 s + 0.25 of the last point but one, then, from the best point so far, steps
    with a size for each weight, 2 rho at first and cut to 0.7 of itself where the sign of the gradient changes.

    apgd: the authors' schedule and direction: delta + step |w| g / ||g||_2 (l2) or delta + step |w| sign(g) (linf), the
    Euclidean projection into the ball, then 0.75 of that point and 0.25 of the last but one; step starts at 2 rho and
    is halved at the checkpoints of APGD if progress was rare. Three defects of theirs are mended: a weight of exactly 0
    does not switch the projection off, the projection always ends, and after a cut the iteration starts from the best
    point. In l2 its direction is not the steepest one of an adaptive ball, so it falls short of `tight`.

    Args:
        model: in eval mode throughout. Weights, mode and `.grad` are as before afterwards.
        batches: (images, labels).
        rho: radius, above 0.
        norm: l2 | linf.
        adaptive: whether the ball is relative to the weights.
        n_iters: iterations, 1 or more.
        maximiser: tight | apgd.
        params: a regular expression that is searched in the parameters' names; None for all trainable ones.
        progress: called after each batch.

    Returns:
        loss: mean rise of the loss, inf where it overflows, nan where the search itself does; error: mean rise of the
        error rate (0 to 1) at the point of the largest loss, nan where logits overflow; loss_by_batch, error_by_batch.

    Raises:
        ValueError: naming the argument, for a model in train mode, or if the loss is not finite at w itself.
    """
    _check(model, rho, norm)
    if n_iters < 1:
        raise ValueError(f"n_iters: expected 1 or more, got {n_iters}")
    if maximiser not in MAXIMISERS:
        raise ValueError(f"maximiser: expected one of {', '.join(MAXIMISERS)}, got '{maximiser}'")
    search = {"l2": _tight_l2, "linf": _tight_linf}[norm] if maximiser == "tight" else partial(_apgd, norm=norm)
    rises = []
    with _movable(model, params, adaptive) as weights, torch.no_grad():
        for images, labels in batches:
            weights.begin(images, labels)
            search(weights, rho, n_iters)
            best = (math.nan, math.nan) if weights.lost and weights.best[0] < math.inf else weights.best
            rises.append([most - first for most, first in zip(best, weights.first, strict=True)])
            progress()
    return _means(rises)


class _Weights:
    """The parameters that move, where they started, the axes T of the ball, and the best point of a batch."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], adaptive: bool):
        self.model, self.parameters = model, parameters
        self.start = [p.detach().clone() for p in parameters]
        self.scales = [w.abs() if adaptive else torch.ones_like(w) for w in self.start]
        self.grads: list[Tensor] = []

    def reset(self) -> None:
        """Back to the start, to the last bit."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(start)

    def begin(self, images: Tensor, labels: Tensor) -> None:
        """Back to the start with a new batch, on which the start is the best point so far."""
        self.reset()
        self.images, self.labels, self.best = images, labels, (math.inf, 0.0)
        self.lost = False  # whether a step of the search overflowed, so that it led to no point of the ball
        self.gradients()
        _refuse_infinite([self.loss])
        self.first = self.best = self.loss, self.error

    def gradients(self) -> bool:
        """Compute `loss`, `error` and `grads` of the batch here; True if the loss is the largest so far, now `best`."""
        with torch.enable_grad():
            logits = self.model(self.images)
            loss = F.cross_entropy(logits, self.labels)
            self.grads = list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        self.loss, self.error = _read([_loss_and_wrong(logits, self.labels, loss)], [len(self.labels)])[0]
        improved = self.loss > self.best[0]
        if improved and self.loss == math.inf and any(bool(parameter.isnan().any()) for parameter in self.parameters):
            improved, self.lost = False, True
        if improved:
            self.best = self.loss, self.error
        return improved

    def move(self, point: list[Tensor], factor: float = 1.0) -> None:
        """To start + factor T point."""
        for parameter, start, scale, u in zip(self.parameters, self.start, self.scales, point, strict=True):
            torch.addcmul(start, scale, u, value=factor, out=parameter.data)

    def shift(self, delta: list[Tensor], factor: float = 1.0) -> None:
        """To start + factor delta."""
        for parameter, start, d in zip(self.parameters, self.start, delta, strict=True):
            torch.add(start, d, alpha=factor, out=parameter.data)

    def zeros(self) -> list[Tensor]:
        """A point of zeros."""
        return [torch.zeros_like(s) for s in self.scales]


@contextmanager
def _movable(model: nn.Module, params: str | None, adaptive: bool) -> Iterator[_Weights]:
    """Only the chosen parameters ask for gradients; afterwards every weight and flag is as before."""
    chosen = matching_parameters(model, params)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    weights = _Weights(model, chosen, adaptive)
    try:
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield weights
    finally:
        weights.reset()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _loss_and_wrong(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """The loss of a batch and how many of its images are wrong, [2], on the device."""
    return torch.stack([loss.detach(), (logits.argmax(dim=1) != labels).sum().to(loss.dtype)])


def _read(found: list[Tensor], sizes: list[int]) -> list[tuple[float, float]]:
    """Loss and error rate by batch, from `_loss_and_wrong` and the sizes of the batches: one read of the device."""
    rows = zip(torch.stack(found).cpu().tolist(), sizes, strict=True)
    return [(math.inf, math.nan) if math.isnan(loss) else (loss, wrong / size) for (loss, wrong), size in rows]


def _refuse_infinite(losses: Iterable[float]) -> None:
    """A rise from a loss that is infinite already says nothing."""
    if not all(map(math.isfinite, losses)):
        raise ValueError("model: its loss is not finite at the weights themselves")


def _tight_l2(weights: _Weights, rho: float, n_iters: int) -> None:
    point, trial = weights.zeros(), [torch.empty_like(s) for s in weights.scales]
    direction, gamma = _steepest(weights), 1.0  # u* / rho is `point`, s / rho `direction`; the first trial is s itself
    for i in range(n_iters):
        length = 0.0
        for u, s, out in zip(point, direction, trial, strict=True):
            length = length + torch.lerp(u, s, gamma, out=out).square().sum()
        factor = rho / length.sqrt().item() if length > 0 else rho
        weights.move(trial, factor)
        if weights.gradients() or i == 0:
            point, trial = trial, point
            torch._foreach_mul_(point, factor / rho)
            direction = _steepest(weights)
        else:
            gamma *= 0.7
        gamma = min(gamma, 0.5)


def _steepest(weights: _Weights) -> list[Tensor]:
    """T g / ||T g||_2, in the place of the gradients."""
    length = 0.0
    for g, scale in zip(weights.grads, weights.scales, strict=True):
        length = length + g.mul_(scale).square().sum()
    if length == math.inf:
        _scale_down(weights.grads)
        length = sum(g.square().sum() for g in weights.grads)
    if length > 0:
        torch._foreach_mul_(weights.grads, 1 / length.sqrt().item())
    return weights.grads


def _scale_down(grads: list[Tensor]) -> None:
    """Divide gradients, in place, by their largest entry: their squares overflow long before they do themselves."""
    torch._foreach_mul_(grads, 1 / max(g.abs().max().item() for g in grads))


def _tight_linf(weights: _Weights, rho: float, n_iters: int) -> None:
    signs = [g.sign_() for g in weights.grads]
    best_point, best_signs = weights.zeros(), signs  # points are u / rho

    def visit(point: list[Tensor]) -> list[Tensor]:
        nonlocal best_point, best_signs
        weights.move(point, rho)
        improved = weights.gradients()
        signs = [g.sign_() for g in weights.grads]
        if improved:
            best_point, best_signs = [u.clone() for u in point], signs
        return signs

    visit(signs)
    # The averages damp the coordinates whose gradient changes its sign from step to step.
    before = point = weights.zeros()
    for _ in range(min(AVERAGED_STEPS, n_iters - 1)):
        before, point = point, list(torch._foreach_lerp(before, signs, 0.75))
        signs = visit(point)
    point, signs = [u.clone() for u in best_point], best_signs
    steps = [torch.full_like(s, 2.0) for s in weights.scales]
    for _ in range(n_iters - 1 - AVERAGED_STEPS):
        for u, step, sign in zip(point, steps, signs, strict=True):
            u.addcmul_(step, sign).clamp_(-1, 1)
        last, signs = signs, visit(point)
        for step, a, b in zip(steps, last, signs, strict=True):
            step.mul_(torch.mul(a, b).mul_(0.15).add_(0.85))  # 1 where the signs agree, 0.7 where they do not


def _apgd(weights: _Weights, rho: float, n_iters: int, norm: str) -> None:
    checkpoints = _apgd_checkpoints(n_iters)
    # For linf a point is stored as u, where the projection is a clamp; for l2 as delta.
    place = weights.shift if norm == "l2" else weights.move
    point, before = weights.zeros(), weights.zeros()
    best_point, best_grads, last = point, weights.grads, weights.loss
    step, last_step, last_best = 2 * rho, 2 * rho, weights.loss
    rises, multiplier, last_checkpoint = 0, 0.0, 0
    spare = None  # memory that was used before comes without the cost of new pages
    for i in range(1, n_iters + 1):
        z = [torch.empty_like(s) for s in weights.scales] if spare is None else spare
        if norm == "l2":
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(weights.grads))).item()
            if length == math.inf:
                _scale_down(weights.grads)
                length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(weights.grads))).item()
            for out, u, scale, g in zip(z, point, weights.scales, weights.grads, strict=True):
                torch.addcmul(u, scale, g, value=step / max(length, 1e-30), out=out)
            multiplier = _project(z, weights.scales, rho, multiplier)
        else:
            for out, u, g in zip(z, point, weights.grads, strict=True):
                torch.sign(g, out=out).mul_(step).add_(u).clamp_(-rho, rho)
        for out, u in zip(z, before, strict=True):
            torch.lerp(u, out, 0.75, out=out)
        spare = before if before is not best_point and before is not point else None
        point, before = z, point
        place(point)
        if weights.gradients():
            best_point, best_grads = point, weights.grads
        rises += weights.loss > last
        last = weights.loss
        if i in checkpoints:
            rare = rises < 0.75 * (i - last_checkpoint)
            stuck = step == last_step and weights.best[0] == last_best
            last_step, last_best, last_checkpoint, rises = step, weights.best[0], i, 0
            if rare or stuck:
                step /= 2
                point = before = best_point
                weights.grads = best_grads


def _apgd_checkpoints(n_iters: int) -> set[int]:
    """After which iterations the step may be halved (Croce and Hein, ICML 2020): 5, 9, 12, 15, 16, 18, 19, 20 of 20."""
    shares, found = [0.0, 0.22], [math.ceil(0.22 * n_iters)]
    while found[-1] < n_iters:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        found.append(math.ceil(shares[-1] * n_iters))
    return set(found)


def _project(z: list[Tensor], scales: list[Tensor], rho: float, multiplier: float) -> float:
    """Euclidean projection of z, in place, into the ellipsoid ||z / a||_2 <= rho.

    The projection is z a^2 / (a^2 + m) with the one m of 0 or more for which it is feasible and, if m > 0, on the
    border. Newton's iteration on 1/||z a / (a^2 + m)|| - 1/rho from the m of the last call, until a step starts from a
    length within 3 % of rho, which leaves some 0.1 %; the point is then scaled onto the border exactly. Where a = 0 the
    projection is 0.

    Returns:
        m, from which the next call starts.
    """
    for _ in range(30):
        square = slope = 0.0
        for tensor, a in zip(z, scales, strict=True):
            below = a.square().add_(max(multiplier, SMALLEST))
            q = tensor.mul(a).div_(below).square_()
            square = square + q.sum()
            slope = slope + q.div_(below).sum()
        length, slope = math.sqrt(float(square)), float(slope)
        if (multiplier == 0 and length <= rho) or slope == 0:
            break
        multiplier = max(multiplier + (length / rho - 1) * length**2 / slope, 0.0)
        if abs(length - rho) <= 0.03 * rho:
            break
    square = 0.0
    for tensor, a in zip(z, scales, strict=True):
        tensor.div_(a.square().add_(max(multiplier, SMALLEST))).mul_(a)  # the point divided by a
        square = square + torch.linalg.vector_norm(tensor).square()
        tensor.mul_(a)
    length = math.sqrt(float(square))
    if length > rho or multiplier > 0:
        torch._foreach_mul_(z, rho / length if length else 0.0)
    return multiplier


@full_float32()
def average_sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float,
    norm: str = "l2",
    adaptive: bool = True,
    n_draws: int = 100,
    generator: torch.Generator | None = None,
    params: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float | list[float]]:
    """The mean rise of the mean cross-entropy over all images under random perturbations of the weights.

    delta = rho T z with independent z of each weight. For linf z is uniform on [-1, 1], so that delta is uniform in the
    ball of radius rho. For l2 it is standard normal, as the authors', and there is no ball: rho is the standard
    deviation of each weight's relative change, and of P weights the length ||T^-1 delta||_2 is about rho sqrt(P). Its
    rho is not that of worst-case l2. Draws come in antithetic pairs z and -z, whose mean has no linear term; each draw
    is used on every batch. On a quadratic loss with Hessian H the value is rho^2/2 tr(T H T), or a third of it for
    linf. Each image weighs the same, so that the value does not depend on the batches, the last smaller one included.

    Args:
        model, batches, rho, norm, adaptive, params: as for `worst_case_sharpness`.
        n_draws: perturbations, an even number of 4 or more.
        generator: of the draws; by default one of seed 0. Give one on the CPU.
        progress: called after each draw.

    Returns:
        loss, error: mean rises over images; loss_standard_error, error_standard_error: over pairs of draws;
        loss_by_batch, error_by_batch: means over the images of each.

    Raises:
        ValueError: as `worst_case_sharpness`.
    """
    _check(model, rho, norm)
    if n_draws < 4 or n_draws % 2:
        raise ValueError(f"n_draws: expected an even number of 4 or more, got {n_draws}")
    generator = generator or torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> Tensor:
        if norm == "l2":
            return torch.randn(shape, generator=generator)
        return 2 * torch.rand(shape, generator=generator) - 1

    with _movable(model, params, adaptive) as weights, torch.no_grad():

        def values() -> tuple[Tensor, list[int]]:
            """Loss and error rate by batch, [batches, 2], at the present point, and the sizes of the batches."""
            found, sizes = [], []
            for images, labels in batches:
                logits = model(images)
                found.append(_loss_and_wrong(logits, labels, F.cross_entropy(logits, labels)))
                sizes.append(len(labels))
            return torch.tensor(_read(found, sizes) if found else [], dtype=torch.float64), sizes

        (first, sizes), pairs = values(), []
        _refuse_infinite(first[:, 0].tolist() if len(first) else [])
        for _ in range(n_draws // 2):
            delta, both = [draw(scale.shape).to(scale) * scale for scale in weights.scales], []
            for sign in (1, -1):
                weights.shift(delta, sign * rho)
                both.append(values()[0] - first)
                progress()
            pairs.append(sum(both) / 2)
    rises, shares = torch.stack(pairs), relative_sizes(sizes)  # [pairs, batches, 2]
    result = _means(rises.mean(dim=0).tolist(), shares)
    weighted = rises * torch.tensor(shares, dtype=torch.float64)[:, None]
    loss, error = (weighted.mean(dim=1).std(dim=0) / math.sqrt(len(pairs))).tolist()
    return result | {"loss_standard_error": loss, "error_standard_error": error}


def _check(model: nn.Module, rho: float, norm: str) -> None:
    refuse_train_mode(model, "sharpness")
    if not 0 < rho <= MAX_RADIUS:
        raise ValueError(f"rho: expected a number above 0 and up to {MAX_RADIUS:g}, got {rho:g}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got '{norm}'")


def relative_sizes(sizes: list[int]) -> list[float]:
    """The weight of each batch's mean in a mean over images: its size over the mean size, 1 if all are alike."""
    return [size * len(sizes) / sum(sizes) for size in sizes]


def _means(rises: list[list[float]], weights: list[float] | None = None) -> dict[str, float | list[float]]:
    """The results from rises of loss and error rate by batch, [batches, 2], whose weights have the mean 1."""
    if not rises:
        raise ValueError("batches: no images given")
    losses, errors = map(list, zip(*rises, strict=True))
    sums = (sum(w * x for w, x in zip(weights or [1.0] * len(rises), part, strict=True)) for part in (losses, errors))
    means = {name: total / len(rises) for name, total in zip(("loss", "error"), sums, strict=True)}
    return means | {"loss_by_batch": losses, "error_by_batch": errors}
