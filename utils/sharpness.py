"""Worst-case and average-case sharpness of a network: how much the loss rises when the weights move within a ball.

    kappa(w, rho) = max L(w + delta) - L(w)  over  ||T^-1 delta||_p <= rho,    T = diag(|w|) if adaptive, else I

taken for each batch alone and averaged over batches (m-sharpness with m the batch size), in eval mode. In the
coordinates u = T^-1 delta the ball is the unit ball times rho, the gradient is T g, and a weight that is exactly 0
stays there.

Source: Kwon et al., "ASAM", ICML 2021; Andriushchenko et al., "A modern look at the relationship between sharpness and
generalization", ICML 2023, whose protocol the authors use.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.hessian import matching_parameters, refuse_train_mode

NORMS = ("l2", "linf")
MAXIMISERS = ("tight", "apgd")
AVERAGED_STEPS = 6
SMALLEST = 1e-37  # keeps 0 / 0 from arising
Batches = Iterable[tuple[Tensor, Tensor]]


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

    Each maximiser makes one forward-backward pass an iteration, beside one at w, and keeps the best loss it has seen.

    tight: works in u, along the steepest direction of the ball: s = rho T g / ||T g||_2 (l2) or rho sign(T g) (linf).
    The first point is s at w, one step of (A)SAM, so that the result is never below it, and more iterations never lower
    it. l2: conditional gradient from the best point so far u*, to (1 - gamma) u* + gamma s, put back on the sphere;
    gamma starts at 1/2 and is cut to 0.7 of itself where the loss does not rise, so that on a convex loss every step
    rises. linf: six steps from 0 to 0.75 s + 0.25 of the last point but one, then, from the best point so far, steps
    with a size for each weight, 2 rho at first and cut to 0.7 of itself where the sign of the gradient changes.

    apgd: the authors' schedule and direction: delta + step |w| g / ||g||_2 (l2) or delta + step |w| sign(g) (linf), the
    Euclidean projection into the ball, then 0.75 of that point and 0.25 of the last but one; step starts at 2 rho and
    is halved at the checkpoints of APGD if progress was rare. Their defects are not inherited: a weight that is exactly
    0 does not switch the projection off, the projection always ends, and after a cut the iteration starts from the best
    point. In l2 its direction is not the steepest one of an adaptive ball, for which it falls short of `tight`.

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
        loss: mean rise of the loss; error: mean rise of the error rate (0 to 1) at the point of the largest loss;
        loss_by_batch, error_by_batch.

    Raises:
        ValueError: naming the argument, or for a model in train mode.
    """
    _check(model, rho, norm)
    if n_iters < 1:
        raise ValueError(f"n_iters: {n_iters} given, 1 or more is needed")
    if maximiser not in MAXIMISERS:
        raise ValueError(f"maximiser: '{maximiser}' given, choose of {', '.join(MAXIMISERS)}")
    search = _apgd if maximiser == "apgd" else _tight_l2 if norm == "l2" else _tight_linf
    losses, errors = [], []
    with _movable(model, params) as weights:
        scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights.start]
        for images, labels in batches:
            weights.reset()
            weights.images, weights.labels = images, labels
            loss, error = weights.gradients()
            best_loss, best_error = search(weights, scales, rho, norm, n_iters, loss, error)
            losses.append(best_loss - loss)
            errors.append(best_error - error)
            progress()
    return _means(losses, errors)


class _Weights:
    """The parameters that move, where they started, and the loss at the present place."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        self.model, self.parameters = model, parameters
        self.start = [p.detach().clone() for p in parameters]
        self.grads: list[Tensor] = []
        self.images = self.labels = None

    def reset(self) -> None:
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(start)

    def gradients(self) -> tuple[float, float]:
        """Loss and error rate of the batch here; the gradients come to stand in `grads`."""
        with torch.enable_grad():
            logits = self.model(self.images)
            loss = F.cross_entropy(logits, self.labels)
            self.grads = list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        return loss.item(), self._error(logits)

    @torch.no_grad()
    def move(self, scales: list[Tensor], point: list[Tensor], factor: float) -> None:
        """To start + factor T point."""
        for parameter, start, scale, u in zip(self.parameters, self.start, scales, point, strict=True):
            torch.addcmul(start, scale, u, value=factor, out=parameter.data)

    @torch.no_grad()
    def loss(self) -> tuple[float, float]:
        """Loss and error rate of the batch here."""
        logits = self.model(self.images)
        return F.cross_entropy(logits, self.labels).item(), self._error(logits)

    def _error(self, logits: Tensor) -> float:
        return (logits.argmax(dim=1) != self.labels).double().mean().item()


@contextmanager
def _movable(model: nn.Module, params: str | None) -> Iterator[_Weights]:
    """Only the chosen parameters ask for gradients; afterwards every weight and flag is as before."""
    chosen = matching_parameters(model, params)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    weights = _Weights(model, chosen)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield weights
    finally:
        weights.reset()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _tight_l2(
    weights: _Weights, scales: list[Tensor], rho: float, norm: str, n_iters: int, loss: float, error: float
) -> tuple[float, float]:
    gamma = 0.5
    best, best_error = loss, error
    point, direction = None, _steepest(weights.grads, scales)  # u* / rho and s / rho
    trial = [torch.empty_like(s) for s in scales]
    for _ in range(n_iters):
        length = 0.0
        for i, s in enumerate(direction):
            if point is None:
                trial[i].copy_(s)
            else:
                torch.lerp(point[i], s, gamma, out=trial[i])
            length = length + trial[i].square().sum()
        factor = rho / length.sqrt().item() if length > 0 else rho
        weights.move(scales, trial, factor)
        loss, error = weights.gradients()
        if loss > best or point is None:
            if loss > best:
                best, best_error = loss, error
            point, trial = trial, point or [torch.empty_like(s) for s in scales]
            torch._foreach_mul_(point, factor / rho)
            direction = _steepest(weights.grads, scales)
        else:
            gamma *= 0.7
    return best, best_error


def _steepest(grads: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """T g / ||T g||_2, in the place of the gradients."""
    length = 0.0
    for g, scale in zip(grads, scales, strict=True):
        length = length + g.mul_(scale).square().sum()
    if length > 0:
        torch._foreach_mul_(grads, 1 / length.sqrt().item())
    return grads


@torch.no_grad()
def _tight_linf(
    weights: _Weights, scales: list[Tensor], rho: float, norm: str, n_iters: int, loss: float, error: float
) -> tuple[float, float]:
    best, best_error = loss, error
    signs = [g.sign_() for g in weights.grads]
    best_point, best_signs = [torch.zeros_like(s) for s in scales], signs  # points are u / rho

    def see(point: list[Tensor]) -> list[Tensor]:
        nonlocal best, best_error, best_point, best_signs
        weights.move(scales, point, rho)
        loss, error = weights.gradients()
        signs = [g.sign_() for g in weights.grads]
        if loss > best:
            best, best_error, best_point, best_signs = loss, error, [u.clone() for u in point], signs
        return signs

    see(signs)
    # The averages damp the coordinates whose gradient changes its sign from step to step.
    before = point = [torch.zeros_like(s) for s in scales]
    for _ in range(min(AVERAGED_STEPS, n_iters - 1)):
        before, point = point, list(torch._foreach_lerp(before, signs, 0.75))
        signs = see(point)
    point, signs = [u.clone() for u in best_point], best_signs
    steps = [torch.full_like(s, 2.0) for s in scales]
    for _ in range(n_iters - 1 - AVERAGED_STEPS):
        for u, step, sign in zip(point, steps, signs, strict=True):
            u.addcmul_(step, sign).clamp_(-1, 1)
        last, signs = signs, see(point)
        for step, a, b in zip(steps, last, signs, strict=True):
            step.mul_(torch.mul(a, b).mul_(0.15).add_(0.85))  # 1 where the signs agree, 0.7 where they do not
    return best, best_error


@torch.no_grad()
def _apgd(
    weights: _Weights, scales: list[Tensor], rho: float, norm: str, n_iters: int, loss: float, error: float
) -> tuple[float, float]:
    checkpoints = _apgd_checkpoints(n_iters)
    best, best_error, last = loss, error, loss
    # For linf a point is kept as u, where the projection is a clamp; for l2 as delta.
    point, before = ([torch.zeros_like(s) for s in scales] for _ in range(2))
    best_point, best_grads = point, weights.grads
    step, last_step, last_best = 2 * rho, 2 * rho, loss
    rises, multiplier, last_checkpoint = 0, 0.0, 0
    spare = None  # memory that was used before comes without the cost of new pages
    for i in range(1, n_iters + 1):
        z = [torch.empty_like(s) for s in scales] if spare is None else spare
        if norm == "l2":
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(weights.grads))).item()
            for out, u, scale, g in zip(z, point, scales, weights.grads, strict=True):
                torch.addcmul(u, scale, g, value=step / max(length, 1e-30), out=out)
            multiplier = _project(z, scales, rho, multiplier)
        else:
            for out, u, g in zip(z, point, weights.grads, strict=True):
                torch.sign(g, out=out).mul_(step).add_(u).clamp_(-rho, rho)
        for out, u in zip(z, before, strict=True):
            torch.lerp(u, out, 0.75, out=out)
        spare = before if before is not best_point and before is not point else None
        point, before = z, point
        if norm == "l2":
            for parameter, start, x in zip(weights.parameters, weights.start, point, strict=True):
                torch.add(start, x, out=parameter.data)
        else:
            weights.move(scales, point, 1.0)
        loss, error = weights.gradients()
        rises += loss > last
        last = loss
        if loss > best:
            best, best_error, best_point, best_grads = loss, error, point, weights.grads
        if i in checkpoints:
            rare = rises < 0.75 * (i - last_checkpoint)
            stuck = step == last_step and best == last_best
            last_step, last_best, last_checkpoint, rises = step, best, i, 0
            if rare or stuck:
                step /= 2
                point = before = best_point
                weights.grads = best_grads
    return best, best_error


def _apgd_checkpoints(n_iters: int) -> set[int]:
    """When the step size is looked at: [5, 9, 12, 15, 16, 18, 19, 20] of 20. Croce and Hein, ICML 2020."""
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
    """The mean rise of the mean cross-entropy under random perturbations of the weights, averaged over batches.

    delta = rho T z with independent z of each weight: standard normal for l2 (not normalised, as the authors'), uniform
    on [-1, 1] for linf. Draws come in antithetic pairs z and -z, whose mean has no linear term; each draw is used on
    every batch. On a quadratic loss with Hessian H the value is rho^2/2 tr(T H T), or a third of it for linf.

    Args:
        model, batches, rho, norm, adaptive, params: as for `worst_case_sharpness`.
        n_draws: perturbations, an even number of 4 or more.
        generator: of the draws; by default one of seed 0. Give one on the CPU.
        progress: called after each draw.

    Returns:
        loss, error: mean rises; loss_standard_error, error_standard_error: over pairs; loss_by_batch, error_by_batch.

    Raises:
        ValueError: naming the argument, or for a model in train mode.
    """
    _check(model, rho, norm)
    if n_draws < 4 or n_draws % 2:
        raise ValueError(f"n_draws: {n_draws} given, an even number of 4 or more is needed")
    generator = generator or torch.Generator().manual_seed(0)
    with _movable(model, params) as weights, torch.no_grad():
        scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights.start]

        def rates() -> Tensor:
            found = []
            for images, labels in batches:
                weights.images, weights.labels = images, labels
                found.append(weights.loss())
            return torch.tensor(found, dtype=torch.float64)

        at_start, pairs = rates(), []
        for _ in range(n_draws // 2):
            draw = []
            for scale in scales:
                if norm == "l2":
                    z = torch.randn(scale.shape, generator=generator)
                else:
                    z = 2 * torch.rand(scale.shape, generator=generator) - 1
                draw.append(z.to(scale) * scale)
            both = []
            for sign in (1, -1):
                for parameter, start, d in zip(weights.parameters, weights.start, draw, strict=True):
                    torch.add(start, d, alpha=sign * rho, out=parameter.data)
                both.append(rates() - at_start)
                progress()
            pairs.append(sum(both) / 2)
    rises = torch.stack(pairs)  # [pairs, batches, 2]
    by_pair, by_batch = rises.mean(dim=1), rises.mean(dim=0)
    standard_error = by_pair.std(dim=0) / math.sqrt(len(pairs))
    return _means(*by_batch.T.tolist()) | {
        "loss_standard_error": standard_error[0].item(),
        "error_standard_error": standard_error[1].item(),
    }


def _check(model: nn.Module, rho: float, norm: str) -> None:
    refuse_train_mode(model, "sharpness")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: {rho} given, a finite number above 0 is needed")
    if norm not in NORMS:
        raise ValueError(f"norm: '{norm}' given, choose of {', '.join(NORMS)}")


def _means(losses: list[float], errors: list[float]) -> dict[str, float | list[float]]:
    if not losses:
        raise ValueError("batches: no images given")
    return {
        "loss": sum(losses) / len(losses),
        "error": sum(errors) / len(errors),
        "loss_by_batch": losses,
        "error_by_batch": errors,
    }
