"""The two theorems on a linear regression: their quantities, and simulations of what they speak about.

Setting. A teacher w* in R^d of norm `w_norm`, data A in R^(n x d) with independent N(0, 1/d) entries, X = A'A, and the
loss f(w) = ||A w - A w*||^2 / 2, without noise. A member starts at w_0 ~ N(0, sigma2 I) and takes k steps of
un-normalised SAM on all of its data,

    w <- w - eta grad f(w + rho grad f(w)),    so that    w_k - w* = B^k (w_0 - w*),    B = I - eta X - eta rho X^2.

Diversity is the variance of a member's prediction for a test row t ~ N(0, I/d): E_t Var(t'w_k) = tr Cov(w_k) / d.
Sharpness is kappa(w) = max of f(w + e) - f(w) over ||e||_2 <= rho0, at the members' mean iterate w = E w_k, as in the
authors' notebook; at a member itself it is larger. With r = n/d, X has the Marchenko-Pastur spectrum of ratio r in the
limit of large n and d, with edges (sqrt(r) -+ 1)^2. All of this was reconstructed from the authors' notebook: the text
of the theorems (arXiv 2407.12996, theorems 1 and 2) was not seen.

SAM converges on this loss, and the figures mean what they seem to mean, where eta l (1 + rho l) < 2 for the largest
eigenvalue l. Beyond, the iteration diverges, and both sharpness and variance grow with rho.

float64, numpy and scipy only.
"""

import math
import warnings
from collections.abc import Iterable

import numpy as np
from scipy.linalg import eigh, eigvalsh_tridiagonal

from utils.partition import sharpness_aware_masks

_warned: set[tuple[float, float]] = set()


def phi(i: int, j: int, eta: float, rho: float, ratio: float) -> float:
    """The limit of (1/d) E tr(B^i X^j), B = I - eta X - eta rho X^2, by the Marchenko-Pastur law of a ratio r = n/d.

    phi(i, j) = integral of (1 - eta l - eta rho l^2)^i l^j against the density sqrt((b - l)(l - a)) / (2 pi l) on
    [a, b] = [(sqrt(r) - 1)^2, (sqrt(r) + 1)^2], with an atom of mass 1 - r at 0 if r < 1. With p(l) the integrand,
    (p(l) - p(0)) / l is a polynomial and Gauss-Chebyshev quadrature of the second kind integrates it exactly; the rest
    is p(0) times the whole mass, 1. So the value is exact to rounding for every ratio, also at r = 1, where the density
    is singular, and the atom needs no care. For r > 1.5, where 1/l is smooth on [a, b], p(l) / l is integrated as it
    is, which keeps the digits of tiny values. The value is signed: for odd i it can be negative.

    Args:
        i, j: whole numbers of 0 or more.
        eta: step size, above 0.
        rho: SAM's radius, 0 or more.
        ratio: r, above 0.

    Raises:
        ValueError: naming the argument and its range.
    """
    _whole("i", i, 0)
    _whole("j", j, 0)
    _positive("eta", eta)
    _positive("rho", rho, zero=True)
    _positive("ratio", ratio)
    degree = 2 * i + j - 1
    # At r > 1.5 the error of 1/l is r^-nodes, below 1e-45.
    nodes = max(degree // 2 + 2, 256)
    angle = np.pi * np.arange(1, nodes + 1) / (nodes + 1)
    half = 2 * math.sqrt(ratio)
    # Eigenvalues in the form that keeps their digits near 0: (sqrt(r) - 1)^2 + 2 sqrt(r) (1 + cos).
    x = (math.sqrt(ratio) - 1) ** 2 + 2 * half * np.cos(angle / 2) ** 2
    weight = half**2 / (2 * (nodes + 1)) * np.sin(angle) ** 2
    decay = eta * x * (1 + rho * x)  # B = 1 - decay
    if j > 0:
        quotient = (1 - decay) ** i * x ** (j - 1)
        at_zero = 0.0
    elif ratio > 1.5:
        quotient = (1 - decay) ** i / x
        at_zero = 0.0
    else:
        # (B^i - 1) / l without cancellation where B is near 1.
        near = decay < 0.5
        log = np.log1p(-np.where(near, decay, 0.0))
        quotient = np.where(near, np.expm1(i * log), (1 - np.where(near, 0.0, decay)) ** i - 1) / x
        at_zero = 1.0
    return float(weight @ quotient + at_zero)


def largest_stable_rho(eta: float, largest: float) -> float:
    """The rho below which SAM converges: eta l (1 + rho l) = 2 at the largest eigenvalue l; negative if none does."""
    return (2 / (eta * largest) - 1) / largest


def sam_bounds(
    n: int, d: int, eta: float, rho: float, k: int, rho0: float, sigma2: float, w_norm: float
) -> dict[str, float | bool]:
    """Theorem 1: diversity and sharpness of an ensemble of SAM members, all trained on the same n rows.

    With r = n/d, phi for ratio r, and the sharpness at the mean iterate:

        variance                 sigma2 phi(2k, 0)
        sharpness_upper          rho0^2/2 (sqrt(r) + 1)^2 + rho0 sqrt(phi(2k, 2)) ||w*||
        sharpness_lower          rho0^2/2 (sqrt(r) - 1)^2 + rho0 sqrt(phi(2k, 2)) ||w*|| - rho0 gap
        gap                      ||w*|| (phi(4k, 4) - phi(2k, 2)^2) / (2 phi(2k, 2)^1.5)
        sharpness_lower_leading  the same with the gap times 2/(d + 2)

    The upper bound takes the largest curvature and, by Jensen, the root of the mean squared gradient; the lower bound
    steps along the gradient, with the smallest curvature (0 for n < d), less Jensen's gap. That gap bounds the variance
    of the squared gradient by its second moment and makes the lower bound vacuous where the spectrum is wide.
    `sharpness_lower_leading` puts the leading order of that variance for random eigenvectors instead; it is no proof,
    since it leaves out how the spectrum fluctuates.

    The bounds are for expectations in the limit of large n and d; means of samples may leave them.

    Args:
        n, d: rows and columns of the data.
        eta, rho, k: SAM's step size, radius and number of steps (1 or more).
        rho0: radius of the sharpness, above 0.
        sigma2: variance of each coordinate of the start.
        w_norm: ||w*||.

    Returns:
        variance, sharpness_upper, sharpness_lower, sharpness_lower_leading, stable (eta l (1 + rho l) < 2 at the
        largest eigenvalue l = (sqrt(r) + 1)^2). A setting that is not stable warns once.

    Raises:
        ValueError: naming the argument and its range.
    """
    _check(n, d, eta, rho, k, rho0, sigma2, w_norm)
    ratio = n / d
    second, fourth = phi(2 * k, 2, eta, rho, ratio), phi(4 * k, 4, eta, rho, ratio)
    gradient = rho0 * math.sqrt(second) * w_norm
    gap = w_norm * (fourth - second**2) / (2 * second**1.5) if second else math.inf
    flattest = max(math.sqrt(ratio) - 1, 0.0) ** 2
    return {
        "variance": sigma2 * phi(2 * k, 0, eta, rho, ratio),
        "sharpness_upper": rho0**2 / 2 * (math.sqrt(ratio) + 1) ** 2 + gradient,
        "sharpness_lower": rho0**2 / 2 * flattest + gradient - rho0 * gap,
        "sharpness_lower_leading": rho0**2 / 2 * flattest + gradient - rho0 * gap * 2 / (d + 2),
        "stable": _stable(eta, rho, ratio),
    }


def sharpbalance_bounds(
    n: int, d: int, eta: float, rho: float, k: int, rho0: float, sigma2: float, w_norm: float, s: int
) -> dict[str, float | bool]:
    """Theorem 2: diversity and sharpness of an ensemble whose members train with SAM on one of s blocks of rows each.

    With r = n/(s d), phi for ratio r, phi_ij = phi(i, j), the falling factorials P2 = s(s-1), P3 = P2 (s-2),
    P4 = P3 (s-3), and the sharpness on all data at the mean iterate over starts and blocks:

        variance         sigma2 phi_(2k,0) + (s-1)/(s d) ||w*||^2 (phi_(2k,0) - phi_(k,0)^2)
        sharpness_upper  rho0^2/2 (sqrt(n/d) + 1)^2 + (rho0 ||w*|| / s) sqrt(S)
        S = s phi_(2k,2) + P2 [2r phi_(2k,1) + r(1+r) phi_(2k,0) + 2 phi_(k,0) phi_(k,2) + phi_(k,1)^2
            + 2r phi_(k,0) phi_(k,1) - r^2 phi_(k,0)^2] + P3 [r^2 phi_(2k,0) + r(1+r) phi_(k,0)^2
            + 4r phi_(k,0) phi_(k,1)] + P4 r^2 phi_(k,0)^2

    S is (1/d) E tr of (sum_i B_i^k)' X^2 (sum_i B_i^k) with X = sum_j X_j, by the asymptotic freeness of the blocks.
    The authors' notebook counts one crossing word otherwise and splits the P3 terms otherwise; its S, and the bound
    `sharpness_upper_authors` from it, is a few percent larger and still a bound.

    This model is not the algorithm as it is trained: there, a member sees all rows, some with SAM, the others plainly.

    Args:
        n, d, eta, rho, k, rho0, sigma2, w_norm: as for `sam_bounds`.
        s: number of blocks, which divides n.

    Returns:
        variance, sharpness_upper, sharpness_upper_authors, stable (as in `sam_bounds`, for a block). A setting that is
        not stable warns once.

    Raises:
        ValueError: naming the argument and its range.
    """
    _check(n, d, eta, rho, k, rho0, sigma2, w_norm, s)
    r = n / (s * d)
    a = {(i, j): phi(i, j, eta, rho, r) for i in (k, 2 * k) for j in (0, 1, 2)}
    zero, one, two = a[k, 0], a[k, 1], a[k, 2]
    p2, p3, p4 = s * (s - 1), s * (s - 1) * (s - 2), s * (s - 1) * (s - 2) * (s - 3)
    pairs = 2 * r * a[2 * k, 1] + r * (1 + r) * a[2 * k, 0] + 2 * zero * two + one**2
    common = s * a[2 * k, 2] + p2 * pairs + p4 * r**2 * zero**2
    triple = r**2 * a[2 * k, 0], r * (1 + r) * zero**2, r * zero * one
    exact = common + p2 * (2 * r * zero * one - r**2 * zero**2) + p3 * (triple[0] + triple[1] + 4 * triple[2])
    authors = common + p2 * one**2 + p3 * (1.5 * triple[0] + 1.5 * triple[1] + 3 * triple[2])
    curvature = rho0**2 / 2 * (math.sqrt(n / d) + 1) ** 2
    between = (s - 1) / (s * d) * w_norm**2 * (a[2 * k, 0] - zero**2)
    return {
        "variance": sigma2 * a[2 * k, 0] + between,
        "sharpness_upper": curvature + rho0 * w_norm / s * math.sqrt(exact),
        "sharpness_upper_authors": curvature + rho0 * w_norm / s * math.sqrt(authors),
        "stable": _stable(eta, rho, r),
    }


def maximum_over_ball(eigenvalues: np.ndarray, gradient: np.ndarray, radius: float) -> dict[str, np.ndarray]:
    """The exact maximum of g'e + e'He/2 over ||e||_2 <= radius, for H with non-negative eigenvalues, in its eigenbasis.

    The function is convex, so that the maximum lies on the sphere, at (mu I - H) e = g for the one multiplier
    mu >= l_max with ||e|| = radius (the secular equation). Hard case: g has no part in the eigenspace of l_max and the
    solution at mu = l_max is too short; then any vector of that eigenspace fills it up. The certificate is the gap to
    the Lagrangian's dual value g'(mu I - H)^-1 g / 2 + mu radius^2 / 2, which no feasible point can exceed.

    Args:
        eigenvalues: of H, ascending or not, [d], 0 or more.
        gradient: g in the eigenbasis, [d] or [m, d] for m problems at once.
        radius: above 0.

    Returns:
        value [m], argmax e [m, d], multiplier mu [m], gap [m] (dual less primal value, relative to the value); without
        the first dimension for a single g.

    Source: Conn, Gould and Toint, "Trust-region methods", SIAM 2000, chapter 7.
    """
    single = np.ndim(gradient) == 1
    g = np.atleast_2d(np.asarray(gradient, dtype=np.float64))
    # Parts this small change no digit of the value, and would slow the iteration down.
    g = np.where(np.abs(g) <= 1e-15 * np.linalg.norm(g, axis=1, keepdims=True), 0.0, g)
    values = np.asarray(eigenvalues, dtype=np.float64)
    top = values.max()
    delta = top - values  # 0 at the top eigenspace
    at_top = delta <= 1e-14 * max(top, 1e-300)
    delta = np.where(at_top, 0.0, delta)
    square = g**2

    # Where g is 0 every term below is 0; a shift of 1 keeps 0 / 0 away at the top eigenspace.
    shift = np.where(square == 0, 1.0, delta)

    # nu = mu - top. Newton's iteration on 1/length, which is concave, rises to the root from any point left of it:
    # no single term, and not all of them at the largest shift, may be longer than the radius there.
    nu = np.maximum((np.abs(g) / radius - delta).max(axis=1), 0.0)
    nu = np.maximum(nu, np.linalg.norm(g, axis=1) / radius - delta.max())
    hard = np.zeros(len(g), dtype=bool)
    inverse, terms = np.empty_like(g), np.empty_like(g)
    for iteration in range(200):
        np.add(shift, nu[:, None], out=inverse)
        np.reciprocal(inverse, out=inverse)
        np.multiply(square, inverse, out=terms)
        squared = np.einsum("ij,ij->i", terms, inverse)  # ||e||^2
        terms *= inverse
        slope = np.einsum("ij,ij->i", terms, inverse)
        if iteration == 0:
            hard = (nu == 0) & (np.sqrt(squared) < radius * (1 - 1e-15))
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (np.sqrt(squared) / radius - 1) * squared / slope
        step = np.where(hard | ~np.isfinite(step), 0.0, step)
        nu = nu + np.maximum(step, 0.0)
        if (step <= 1e-15 * np.maximum(nu, 1e-300)).all():
            break
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.where(g == 0, 0.0, g / (nu[:, None] + delta))
    first = int(np.flatnonzero(at_top)[0])
    missing = np.maximum(radius**2 - (e**2).sum(axis=1), 0.0)
    e[hard, first] += np.sqrt(missing[hard])
    e[~hard] *= radius / np.linalg.norm(e[~hard], axis=1, keepdims=True)
    multiplier = top + nu
    value = (g * e).sum(axis=1) + (values * e**2).sum(axis=1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        dual = np.where(square == 0, 0.0, square / (nu[:, None] + delta)).sum(axis=1) / 2 + multiplier * radius**2 / 2
    gap = (dual - value) / np.maximum(np.abs(value), 1e-300)
    result = {"value": value, "argmax": e, "multiplier": multiplier, "gap": gap}
    return {name: array[0] for name, array in result.items()} if single else result


def simulate_sam(
    n: int,
    d: int,
    eta: float,
    rho: float,
    k: int,
    rho0: float,
    sigma2: float,
    w_norm: float,
    n_data: int = 10,
    n_init: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """What Theorem 1 bounds, simulated: k steps of SAM from `n_init` starts on each of `n_data` data sets.

    In the eigenbasis of X all steps are one factor b(l)^k. X is invariant under rotations, so that its eigenvectors are
    uniform: the eigenvalues are drawn from their exact law, by the bidiagonal form of a Wishart matrix, and w* evenly
    on its sphere. The variance is the unbiased one over the starts. The sharpness is an exact maximum, at the mean
    iterate over all starts (E w_k, not the mean of a sample) and, as `member_sharpness`, at each member.

    Args:
        n, d, eta, rho, k, rho0, sigma2, w_norm: as for `sam_bounds`.
        n_data, n_init: data sets and starts, 2 or more of each.
        seed: the same call gives the same numbers; data set i does not depend on n_data.

    Returns:
        variance, sharpness and member_sharpness, means over data sets, each with its standard error over data sets
        (`_se`), and gap, the largest relative gap of the maxima's certificates.

    Source: Dumitriu and Edelman, "Matrix models for beta ensembles", J. Math. Phys. 2002 (the bidiagonal form).
    """
    _check(n, d, eta, rho, k, rho0, sigma2, w_norm)
    _simulated(n_data, n_init)
    _stable(eta, rho, n / d)
    rows = []
    for random in _generators(seed, n_data):
        eigenvalues = wishart_eigenvalues(n, d, random)
        teacher = _on_sphere(d, w_norm, random)
        starts = math.sqrt(sigma2) * random.standard_normal((n_init, d))
        rows.append(sam_point(eigenvalues, teacher, starts, eta, rho, k, rho0))
    return _summary(rows)


def sam_point(
    eigenvalues: np.ndarray, teacher: np.ndarray, starts: np.ndarray, eta: float, rho: float, k: int, rho0: float
) -> dict[str, float]:
    """One data set: variance, sharpness at the mean iterate, mean sharpness of the members, in the eigenbasis of X.

    Args:
        eigenvalues: of X, [d].
        teacher: w*, [d].
        starts: w_0 of each member, [m, d].
        eta, rho, k, rho0: as for `sam_bounds`.
    """
    factor = (1 - eta * eigenvalues - eta * rho * eigenvalues**2) ** k
    errors = factor * (starts - teacher)  # w_k - w*
    # The first row is the mean iterate.
    found = maximum_over_ball(eigenvalues, eigenvalues * np.vstack([-factor * teacher, errors]), rho0)
    return {
        "variance": float(errors.var(axis=0, ddof=1).mean()),
        "sharpness": float(found["value"][0]),
        "member_sharpness": float(found["value"][1:].mean()),
        "gap": float(found["gap"].max()),
    }


def wishart_eigenvalues(n: int, d: int, random: np.random.Generator) -> np.ndarray:
    """The d eigenvalues of A'A, A of n x d independent N(0, 1/d) entries, drawn from their exact law; ascending."""
    small, large = min(n, d), max(n, d)
    # A is bidiagonal after Householder rotations: chi variables of falling degrees of freedom.
    diagonal = random.chisquare(large - np.arange(small))
    below = random.chisquare(small - 1 - np.arange(small - 1))
    tridiagonal = diagonal.copy()
    tridiagonal[1:] += below
    beside = np.sqrt(diagonal[:-1] * below)
    values = eigvalsh_tridiagonal(tridiagonal, beside) / d
    return np.concatenate([np.zeros(d - small), np.maximum(values, 0.0)])


def simulate_sharpbalance(
    n: int,
    d: int,
    eta: float,
    rho: float,
    k: int,
    rho0: float,
    sigma2: float,
    w_norm: float,
    s: int,
    n_data: int = 10,
    n_init: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """What Theorem 2 bounds, simulated: members train with SAM on one of s blocks each, from `n_init` starts a block.

    The variance is the unbiased one over starts within a block, averaged over blocks, plus that of the s blocks' means
    (over s, since the s blocks are all there are), each by its expectation over the starts. The sharpness is that of
    the loss on all data: at the mean iterate over starts and blocks, and at the members.

    Args, returns: as for `simulate_sam`; s divides n.
    """
    _check(n, d, eta, rho, k, rho0, sigma2, w_norm, s)
    _simulated(n_data, n_init)
    _stable(eta, rho, n / (s * d))
    rows = []
    for random in _generators(seed, n_data):
        blocks = [_wishart(n // s, d, random) for _ in range(s)]
        teacher = _on_sphere(d, w_norm, random)
        starts = math.sqrt(sigma2) * random.standard_normal((s, n_init, d))
        rows.append(sharpbalance_point(blocks, teacher, starts, eta, rho, k, rho0))
    return _summary(rows)


def sharpbalance_point(
    blocks: list[np.ndarray], teacher: np.ndarray, starts: np.ndarray, eta: float, rho: float, k: int, rho0: float
) -> dict[str, float]:
    """One data set cut into blocks: the figures of `sam_point`.

    Args:
        blocks: X_i = A_i'A_i of each block, s times [d, d].
        teacher: w*, [d].
        starts: w_0, [s, m, d].
        eta, rho, k, rho0: as for `sam_bounds`.
    """
    means, members, within = [], [], []
    for block, block_starts in zip(blocks, starts, strict=True):
        values, vectors = eigh(block)
        factor = (1 - eta * values - eta * rho * values**2) ** k
        power = (vectors * factor) @ vectors.T  # B_i^k
        means.append(-power @ teacher)  # E w_k - w*, since E w_0 = 0
        errors = (block_starts - teacher) @ power
        within.append(errors.var(axis=0, ddof=1).mean())
        members.append(errors)
    values, vectors = eigh(sum(blocks))
    values = np.maximum(values, 0.0)
    centre = np.mean(means, axis=0)
    at_mean = maximum_over_ball(values, values * (centre @ vectors), rho0)
    at_members = maximum_over_ball(values, values * (np.concatenate(members) @ vectors), rho0)
    return {
        "variance": float(np.mean(within) + np.var(means, axis=0).mean()),
        "sharpness": float(at_mean["value"]),
        "member_sharpness": float(at_members["value"].mean()),
        "gap": float(max(at_mean["gap"], at_members["gap"].max())),
    }


def simulate_trained(
    n: int,
    d: int,
    eta: float,
    rho: float,
    k: int,
    rho0: float,
    sigma2: float,
    w_norm: float,
    members: int = 3,
    flat_ratio: float = 0.5,
    warmup: int = 1,
    select: str = "flattest",
    unselected: str = "one",
    n_data: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """SharpBalance as it is trained, on the same regression. It lies outside both theorems: simulation only.

    Every member sees all rows. After `warmup` steps of SAM it scores each row a by its squared loss gradient
    ||a||^2 (a'(w - w*))^2, the partition of `utils.partition` gives it its set of SAM rows S, and the other k - warmup
    steps are w <- w - eta (X_N e + X_S (e + rho X_S e)), e = w - w*: the plain rows N do not enter the perturbation.
    The sharpness is that of all data, at the mean of the ensemble's members and at the members; the variance is the
    unbiased one over the members.

    Args:
        n, d, eta, rho, k, rho0, sigma2, w_norm: as for `sam_bounds`.
        members: of the ensemble, 2 or more.
        flat_ratio, select, unselected: as for `utils.partition.sharpness_aware_masks`; flat_ratio 1 with unselected
            normal is SAM on all rows for every member.
        warmup: steps of SAM before the scores, 0 to k.
        n_data: data sets, 2 or more.
        seed: the same call gives the same numbers.

    Returns:
        as `simulate_sam`, and sam_share, the mean share of rows with SAM.
    """
    _check(n, d, eta, rho, k, rho0, sigma2, w_norm)
    _simulated(n_data, members)
    _whole("warmup", warmup, 0, k)
    rows = []
    for number, random in enumerate(_generators(seed, n_data)):
        data = random.standard_normal((n, d)) / math.sqrt(d)
        teacher = _on_sphere(d, w_norm, random)
        errors = math.sqrt(sigma2) * random.standard_normal((members, d)) - teacher
        gram = data.T @ data
        for _ in range(warmup):
            errors = errors - eta * (errors + rho * errors @ gram) @ gram
        scores = (errors @ data.T) ** 2 * (data**2).sum(axis=1)
        seeds = [members * number + i for i in range(members)]
        masks = sharpness_aware_masks(scores, flat_ratio, select, unselected, seeds)
        for i, mask in enumerate(masks):
            part = data[mask].T @ data[mask]
            for _ in range(k - warmup):
                errors[i] -= eta * (gram @ errors[i] + rho * part @ (part @ errors[i]))
        values, vectors = eigh(gram)
        values = np.maximum(values, 0.0)
        at_mean = maximum_over_ball(values, values * (errors.mean(axis=0) @ vectors), rho0)
        at_members = maximum_over_ball(values, values * (errors @ vectors), rho0)
        rows.append(
            {
                "variance": float(errors.var(axis=0, ddof=1).mean()),
                "sharpness": float(at_mean["value"]),
                "member_sharpness": float(at_members["value"].mean()),
                "gap": float(max(at_mean["gap"], at_members["gap"].max())),
                "sam_share": float(masks.mean()),
            }
        )
    return _summary(rows)


def _wishart(n: int, d: int, random: np.random.Generator) -> np.ndarray:
    """A'A for A of n x d independent N(0, 1/d) entries, by Bartlett's decomposition where n >= d."""
    if n < d:
        data = random.standard_normal((n, d))
        return data.T @ data / d
    lower = np.tril(random.standard_normal((d, d)), -1)
    lower[np.diag_indices(d)] = np.sqrt(random.chisquare(n - np.arange(d)))
    return lower @ lower.T / d


def _generators(seed: int, count: int) -> Iterable[np.random.Generator]:
    """One generator for each data set, by SeedSequence; the first ones do not depend on the count."""
    return (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count))


def _on_sphere(d: int, norm: float, random: np.random.Generator) -> np.ndarray:
    direction = random.standard_normal(d)
    return norm * direction / np.linalg.norm(direction)


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means and standard errors over data sets; of the gap its largest value."""
    result = {}
    for name in rows[0]:
        column = np.array([row[name] for row in rows])
        if name == "gap":
            result[name] = float(column.max())
        else:
            result[name] = float(column.mean())
            result[f"{name}_se"] = float(column.std(ddof=1) / math.sqrt(len(rows)))
    return result


def _stable(eta: float, rho: float, ratio: float) -> bool:
    largest = (math.sqrt(ratio) + 1) ** 2
    stable = eta * largest * (1 + rho * largest) < 2
    if not stable and (eta, ratio) not in _warned:
        _warned.add((eta, ratio))
        limit = largest_stable_rho(eta, largest)
        reason = f"the largest stable rho is {limit:.4g}" if limit > 0 else f"eta must be below {2 / largest:.4g}"
        warnings.warn(f"SAM diverges at eta = {eta:g}, rho = {rho:g}: {reason}", stacklevel=3)
    return stable


def _check(
    n: int, d: int, eta: float, rho: float, k: int, rho0: float, sigma2: float, w_norm: float, s: int = 1
) -> None:
    _whole("n", n, 1)
    _whole("d", d, 2)
    _whole("k", k, 1)
    _whole("s", s, 1)
    _positive("eta", eta)
    _positive("rho", rho, zero=True)
    _positive("rho0", rho0)
    _positive("sigma2", sigma2, zero=True)
    _positive("w_norm", w_norm, zero=True)
    if n % s:
        raise ValueError(f"s: {s} given, a divisor of n = {n} is needed")


def _simulated(n_data: int, n_init: int) -> None:
    _whole("n_data", n_data, 2)
    _whole("n_init", n_init, 2)


def _whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        span = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name}: {value} given, a whole number {span} is needed")


def _positive(name: str, value: float, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0) or not math.isfinite(value):
        raise ValueError(f"{name}: {value} given, a finite number {'of 0 or more' if zero else 'above 0'} is needed")
