import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from tests import reference
from utils import theory
from utils.theory import (
    largest_stable_rho,
    maximum_over_ball,
    phi,
    sam_bounds,
    sam_point,
    sharpbalance_bounds,
    sharpbalance_point,
    simulate_sam,
    simulate_sharpbalance,
    simulate_trained,
    wishart_eigenvalues,
)
from utils.verification import PUBLISHED_K, PUBLISHED_POINTS, PUBLISHED_RHO, SETTING

BASE = {"n": 3000, "d": 150, "eta": 0.01, "rho0": 0.01, "sigma2": 0.1, "w_norm": 3.922}


@pytest.fixture(autouse=True)
def _quiet():
    theory._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SAM diverges")
        yield


@pytest.mark.parametrize("ratio", [Fraction(3, 10), Fraction(1), Fraction(2), Fraction(20)])
@pytest.mark.parametrize("rho", [Fraction(0), Fraction(1, 10), Fraction(1, 2)])
def test_phi_equals_the_exact_moments(ratio, rho):
    eta = Fraction(1, 100)
    for i in (0, 1, 2, 3, 7, 12, 20):
        for j in (0, 1, 2, 4):
            exact = reference.phi_by_moments(i, j, eta, rho, ratio)
            assert phi(i, j, float(eta), float(rho), float(ratio)) == pytest.approx(float(exact), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.0001, 2.0, 20.0])
def test_phi_at_200_equals_an_integral_of_high_precision(ratio):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    for i, j, rho in ((200, 0, 0.1), (200, 4, 0.1), (199, 1, 0.05), (200, 2, 0.25)):
        exact, largest = reference.phi_by_integral(mpmath, i, j, 0.01, rho, ratio)
        assert abs(phi(i, j, 0.01, rho, ratio) - exact) <= 1e-8 * largest


def test_phi_is_signed():
    assert phi(3, 0, 0.01, 0.5, 20) == pytest.approx(-6.3251175, rel=1e-6)
    assert phi(0, 0, 0.01, 0.5, 20) == 1
    assert phi(0, 1, 0.01, 0.5, 20) == pytest.approx(20)
    assert phi(0, 0, 0.01, 0.5, 0.3) == 1  # with the atom at 0
    assert phi(0, 1, 0.01, 0.5, 0.3) == pytest.approx(0.3)


def test_phi_equals_random_matrices():
    random = np.random.default_rng(0)
    for ratio in (0.5, 2.0):
        n, d = int(400 * ratio), 400
        values = np.mean([_powers(wishart_eigenvalues(n, d, random), 0.05, 0.3) for _ in range(20)], axis=0)
        expected = [phi(i, j, 0.05, 0.3, ratio) for i in (2, 5) for j in (0, 2)]
        assert values == pytest.approx(expected, rel=0.02)


def _powers(eigenvalues, eta, rho):
    base = 1 - eta * eigenvalues - eta * rho * eigenvalues**2
    return [(base**i * eigenvalues**j).mean() for i in (2, 5) for j in (0, 2)]


@pytest.mark.parametrize(("n", "d"), [(30, 12), (12, 30), (7, 7), (5, 1)])
def test_the_bidiagonal_law_is_that_of_data(n, d):
    """Largest eigenvalue and trace of drawn spectra against those of drawn data: Kolmogorov-Smirnov."""
    random = np.random.default_rng(1)
    drawn = np.array([wishart_eigenvalues(n, d, random) for _ in range(1500)])
    explicit = [np.linalg.eigvalsh((a := random.standard_normal((n, d)) / math.sqrt(d)).T @ a) for _ in range(1500)]
    assert drawn.shape == (1500, d)
    assert (np.diff(drawn, axis=1) >= 0).all()
    for figure in (lambda e: e[:, -1], lambda e: e.sum(axis=1), lambda e: (e**2).sum(axis=1)):
        assert stats.ks_2samp(figure(drawn), figure(np.array(explicit))).pvalue > 1e-3


def balls():
    random = np.random.default_rng(0)
    for d in (1, 2, 5, 40):
        values = np.sort(random.exponential(size=d))
        g = random.standard_normal(d)
        yield values, g, 0.7
        yield values, 1e-9 * g, 0.7
        yield values, 1e9 * g, 0.7
        yield values, 0 * g, 0.3  # no gradient
        yield values, np.append(g[:-1], 0.0), 5.0  # hard case where the radius is large
        yield values, np.append(g[:-1], 1e-12), 5.0  # nearly
        yield values, np.append(0 * g[:-1], 1.0), 0.1
        yield np.full(d, 2.0), g, 0.5  # one eigenvalue
        yield np.append(values[:-1], values[-1:]) * 0, g, 0.5  # no curvature
        repeated = values.copy()
        repeated[-2:] = 3.0
        yield repeated, np.where(repeated == 3.0, 0.0, g), 4.0  # hard case with a plane of maxima


def test_the_maximum_is_certified_and_never_below_a_search():
    random = np.random.default_rng(1)
    for values, g, radius in balls():
        found = maximum_over_ball(values, g, radius)
        assert -1e-12 <= found["gap"] <= 1e-10
        assert np.linalg.norm(found["argmax"]) == pytest.approx(radius, rel=1e-9)
        attained = g @ found["argmax"] + values @ found["argmax"] ** 2 / 2
        assert attained == pytest.approx(found["value"], rel=1e-12)
        points = random.standard_normal((20000, len(g)))
        points *= radius / np.linalg.norm(points, axis=1, keepdims=True)
        points = np.concatenate(
            [points, points * random.random((20000, 1)), radius * np.sign(g + 1e-300) * np.eye(len(g))]
        )
        assert (points @ g + (points**2 * values).sum(axis=1) / 2).max() <= found["value"] * (1 + 1e-9) + 1e-300


def test_the_maximum_equals_scipys_trust_region_solver():
    from scipy.optimize import minimize

    random = np.random.default_rng(2)
    for d in (2, 6, 20):
        values, g = np.sort(random.exponential(size=d)), random.standard_normal(d)
        found = maximum_over_ball(values, g, 1.3)
        best = -np.inf
        for _ in range(5):  # its steps are local: several starts on the sphere
            start = random.standard_normal(d)
            start *= 1.3 / np.linalg.norm(start)
            ball = {"type": "ineq", "fun": lambda e: 1.3**2 - e @ e, "jac": lambda e: -2 * e}
            result = minimize(
                lambda e, g=g, values=values: -(g @ e + values @ e**2 / 2),
                start,
                jac=lambda e, g=g, values=values: -(g + values * e),
                constraints=[ball],
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            )
            best = max(best, -result.fun)
        assert found["value"] == pytest.approx(best, rel=1e-6)


def test_many_problems_at_once():
    random = np.random.default_rng(3)
    values, g = np.sort(random.exponential(size=9)), random.standard_normal((6, 9))
    g[2] = 0
    together = maximum_over_ball(values, g, 0.4)
    for i, row in enumerate(g):
        alone = maximum_over_ball(values, row, 0.4)
        assert together["value"][i] == pytest.approx(alone["value"], rel=1e-12)
        assert together["argmax"].shape == (6, 9)


def test_closed_form_equals_step_by_step():
    random = np.random.default_rng(0)
    n, d, eta, rho, k, rho0 = 40, 12, 0.03, 0.2, 6, 0.3
    data = random.standard_normal((n, d)) / math.sqrt(d)
    teacher, starts = random.standard_normal(d), random.standard_normal((8, d))
    values, vectors = np.linalg.eigh(data.T @ data)
    fast = sam_point(values, teacher @ vectors, starts @ vectors, eta, rho, k, rho0)
    slow = reference.simulate_sam_step_by_step(data, teacher, starts, eta, rho, k, rho0)
    for name in ("variance", "sharpness", "member_sharpness"):
        assert fast[name] == pytest.approx(slow[name], rel=1e-10), name


def test_closed_form_of_blocks_equals_step_by_step():
    random = np.random.default_rng(0)
    n, d, s, eta, rho, k, rho0 = 60, 8, 3, 0.05, 0.4, 5, 0.3
    data = random.standard_normal((n, d)) / math.sqrt(d)
    parts = np.split(data, s)
    teacher, starts = random.standard_normal(d), random.standard_normal((s, 6, d))
    fast = sharpbalance_point([a.T @ a for a in parts], teacher, starts, eta, rho, k, rho0)
    slow = reference.simulate_blocks_step_by_step(parts, teacher, starts, eta, rho, k, rho0)
    for name in ("variance", "sharpness", "member_sharpness"):
        assert fast[name] == pytest.approx(slow[name], rel=1e-10), name


SAM_SETTINGS = [(k, rho) for k in (1, 2, 3, 5) for rho in (0.0, 0.08, 0.16)]
BLOCK_SETTINGS = [(k, rho) for k in (1, 3, 5, 9) for rho in (0.05, 0.5, 1.5)]


@pytest.mark.parametrize(("k", "rho"), SAM_SETTINGS)
def test_theorem_1(k, rho):
    bounds = sam_bounds(k=k, rho=rho, **BASE)
    found = simulate_sam(k=k, rho=rho, **BASE, n_data=40, n_init=100, seed=k)
    assert bounds["stable"]
    assert abs(found["variance"] - bounds["variance"]) < 4 * found["variance_se"] + _finite_size(bounds["variance"])
    assert bounds["sharpness_upper"] > found["sharpness"] - 3 * found["sharpness_se"]
    assert bounds["sharpness_lower"] < found["sharpness"] + 3 * found["sharpness_se"]
    assert bounds["sharpness_lower"] <= bounds["sharpness_lower_leading"] <= bounds["sharpness_upper"]
    assert found["gap"] < 1e-10


@pytest.mark.parametrize(("k", "rho"), BLOCK_SETTINGS)
def test_theorem_2(k, rho):
    bounds = sharpbalance_bounds(k=k, rho=rho, s=10, **BASE)
    found = simulate_sharpbalance(k=k, rho=rho, s=10, **BASE, n_data=8, n_init=30, seed=k)
    assert bounds["stable"]
    assert abs(found["variance"] - bounds["variance"]) < 4 * found["variance_se"] + _finite_size(bounds["variance"])
    assert bounds["sharpness_upper"] > found["sharpness"] - 3 * found["sharpness_se"]
    assert found["gap"] < 1e-10


def _finite_size(value):
    """The bounds' phi is the limit of large d: at d = 150 the mean deviates by less than this (see the test of 1/d)."""
    return 2e-3 * value


def test_the_deviation_from_the_limit_shrinks_like_1_over_d():
    """E tr B^(2k) / d against phi(2k, 0) at n/d = 20: the deviation times d is one constant for d = 50 to 400."""
    random = np.random.default_rng(0)
    eta, rho, k, scaled = 0.01, 0.15, 4, []
    for d, draws in ((50, 4000), (100, 3000), (200, 2000), (400, 1500)):
        values = []
        for _ in range(draws):
            e = wishart_eigenvalues(20 * d, d, random)
            values.append(((1 - eta * e - eta * rho * e**2) ** (2 * k)).mean())
        deviation = (np.mean(values) - phi(2 * k, 0, eta, rho, 20)) * d
        scaled.append((deviation, np.std(values) / math.sqrt(draws) * d))
    constant = np.average([v for v, _ in scaled], weights=[1 / e**2 for _, e in scaled])
    assert all(abs(v - constant) < 4 * e for v, e in scaled), scaled
    assert abs(constant) > 5 / math.sqrt(sum(1 / e**2 for _, e in scaled))  # there is a deviation to see


@pytest.mark.parametrize(
    ("k", "rho", "measured", "exact"),
    [(3, 0.5, 29464, 30194), (3, 1.5, 21391, 21380), (5, 1.0, 19486, 19471), (14, 0.4, 14386, 14330)],
)
def test_the_exact_sum_of_theorem_2(k, rho, measured, exact):
    """S from the bound; the Monte Carlo values were found independently of this code."""
    bounds = sharpbalance_bounds(k=k, rho=rho, s=10, **BASE)
    curvature = BASE["rho0"] ** 2 / 2 * (math.sqrt(20) + 1) ** 2
    S = ((bounds["sharpness_upper"] - curvature) * 10 / (BASE["rho0"] * BASE["w_norm"])) ** 2
    assert pytest.approx(exact, abs=1) == S
    assert pytest.approx(measured, rel=0.03) == S
    authors = ((bounds["sharpness_upper_authors"] - curvature) * 10 / (BASE["rho0"] * BASE["w_norm"])) ** 2
    assert 1.015 < authors / S < 1.06


def test_the_exact_sum_against_large_random_blocks():
    random = np.random.default_rng(0)
    s, d, eta, rho, k, ratio = 4, 300, 0.01, 0.7, 3, 5.0
    draws = []
    for _ in range(6):
        blocks = [theory._wishart(int(ratio * d), d, random) for _ in range(s)]
        total = sum(blocks)
        powers = sum(np.linalg.matrix_power(np.eye(d) - eta * x - eta * rho * x @ x, k) for x in blocks)
        draws.append(np.sum((total @ powers) ** 2) / d)
    bounds = sharpbalance_bounds(int(s * ratio * d), d, eta, rho, k, 1.0, 0.1, 1.0, s)
    curvature = (math.sqrt(s * ratio) + 1) ** 2 / 2
    S = ((bounds["sharpness_upper"] - curvature) * s) ** 2
    assert np.mean(draws) == pytest.approx(S, rel=0.01)
    authors = ((bounds["sharpness_upper_authors"] - curvature) * s) ** 2
    assert abs(np.mean(draws) - S) < abs(np.mean(draws) - authors)


def test_the_published_points():
    """Figure 1(b), read off the vector graphic: upper bound and variance of every point."""
    base = BASE | {"w_norm": SETTING["w_norm"], "k": PUBLISHED_K}
    for rho, (sharpness, variance) in zip(PUBLISHED_RHO["sam"], PUBLISHED_POINTS["sam"], strict=True):
        bounds = sam_bounds(rho=rho, **base)
        assert bounds["sharpness_upper"] == pytest.approx(sharpness, abs=1e-4)
        assert bounds["variance"] == pytest.approx(variance, abs=1e-5)
        assert not bounds["stable"]
    for rho, (sharpness, variance) in zip(PUBLISHED_RHO["sharpbalance"], PUBLISHED_POINTS["sharpbalance"], strict=True):
        bounds = sharpbalance_bounds(rho=rho, s=10, **base)
        assert bounds["sharpness_upper_authors"] == pytest.approx(sharpness, abs=1e-4)
        assert bounds["variance"] == pytest.approx(variance, abs=1e-5)
        assert 0.005 < bounds["sharpness_upper_authors"] - bounds["sharpness_upper"] < 0.015
        assert bounds["stable"]


def test_known_values_of_theorem_1():
    bounds = sam_bounds(k=3, rho=0.25, **BASE)
    assert bounds["sharpness_lower_leading"] == pytest.approx(0.678, abs=2e-3)
    assert sam_bounds(k=3, rho=0.3, **BASE)["sharpness_lower"] < 0  # vacuous
    stable = sam_bounds(k=3, rho=0.1, **BASE)
    assert stable["variance"] == pytest.approx(0.00238, abs=1e-5)
    assert sam_bounds(100, 150, 0.01, 0.1, 3, 0.01, 0.1, 1.0)["sharpness_lower"] < math.inf  # n < d


def test_stability():
    largest = (math.sqrt(20) + 1) ** 2
    limit = largest_stable_rho(0.01, largest)
    assert limit == pytest.approx(0.1897, abs=1e-4)
    assert sam_bounds(k=2, rho=limit - 1e-6, **BASE)["stable"]
    theory._warned.clear()
    with pytest.warns(UserWarning, match=r"SAM diverges at eta = 0\.01, rho = 0\.3: the largest stable rho is 0\.1897"):
        assert not sam_bounds(k=2, rho=0.3, **BASE)["stable"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam_bounds(k=2, rho=0.31, **BASE)  # once
    with pytest.warns(UserWarning, match="eta must be below"):
        sam_bounds(k=2, rho=0.0, **(BASE | {"eta": 0.1}))
    # What the word means: beyond the limit more steps make the variance grow.
    for rho, grows in ((limit * 0.98, False), (limit * 1.02, True)):
        few, many = (sam_bounds(k=k, rho=rho, **BASE)["variance"] for k in (60, 90))
        assert (many > few) == grows


def test_the_same_call_gives_the_same_numbers():
    arguments = BASE | {"k": 2, "rho": 0.1, "n_data": 3, "n_init": 5}
    assert simulate_sam(**arguments) == simulate_sam(**arguments)
    assert simulate_sam(**arguments) != simulate_sam(**arguments, seed=1)
    small = {"n": 60, "d": 6, "eta": 0.05, "rho": 0.1, "k": 2, "rho0": 0.1, "sigma2": 0.1, "w_norm": 1.0, "n_data": 3}
    assert simulate_sharpbalance(**small, s=3) == simulate_sharpbalance(**small, s=3)
    assert simulate_trained(**small) == simulate_trained(**small)


def test_one_block_is_sam():
    """With s = 1 the second theorem is the first, and so is its simulation, in law."""
    one = sharpbalance_bounds(k=3, rho=0.1, s=1, **BASE)
    sam = sam_bounds(k=3, rho=0.1, **BASE)
    assert one["variance"] == pytest.approx(sam["variance"])
    assert one["sharpness_upper"] == pytest.approx(sam["sharpness_upper"])
    a = simulate_sharpbalance(k=3, rho=0.1, s=1, **BASE, n_data=20)
    b = simulate_sam(k=3, rho=0.1, **BASE, n_data=20)
    for name in ("variance", "sharpness", "member_sharpness"):
        assert abs(a[name] - b[name]) < 4 * math.hypot(a[f"{name}_se"], b[f"{name}_se"])


def test_the_trained_algorithm_contains_sam():
    """All rows with SAM: the same law as `simulate_sam`, apart from the mean over a few members."""
    arguments = BASE | {"n": 600, "k": 4, "rho": 0.1, "n_data": 30}
    a = simulate_trained(**arguments, members=4, flat_ratio=1.0, unselected="normal", warmup=2)
    assert a["sam_share"] == 1
    b = simulate_sam(**arguments)
    for name in ("variance", "member_sharpness"):
        assert abs(a[name] - b[name]) < 4 * math.hypot(a[f"{name}_se"], b[f"{name}_se"])
    part = simulate_trained(**arguments, members=4, flat_ratio=0.3, warmup=2)
    assert 0.3 < part["sam_share"] < 1
    assert part["member_sharpness"] > a["member_sharpness"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": -0.1}, "eta: -0.1 given, a finite number above 0"),
        ({"eta": math.nan}, "eta: nan"),
        ({"rho": -1}, "rho: -1 given, a finite number of 0 or more"),
        ({"rho0": 0}, "rho0: 0 given, a finite number above 0"),
        ({"k": 0}, "k: 0 given, a whole number of 1 or more"),
        ({"k": 2.5}, "k: 2.5"),
        ({"s": 7}, "s: 7 given, a divisor of n = 3000"),
        ({"n": 0}, "n: 0"),
        ({"d": 1}, "d: 1"),
        ({"sigma2": -1}, "sigma2: -1"),
        ({"w_norm": math.inf}, "w_norm: inf"),
        ({"n_data": 1}, "n_data: 1"),
        ({"n_init": 1}, "n_init: 1"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        simulate_sharpbalance(**(BASE | {"k": 3, "rho": 0.1, "s": 10, "n_data": 2, "n_init": 2} | change))


def test_bad_arguments_of_the_others():
    with pytest.raises(ValueError, match="i: -1"):
        phi(-1, 0, 0.01, 0.1, 2)
    with pytest.raises(ValueError, match="ratio: 0"):
        phi(1, 0, 0.01, 0.1, 0)
    with pytest.raises(ValueError, match="warmup: 9 given, a whole number from 0 to 3"):
        simulate_trained(**BASE, k=3, rho=0.1, warmup=9)
    with pytest.raises(ValueError, match="eta: 0"):
        sam_bounds(**(BASE | {"eta": 0}), k=3, rho=0.1)
