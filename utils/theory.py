"""Both theorems on a linear regression: the quantities they state, and simulations that check them.

Setting. A teacher w* in R^d of norm `w_norm`, data A in R^(n x d) with independent N(0, 1/d) entries, X = A'A, and the
noise-free loss f(w) = ||A w - A w*||^2 / 2. A member starts at w_0 ~ N(0, sigma2 I) and takes k steps of unnormalized
SAM on all of its data,

    w <- w - eta grad f(w + rho grad f(w)),    so that    w_k - w* = B^k (w_0 - w*),    B = I - eta X - eta rho X^2.

Diversity is the variance of a member's prediction on a test row t ~ N(0, I/d): E_t Var(t'w_k) = tr Cov(w_k) / d.
Sharpness is kappa(w) = max of f(w + e) - f(w) over ||e||_2 <= rho0. As in the authors' notebook it is taken at the
members' mean iterate w = E w_k; at a member itself it is larger. With r = n/d, the spectrum of X tends to the
Marchenko-Pastur law of ratio r for large n and d, with edges (sqrt(r) -+ 1)^2. SAM converges on this loss where
eta l (1 + rho l) < 2 for the largest eigenvalue l. Beyond that limit the iteration diverges, and both diversity and
sharpness grow with rho. All of this is reconstructed from the authors' notebook; the text of the theorems
(arXiv 2407.12996, theorems 1 and 2) was not available.

float64, numpy and scipy only. Functions that take the numbers of a `Regression` have its types and raise its errors.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, eigvalsh_tridiagonal

from utils.partition import sharpness_aware_masks

Numbers = dict[str, float]  # by name

_warned: set[tuple[float, float]] = set()


@dataclass(frozen=True)
class Regression:
    """One setting of the theorems, and what follows from it. A bad value raises a ValueError that names its field.

    Attributes:
        n, d: rows (>= 1) and columns (>= 2) of the data.
        eta, rho, k: SAM's step size (> 0), radius (>= 0) and number of steps (>= 1).
        rho0: radius of the sharpness, > 0.
        sigma2: variance of each coordinate of the start, >= 0.
        w_norm: ||w*||, >= 0.
        s: number of equal blocks of rows, a divisor of n; a member trains on one block. Theorem 1 has s = 1.
    """

    n: int
    d: int
    eta: float
    rho: float
    k: int
    rho0: float
    sigma2: float
    w_norm: float
    s: int = 1

    def __post_init__(self) -> None:
        _check_integers(1, n=self.n, k=self.k, s=self.s)
        _check_integers(2, d=self.d)
        _check_numbers(">", eta=self.eta, rho0=self.rho0)
        _check_numbers(">=", rho=self.rho, sigma2=self.sigma2, w_norm=self.w_norm)
        if self.n % self.s:
            raise ValueError(f"s: expected a divisor of n = {self.n}, got {self.s}")

    @property
    def ratio(self) -> float:
        """Rows of a block over columns: r = n / (s d)."""
        return self.n / (self.s * self.d)

    @property
    def largest_eigenvalue(self) -> float:
        """The upper edge of a block's spectrum: (sqrt(r) + 1)^2."""
        return (math.sqrt(self.ratio) + 1) ** 2

    @property
    def stable(self) -> bool:
        """Whether SAM converges: eta l (1 + rho l) < 2 at the largest eigenvalue l."""
        return self.eta * self.largest_eigenvalue * (1 + self.rho * self.largest_eigenvalue) < 2

    def phi(self, i: int, j: int) -> float:
        """`phi` for one block."""
        return phi(i, j, self.eta, self.rho, self.ratio)

    def teacher(self, random: np.random.Generator) -> np.ndarray:
        """Draw w* [d], uniform on its sphere."""
        direction = random.standard_normal(self.d)
        return self.w_norm * direction / np.linalg.norm(direction)

    def starts(self, random: np.random.Generator, *shape: int) -> np.ndarray:
        """Draw w_0 [*shape, d]."""
        return math.sqrt(self.sigma2) * random.standard_normal((*shape, self.d))

    def warn_if_divergent(self) -> None:
        """Warn, once for each eta and ratio, that SAM diverges; the warning points at the caller's caller."""
        if not self.stable and (self.eta, self.ratio) not in _warned:
            _warned.add((self.eta, self.ratio))
            largest = self.largest_eigenvalue
            limit = largest_stable_rho(self.eta, largest)
            reason = f"the largest stable rho is {limit:.4g}" if limit > 0 else f"eta must be below {2 / largest:.4g}"
            warnings.warn(f"SAM diverges at eta = {self.eta:g}, rho = {self.rho:g}: {reason}", stacklevel=3)


def phi(i: int, j: int, eta: float, rho: float, ratio: float) -> float:
    """The limit of (1/d) E tr(B^i X^j), B = I - eta X - eta rho X^2, by the Marchenko-Pastur law of ratio r = n/d.

    phi(i, j) = integral of (1 - eta l - eta rho l^2)^i l^j against the density sqrt((b - l)(l - a)) / (2 pi l) on
    [a, b] = [(sqrt(r) - 1)^2, (sqrt(r) + 1)^2], with an atom of mass 1 - r at 0 if r < 1. With p(l) the integrand,
    (p(l) - p(0)) / l is a polynomial, which Gauss-Chebyshev quadrature of the second kind integrates exactly; the rest
    is p(0) times the total mass, 1. The value is thus exact to rounding for every ratio, even at r = 1, where the
    density is singular, and the atom needs no special case. For r > 1.5, where 1/l is smooth on [a, b], p(l) / l is
    integrated directly, which preserves the digits of tiny values. The value is signed: negative for some odd i.

    Args:
        i, j: integers >= 0.
        eta, rho, ratio: as in `Regression`.
    """
    _check_integers(0, i=i, j=j)
    _check_numbers(">", eta=eta, ratio=ratio)
    _check_numbers(">=", rho=rho)
    # Exact for polynomials of degree 2i + j - 1; at r > 1.5 the error of 1/l is r^-nodes, below 1e-45.
    nodes = max(i + (j + 3) // 2, 256)
    angle = np.pi * np.arange(1, nodes + 1) / (nodes + 1)
    half = 2 * math.sqrt(ratio)
    # Eigenvalues in the form that preserves their digits near 0: (sqrt(r) - 1)^2 + 2 sqrt(r) (1 + cos).
    x = (math.sqrt(ratio) - 1) ** 2 + 2 * half * np.cos(angle / 2) ** 2
    weight = half**2 / (2 * (nodes + 1)) * np.sin(angle) ** 2
    decay = eta * x * (1 + rho * x)  # B = 1 - decay
    power = (1 - decay) ** i
    if j > 0:
        return float(weight @ (power * x ** (j - 1)))
    if ratio > 1.5:
        return float(weight @ (power / x))
    # B^i - 1 without cancellation where B is near 1.
    near = decay < 0.5
    change = np.where(near, np.expm1(i * np.log1p(-np.where(near, decay, 0.0))), power - 1)
    return float(weight @ (change / x) + 1)


def largest_stable_rho(eta: float, largest: float) -> float:
    """The rho below which SAM converges: eta l (1 + rho l) = 2 at the largest eigenvalue l; negative if none does."""
    return (2 / (eta * largest) - 1) / largest


def sam_bounds(n, d, eta, rho, k, rho0, sigma2, w_norm) -> Numbers:
    """Theorem 1: diversity and sharpness of an ensemble of SAM members, all trained on the same n rows.

    With r = n/d, phi for ratio r, and the sharpness at the mean iterate:

        variance                 sigma2 phi(2k, 0)
        sharpness_upper          rho0^2/2 (sqrt(r) + 1)^2 + rho0 sqrt(phi(2k, 2)) ||w*||
        sharpness_lower          rho0^2/2 (sqrt(r) - 1)^2 + rho0 sqrt(phi(2k, 2)) ||w*|| - rho0 gap
        gap                      ||w*|| (phi(4k, 4) - phi(2k, 2)^2) / (2 phi(2k, 2)^1.5)
        sharpness_lower_leading  the same with the gap times 2/(d + 2)

    The upper bound takes the largest curvature and, by Jensen, the root of the mean squared gradient. The lower bound
    steps along the gradient, with the smallest curvature (0 for n < d), less Jensen's gap. That gap bounds the variance
    of the squared gradient by its second moment, which makes the lower bound vacuous where the spectrum is wide.
    `sharpness_lower_leading` uses the leading order of that variance for random eigenvectors instead. It is not proven:
    it ignores the fluctuations of the spectrum.

    The bounds are for expectations in the limit of large n and d; sample means may violate them.

    Returns:
        variance, the three sharpness bounds, and stable (see `Regression`). An unstable setting warns once.
    """
    regression = Regression(n, d, eta, rho, k, rho0, sigma2, w_norm)
    regression.warn_if_divergent()
    second, fourth = regression.phi(2 * k, 2), regression.phi(4 * k, 4)
    curvature = rho0**2 / 2 * regression.largest_eigenvalue
    gradient = rho0 * math.sqrt(second) * w_norm
    gap = w_norm * (fourth - second**2) / (2 * second**1.5) if second else math.inf
    flattest = rho0**2 / 2 * max(math.sqrt(regression.ratio) - 1, 0.0) ** 2
    return {
        "variance": sigma2 * regression.phi(2 * k, 0),
        "sharpness_upper": curvature + gradient,
        "sharpness_lower": flattest + gradient - rho0 * gap,
        "sharpness_lower_leading": flattest + gradient - rho0 * gap * 2 / (d + 2),
        "stable": regression.stable,
    }


def sharpbalance_bounds(n, d, eta, rho, k, rho0, sigma2, w_norm, s) -> Numbers:
    """Theorem 2: diversity and sharpness of an ensemble whose members train with SAM on one of s blocks of rows each.

    With r = n/(s d), phi for ratio r, phi_ij = phi(i, j), the falling factorials P2 = s(s-1), P3 = P2 (s-2),
    P4 = P3 (s-3), and the sharpness on all data at the mean iterate over starts and blocks:

        variance         sigma2 phi_(2k,0) + (s-1)/(s d) ||w*||^2 (phi_(2k,0) - phi_(k,0)^2)
        sharpness_upper  rho0^2/2 (sqrt(n/d) + 1)^2 + (rho0 ||w*|| / s) sqrt(S)
        S = s phi_(2k,2) + P2 [2r phi_(2k,1) + r(1+r) phi_(2k,0) + 2 phi_(k,0) phi_(k,2) + phi_(k,1)^2
            + 2r phi_(k,0) phi_(k,1) - r^2 phi_(k,0)^2] + P3 [r^2 phi_(2k,0) + r(1+r) phi_(k,0)^2
            + 4r phi_(k,0) phi_(k,1)] + P4 r^2 phi_(k,0)^2

    S is (1/d) E tr of (sum_i B_i^k)' X^2 (sum_i B_i^k) with X = sum_j X_j, by the asymptotic freeness of the blocks.
    The authors' notebook counts one crossing word differently and splits the P3 terms differently. Its S, which gives
    `sharpness_upper_authors`, is a few percent larger and still a bound.

    This model is not the algorithm in practice, where a member sees all rows, some with SAM and the others without.

    Returns:
        variance, sharpness_upper, sharpness_upper_authors, and stable, for a block. An unstable setting warns once.
    """
    regression = Regression(n, d, eta, rho, k, rho0, sigma2, w_norm, s)
    regression.warn_if_divergent()
    r = regression.ratio
    zero, one, two = (regression.phi(k, j) for j in (0, 1, 2))
    double_zero, double_one, double_two = (regression.phi(2 * k, j) for j in (0, 1, 2))
    p2, p3, p4 = s * (s - 1), s * (s - 1) * (s - 2), s * (s - 1) * (s - 2) * (s - 3)
    pairs = 2 * r * double_one + r * (1 + r) * double_zero + 2 * zero * two + one**2
    common = s * double_two + p2 * pairs + p4 * r**2 * zero**2
    triple = r**2 * double_zero, r * (1 + r) * zero**2, r * zero * one
    exact = common + p2 * (2 * r * zero * one - r**2 * zero**2) + p3 * (triple[0] + triple[1] + 4 * triple[2])
    authors = common + p2 * one**2 + p3 * (1.5 * triple[0] + 1.5 * triple[1] + 3 * triple[2])
    curvature = rho0**2 / 2 * (math.sqrt(n / d) + 1) ** 2
    return {
        "variance": sigma2 * double_zero + (s - 1) / (s * d) * w_norm**2 * (double_zero - zero**2),
        "sharpness_upper": curvature + rho0 * w_norm / s * math.sqrt(exact),
        "sharpness_upper_authors": curvature + rho0 * w_norm / s * math.sqrt(authors),
        "stable": regression.stable,
    }


def maximum_over_ball(eigenvalues: np.ndarray, gradient: np.ndarray, radius: float) -> dict[str, np.ndarray]:
    """The exact maximum of g'e + e'He/2 over ||e||_2 <= radius, for H with non-negative eigenvalues, in its eigenbasis.

    The function is convex, so the maximum lies on the sphere, at (mu I - H) e = g for the unique multiplier
    mu >= l_max with ||e|| = radius (the secular equation). Hard case: g has no component in the eigenspace of l_max and
    the solution at mu = l_max is too short; any vector of that eigenspace then makes up the length. The certificate is
    the gap to the Lagrangian's dual value g'(mu I - H)^-1 g / 2 + mu radius^2 / 2, which bounds every feasible point.

    Args:
        eigenvalues: of H, in any order, [d], >= 0.
        gradient: g in the eigenbasis, [d], or [m, d] for m problems at once.
        radius: > 0.

    Returns:
        value [m], argmax e [m, d], multiplier mu [m], gap [m] (dual less primal value, relative to the value); without
        the first dimension for a single g.

    Source: Conn, Gould and Toint, "Trust-region methods", SIAM 2000, chapter 7.
    """
    g = np.atleast_2d(np.asarray(gradient, dtype=np.float64))
    # Components this small change no digit of the value, and would slow the iteration down.
    g = np.where(np.abs(g) <= 1e-15 * np.linalg.norm(g, axis=1, keepdims=True), 0.0, g)
    square = g**2
    values = np.asarray(eigenvalues, dtype=np.float64)
    top = values.max()
    delta = top - values
    delta[delta <= 1e-14 * max(top, 1e-300)] = 0.0  # the top eigenspace
    # Where g is 0 every term below is 0; a shift of 1 avoids 0 / 0 in the top eigenspace.
    shift = np.where(square == 0, 1.0, delta)

    # nu = mu - top. Newton's iteration on 1/length, which is concave, rises to the root from any point left of it:
    # there, no single term, and not all of them at the largest shift, may be longer than the radius.
    nu = np.maximum((np.abs(g) / radius - delta).max(axis=1), 0.0)
    nu = np.maximum(nu, np.linalg.norm(g, axis=1) / radius - delta.max())
    hard = (nu == 0) & (np.linalg.norm(g / (shift + nu[:, None]), axis=1) < radius * (1 - 1e-15))
    for _ in range(200):
        inverse = 1 / (shift + nu[:, None])
        terms = square * inverse
        squared = np.einsum("ij,ij->i", terms, inverse)  # ||e||^2
        slope = np.einsum("ij,ij->i", terms * inverse, inverse)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (np.sqrt(squared) / radius - 1) * squared / slope
        step = np.where(hard | ~np.isfinite(step), 0.0, step)
        nu = nu + np.maximum(step, 0.0)
        if (step <= 1e-15 * np.maximum(nu, 1e-300)).all():
            break
    shift = shift + nu[:, None]
    e = g / shift
    missing = np.maximum(radius**2 - (e**2).sum(axis=1), 0.0)
    e[hard, delta.argmin()] += np.sqrt(missing[hard])
    e[~hard] *= radius / np.linalg.norm(e[~hard], axis=1, keepdims=True)
    value = (g * e).sum(axis=1) + (values * e**2).sum(axis=1) / 2
    dual = (square / shift).sum(axis=1) / 2 + (top + nu) * radius**2 / 2
    gap = (dual - value) / np.maximum(np.abs(value), 1e-300)
    result = {"value": value, "argmax": e, "multiplier": top + nu, "gap": gap}
    return {name: array[0] for name, array in result.items()} if np.ndim(gradient) == 1 else result


def simulate_sam(n, d, eta, rho, k, rho0, sigma2, w_norm, n_data=10, n_init=100, seed=0) -> Numbers:
    """Simulate theorem 1: k steps of SAM from `n_init` starts on each of `n_data` data sets.

    In the eigenbasis of X all steps are one factor b(l)^k. X is invariant under rotations, so its eigenvectors are
    uniform: it suffices to draw the eigenvalues from their exact law and w* uniformly on its sphere. The variance is
    the unbiased one over the starts. The sharpness is an exact maximum, at the mean iterate over all starts (E w_k, not
    the mean of a sample) and, as `member_sharpness`, at each member.

    Args:
        n, d, eta, rho, k, rho0, sigma2, w_norm: as in `Regression`.
        n_data, n_init: number of data sets and of starts, >= 2.
        seed: the same call gives the same numbers; data set i does not depend on n_data.

    Returns:
        variance, sharpness and member_sharpness, means over data sets, each with its standard error over data sets
        (`_se`), and gap, the largest relative gap of the maxima's certificates. An unstable setting warns once.
    """
    regression = Regression(n, d, eta, rho, k, rho0, sigma2, w_norm)
    regression.warn_if_divergent()
    _check_integers(2, n_data=n_data, n_init=n_init)
    rows = []
    for random in np.random.default_rng(seed).spawn(n_data):
        eigenvalues = wishart_eigenvalues(n, d, random)
        teacher, starts = regression.teacher(random), regression.starts(random, n_init)
        rows.append(sam_point(eigenvalues, teacher, starts, eta, rho, k, rho0))
    return _summary(rows)


def sam_point(eigenvalues: np.ndarray, teacher: np.ndarray, starts: np.ndarray, eta, rho, k, rho0) -> Numbers:
    """One data set, in the eigenbasis of X: variance, sharpness at the mean iterate, mean sharpness of the members.

    Args: eigenvalues of X, [d]; the teacher w*, [d]; starts w_0 of the members, [m, d]; the rest as in `Regression`.
    """
    factor = _factor(eigenvalues, eta, rho, k)
    errors = factor * (starts - teacher)  # w_k - w*
    variance = float(errors.var(axis=0, ddof=1).mean())
    return {"variance": variance} | _sharpness(eigenvalues, -factor * teacher, errors, rho0)


def wishart_eigenvalues(n: int, d: int, random: np.random.Generator) -> np.ndarray:
    """Draw the d eigenvalues of A'A, ascending, from their exact law; A has n x d independent N(0, 1/d) entries.

    Source: Dumitriu and Edelman, "Matrix models for beta ensembles", J. Math. Phys. 2002 (the bidiagonal form).
    """
    small, large = min(n, d), max(n, d)
    # A is bidiagonal after Householder rotations: chi variables with decreasing degrees of freedom.
    diagonal = random.chisquare(large - np.arange(small))
    below = random.chisquare(small - 1 - np.arange(small - 1))
    off_diagonal = np.sqrt(diagonal[:-1] * below)
    diagonal[1:] += below
    values = eigvalsh_tridiagonal(diagonal, off_diagonal) / d
    return np.concatenate([np.zeros(d - small), np.maximum(values, 0.0)])


def simulate_sharpbalance(n, d, eta, rho, k, rho0, sigma2, w_norm, s, n_data=10, n_init=100, seed=0) -> Numbers:
    """Simulate theorem 2: members train with SAM on one of s blocks each, from `n_init` starts per block.

    The variance is the unbiased one over starts within a block, averaged over blocks, plus that of the s block means
    (divided by s, since these are all the blocks), each of them an expectation over the starts. The sharpness is that
    of the loss on all data: at the mean iterate over starts and blocks, and at the members.

    Args, Returns: as for `simulate_sam`; s divides n.
    """
    regression = Regression(n, d, eta, rho, k, rho0, sigma2, w_norm, s)
    regression.warn_if_divergent()
    _check_integers(2, n_data=n_data, n_init=n_init)
    rows = []
    for random in np.random.default_rng(seed).spawn(n_data):
        blocks = [_wishart(n // s, d, random) for _ in range(s)]
        teacher, starts = regression.teacher(random), regression.starts(random, s, n_init)
        rows.append(sharpbalance_point(blocks, teacher, starts, eta, rho, k, rho0))
    return _summary(rows)


def sharpbalance_point(blocks: list[np.ndarray], teacher: np.ndarray, starts: np.ndarray, eta, rho, k, rho0) -> Numbers:
    """One data set cut into blocks: the same quantities as `sam_point`.

    Args: blocks X_i = A_i'A_i, s times [d, d]; the teacher w*, [d]; starts w_0, [s, m, d]; the rest as in `Regression`.
    """
    means, members = [], []
    for block, block_starts in zip(blocks, starts, strict=True):
        values, vectors = eigh(block)
        power = (vectors * _factor(values, eta, rho, k)) @ vectors.T  # B_i^k
        means.append(-power @ teacher)  # E w_k - w*, since E w_0 = 0
        members.append((block_starts - teacher) @ power)
    within = np.mean([errors.var(axis=0, ddof=1).mean() for errors in members])
    variance = float(within + np.var(means, axis=0).mean())
    return {"variance": variance} | _sharpness_on(sum(blocks), np.mean(means, axis=0), np.concatenate(members), rho0)


def simulate_trained(regression: Regression, members=3, warmup=1, n_data=10, seed=0, **partition) -> Numbers:
    """Simulate SharpBalance as it is trained, on the same regression. Neither theorem covers it.

    Every member sees all rows. After `warmup` steps of SAM it scores each row a by its squared loss gradient
    ||a||^2 (a'(w - w*))^2, `utils.partition` assigns it a set S of SAM rows, and the other k - warmup steps are
    w <- w - eta (X e + rho X_S X_S e), e = w - w*: the rows outside S do not enter the perturbation. The variance is
    the unbiased one over the members; the sharpness is that of all data, at the members' mean and at the members.

    Args:
        regression: with s = 1.
        members: of the ensemble, >= 2.
        warmup: steps of SAM before the scores, 0 to k.
        n_data, seed: as for `simulate_sam`.
        partition: flat_ratio, select and unselected of `utils.partition.sharpness_aware_masks`. With flat_ratio 1 and
            unselected "normal" every member trains with SAM on all rows.

    Returns:
        as `simulate_sam`, and sam_share, the mean share of rows with SAM.
    """
    if regression.s != 1:
        raise ValueError(f"s: expected 1, since every member sees all rows, got {regression.s}")
    _check_integers(0, regression.k, warmup=warmup)
    _check_integers(2, n_data=n_data, members=members)
    eta, rho = regression.eta, regression.rho
    rows = []
    for number, random in enumerate(np.random.default_rng(seed).spawn(n_data)):
        data = random.standard_normal((regression.n, regression.d)) / math.sqrt(regression.d)
        teacher = regression.teacher(random)
        errors = regression.starts(random, members) - teacher  # w - w*
        gram = data.T @ data
        for _ in range(warmup):
            errors = errors - eta * (errors + rho * errors @ gram) @ gram
        scores = (errors @ data.T) ** 2 * (data**2).sum(axis=1)
        seeds = range(members * number, members * (number + 1))
        masks = sharpness_aware_masks(scores, seeds=seeds, **partition)
        for error, mask in zip(errors, masks, strict=True):
            part = data[mask].T @ data[mask]
            for _ in range(regression.k - warmup):
                error -= eta * (gram @ error + rho * part @ (part @ error))
        variance = float(errors.var(axis=0, ddof=1).mean())
        sharpness = _sharpness_on(gram, errors.mean(axis=0), errors, regression.rho0)
        rows.append({"variance": variance, **sharpness, "sam_share": float(masks.mean())})
    return _summary(rows)


def _factor(eigenvalues: np.ndarray, eta: float, rho: float, k: int) -> np.ndarray:
    """The eigenvalues of B^k, from those of X."""
    return (1 - eta * eigenvalues - eta * rho * eigenvalues**2) ** k


def _sharpness(eigenvalues: np.ndarray, mean: np.ndarray, members: np.ndarray, rho0: float) -> Numbers:
    """Sharpness at the mean iterate and, on average, at the members, from w - w* in the eigenbasis: [d] and [m, d]."""
    found = maximum_over_ball(eigenvalues, eigenvalues * np.vstack([mean, members]), rho0)
    return {
        "sharpness": float(found["value"][0]),
        "member_sharpness": float(found["value"][1:].mean()),
        "gap": float(found["gap"].max()),
    }


def _sharpness_on(gram: np.ndarray, mean: np.ndarray, members: np.ndarray, rho0: float) -> Numbers:
    """`_sharpness` on the data with gram matrix X [d, d]."""
    values, vectors = eigh(gram)
    return _sharpness(np.maximum(values, 0.0), mean @ vectors, members @ vectors, rho0)


def _wishart(n: int, d: int, random: np.random.Generator) -> np.ndarray:
    """Draw A'A; A has n x d independent N(0, 1/d) entries. By Bartlett's decomposition where n >= d."""
    if n < d:
        data = random.standard_normal((n, d))
        return data.T @ data / d
    lower = np.tril(random.standard_normal((d, d)), -1)
    lower[np.diag_indices(d)] = np.sqrt(random.chisquare(n - np.arange(d)))
    return lower @ lower.T / d


def _summary(rows: list[Numbers]) -> Numbers:
    """Means and standard errors over data sets; for the gap its largest value."""
    result = {}
    for name in rows[0]:
        column = np.array([row[name] for row in rows])
        result[name] = float(column.max() if name == "gap" else column.mean())
        if name != "gap":
            result[f"{name}_se"] = float(column.std(ddof=1) / math.sqrt(len(rows)))
    return result


def _check_integers(low: int, high: float = math.inf, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
            span = f">= {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name}: expected a whole number {span}, got {value!r}")


def _check_numbers(sign: str, **values: float) -> None:
    """Finite, and > 0 or >= 0 by the sign."""
    for name, value in values.items():
        if not math.isfinite(value) or value < 0 or (sign == ">" and value == 0):
            raise ValueError(f"{name}: expected a finite number {sign} 0, got {value!r}")
