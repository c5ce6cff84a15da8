import dataclasses
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from tests import reference
from utils import theory
from utils.theory import (
    Regression,
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
from utils.verification import published

BASE = {"n": 3000, "d": 150, "eta": 0.01, "rho0": 0.01, "sigma2": 0.1, "w_norm": 3.922}
SMALL = {"n": 60, "d": 6, "eta": 0.05, "rho": 0.1, "k": 2, "rho0": 0.1, "sigma2": 0.1, "w_norm": 1.0}
NAMES = ("variance", "sharpness", "member_sharpness")


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
    """Largest eigenvalue and two moments of drawn spectra against those of drawn data: Kolmogorov-Smirnov."""
    random = np.random.default_rng(1)
    drawn = np.array([wishart_eigenvalues(n, d, random) for _ in range(1500)])
    explicit = [np.linalg.eigvalsh((a := random.standard_normal((n, d)) / math.sqrt(d)).T @ a) for _ in range(1500)]
    assert drawn.shape == (1500, d)
    assert (np.diff(drawn, axis=1) >= 0).all()
    for statistic in (lambda e: e[:, -1], lambda e: e.sum(axis=1), lambda e: (e**2).sum(axis=1)):
        assert stats.ks_2samp(statistic(drawn), statistic(np.array(explicit))).pvalue > 1e-3


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


def test_the_maximum_equals_a_general_solver():
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
    assert [fast[name] for name in NAMES] == pytest.approx([slow[name] for name in NAMES], rel=1e-10)


def test_closed_form_of_blocks_equals_step_by_step():
    random = np.random.default_rng(0)
    n, d, s, eta, rho, k, rho0 = 60, 8, 3, 0.05, 0.4, 5, 0.3
    data = random.standard_normal((n, d)) / math.sqrt(d)
    parts = np.split(data, s)
    teacher, starts = random.standard_normal(d), random.standard_normal((s, 6, d))
    fast = sharpbalance_point([a.T @ a for a in parts], teacher, starts, eta, rho, k, rho0)
    slow = reference.simulate_blocks_step_by_step(parts, teacher, starts, eta, rho, k, rho0)
    assert [fast[name] for name in NAMES] == pytest.approx([slow[name] for name in NAMES], rel=1e-10)


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
    """The Monte Carlo values were found independently of this code."""
    S, authors = _sums(**BASE, k=k, rho=rho, s=10)
    assert pytest.approx(exact, abs=1) == S
    assert pytest.approx(measured, rel=0.03) == S
    assert 1.015 < authors / S < 1.06


def _sums(**setting):
    """S, exact and as the authors have it, from the bounds."""
    bounds, rho0 = sharpbalance_bounds(**setting), setting["rho0"]
    curvature = rho0**2 / 2 * (math.sqrt(setting["n"] / setting["d"]) + 1) ** 2
    scale = setting["s"] / (rho0 * setting["w_norm"])
    return [((bounds[name] - curvature) * scale) ** 2 for name in ("sharpness_upper", "sharpness_upper_authors")]


def test_the_exact_sum_against_large_random_blocks():
    random = np.random.default_rng(0)
    s, d, eta, rho, k, ratio = 4, 300, 0.01, 0.7, 3, 5.0
    draws = []
    for _ in range(6):
        blocks = [theory._wishart(int(ratio * d), d, random) for _ in range(s)]
        total = sum(blocks)
        powers = sum(np.linalg.matrix_power(np.eye(d) - eta * x - eta * rho * x @ x, k) for x in blocks)
        draws.append(np.sum((total @ powers) ** 2) / d)
    S, authors = _sums(n=int(s * ratio * d), d=d, eta=eta, rho=rho, k=k, rho0=1.0, sigma2=0.1, w_norm=1.0, s=s)
    assert np.mean(draws) == pytest.approx(S, rel=0.01)
    assert abs(np.mean(draws) - S) < abs(np.mean(draws) - authors)


def test_the_published_points():
    """Figure 1(b), read off the vector graphic: upper bound and variance of every point."""
    rows = published()
    assert [len(rows[method]) for method in ("sam", "sharpbalance")] == [17, 17]
    for row in rows["sam"] + rows["sharpbalance"]:
        sharpness = row["sharpness_upper" if row["method"] == "sam" else "sharpness_upper_authors"]
        assert sharpness == pytest.approx(row["published_sharpness"], abs=1e-4)
        assert row["variance_bound"] == pytest.approx(row["published_variance"], abs=1e-5)
        assert row["stable"] == (row["method"] == "sharpbalance")
        assert row["method"] == "sam" or 0.005 < sharpness - row["sharpness_upper"] < 0.015


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
    # What stable means: beyond the limit more steps make the variance grow.
    for rho, grows in ((limit * 0.98, False), (limit * 1.02, True)):
        few, many = (sam_bounds(k=k, rho=rho, **BASE)["variance"] for k in (60, 90))
        assert (many > few) == grows


def test_the_same_call_gives_the_same_numbers():
    for simulate in (
        lambda **options: simulate_sam(**SMALL, **options),
        lambda **options: simulate_sharpbalance(**SMALL, s=3, **options),
        lambda **options: simulate_trained(Regression(**SMALL), flat_ratio=0.5, **options),
    ):
        assert simulate(n_data=3) == simulate(n_data=3) != simulate(n_data=3, seed=1)
        # The first data sets do not depend on their number: third value from the means, then both standard errors.
        two, three = simulate(n_data=2), simulate(n_data=3)
        for name in NAMES:
            values = [two[name] - two[f"{name}_se"], two[name] + two[f"{name}_se"], 3 * three[name] - 2 * two[name]]
            assert np.std(values, ddof=1) / math.sqrt(3) == pytest.approx(three[f"{name}_se"], rel=1e-6)


def test_arguments_by_position():
    numbers = list(SMALL.values())
    assert list(SMALL) == ["n", "d", "eta", "rho", "k", "rho0", "sigma2", "w_norm"]
    assert sam_bounds(*numbers) == sam_bounds(**SMALL)
    assert sharpbalance_bounds(*numbers, 3) == sharpbalance_bounds(**SMALL, s=3)
    assert simulate_sam(*numbers, 3, 5, 1) == simulate_sam(**SMALL, n_data=3, n_init=5, seed=1)
    assert simulate_sharpbalance(*numbers, 3, 2, 5, 1) == simulate_sharpbalance(
        **SMALL, s=3, n_data=2, n_init=5, seed=1
    )


def test_a_regression_derives_its_quantities():
    regression = Regression(**SMALL, s=2)
    assert regression.ratio == 5
    assert regression.largest_eigenvalue == pytest.approx((math.sqrt(5) + 1) ** 2)
    assert regression.phi(3, 2) == phi(3, 2, SMALL["eta"], SMALL["rho"], 5)
    assert regression.stable
    assert not dataclasses.replace(regression, rho=2).stable
    random = np.random.default_rng(0)
    assert np.linalg.norm(dataclasses.replace(regression, w_norm=2.5).teacher(random)) == pytest.approx(2.5)
    starts = regression.starts(random, 100, 200)
    assert starts.shape == (100, 200, 6)
    assert starts.var() == pytest.approx(0.1, rel=0.02)
    with pytest.raises(dataclasses.FrozenInstanceError):
        regression.n = 3


def test_one_block_is_sam():
    """With s = 1 the second theorem is the first, and so is its simulation, in law."""
    one = sharpbalance_bounds(k=3, rho=0.1, s=1, **BASE)
    sam = sam_bounds(k=3, rho=0.1, **BASE)
    assert one["variance"] == pytest.approx(sam["variance"])
    assert one["sharpness_upper"] == pytest.approx(sam["sharpness_upper"])
    a = simulate_sharpbalance(k=3, rho=0.1, s=1, **BASE, n_data=20)
    b = simulate_sam(k=3, rho=0.1, **BASE, n_data=20)
    _assert_same_law(a, b, NAMES)


def _assert_same_law(a, b, names):
    for name in names:
        assert abs(a[name] - b[name]) < 4 * math.hypot(a[f"{name}_se"], b[f"{name}_se"])


def test_the_trained_algorithm_contains_sam():
    """All rows with SAM: the same law as `simulate_sam`, apart from the mean over a few members."""
    setting = BASE | {"n": 600, "k": 4, "rho": 0.1}
    options = {"members": 4, "warmup": 2, "n_data": 30}
    a = simulate_trained(Regression(**setting), **options, flat_ratio=1.0, unselected="normal")
    assert a["sam_share"] == 1
    _assert_same_law(a, simulate_sam(**setting, n_data=30), ("variance", "member_sharpness"))
    part = simulate_trained(Regression(**setting), **options, flat_ratio=0.3)
    assert 0.3 < part["sam_share"] < 1
    assert part["member_sharpness"] > a["member_sharpness"]


def test_the_trained_algorithm_contains_gradient_descent():
    """No row with SAM after the warm-up: the same numbers as rho = 0, apart from the warm-up."""
    regression = Regression(**SMALL | {"k": 4})
    options = {"flat_ratio": 0.0, "unselected": "normal", "n_data": 2}
    found = simulate_trained(regression, **options, warmup=0)
    assert found["sam_share"] == 0
    descent = dataclasses.replace(regression, rho=0.0)
    for flat_ratio in (0.0, 1.0):
        same = simulate_trained(descent, **options | {"flat_ratio": flat_ratio}, warmup=0)
        assert [same[name] for name in NAMES] == pytest.approx([found[name] for name in NAMES], rel=1e-12)
    assert simulate_trained(regression, **options, warmup=2)["variance"] != pytest.approx(found["variance"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": -0.1}, "eta: expected a finite number > 0, got -0.1"),
        ({"eta": math.nan}, "eta: expected a finite number > 0, got nan"),
        ({"rho": -1}, "rho: expected a finite number >= 0, got -1"),
        ({"rho0": 0}, "rho0: expected a finite number > 0, got 0"),
        ({"k": 0}, "k: expected a whole number >= 1, got 0"),
        ({"k": 2.5}, "k: .* got 2.5"),
        ({"s": 7}, "s: expected a divisor of n = 3000, got 7"),
        ({"n": 0}, "n: .* got 0"),
        ({"d": 1}, "d: expected a whole number >= 2, got 1"),
        ({"sigma2": -1}, "sigma2: .* got -1"),
        ({"w_norm": math.inf}, "w_norm: .* got inf"),
        ({"n_data": 1}, "n_data: .* got 1"),
        ({"n_init": 1}, "n_init: .* got 1"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        simulate_sharpbalance(**(BASE | {"k": 3, "rho": 0.1, "s": 10, "n_data": 2, "n_init": 2} | change))


def test_bad_arguments_of_the_others():
    regression = Regression(**BASE, k=3, rho=0.1)
    for message, call in (
        ("i: .* got -1", lambda: phi(-1, 0, 0.01, 0.1, 2)),
        ("ratio: .* got 0", lambda: phi(1, 0, 0.01, 0.1, 0)),
        ("warmup: expected a whole number from 0 to 3, got 9", lambda: simulate_trained(regression, warmup=9)),
        ("members: .* got 1", lambda: simulate_trained(regression, members=1)),
        ("s: expected 1, .* got 3", lambda: simulate_trained(dataclasses.replace(regression, s=3))),
        ("eta: .* got 0", lambda: sam_bounds(**BASE | {"eta": 0}, k=3, rho=0.1)),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
