"""The settings at which both theorems are verified, the published values, and one call that simulates every setting.

The notebook and `scripts/plot.py theory` show the same rows. A row is a dict: the method, its settings (rho, k), the
theorem's quantities where a theorem applies (`variance_bound`, `sharpness_upper`, ...), the simulated ones (`variance`,
`variance_se`, ...), and the distance between the two in standard errors (`variance_z`, `upper_z`).
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from utils import theory

Row = dict[str, Any]

# The parameters behind figure 1(b), recovered by inverting the formulas. ||w*|| is the value that reproduces the
# points; the authors' notebook draws w* at random without a seed.
SETTING = {"n": 3000, "d": 150, "eta": 0.01, "rho0": 0.01, "sigma2": 0.1, "w_norm": 3.9215}
BLOCKS = 10
PUBLISHED_K = 5
PUBLISHED_RHO = {
    "sam": np.linspace(0.235, 0.223, 50)[::3].tolist(),
    "sharpbalance": np.linspace(1.5, 0.01, 50)[::3].tolist(),
}
# Figure 1(b) of the paper, from the coordinates of its vector graphic: sharpness and variance of SAM's points, then
# those of SharpBalance's.
_FIGURE_1B = (
    (0.7841, 0.04812, 0.5085, 0.05918),
    (0.7650, 0.04579, 0.5169, 0.05979),
    (0.7462, 0.04356, 0.5257, 0.06044),
    (0.7278, 0.04143, 0.5349, 0.06112),
    (0.7098, 0.03939, 0.5448, 0.06186),
    (0.6921, 0.03744, 0.5551, 0.06266),
    (0.6748, 0.03558, 0.5661, 0.06353),
    (0.6578, 0.03381, 0.5777, 0.06448),
    (0.6412, 0.03211, 0.5900, 0.06553),
    (0.6249, 0.03049, 0.6031, 0.06670),
    (0.6090, 0.02895, 0.6170, 0.06803),
    (0.5934, 0.02748, 0.6317, 0.06953),
    (0.5781, 0.02607, 0.6474, 0.07124),
    (0.5631, 0.02473, 0.6641, 0.07322),
    (0.5484, 0.02345, 0.6818, 0.07550),
    (0.5341, 0.02224, 0.7007, 0.07817),
    (0.5201, 0.02108, 0.7208, 0.08128),
)
PUBLISHED_POINTS = {"sam": [row[:2] for row in _FIGURE_1B], "sharpbalance": [row[2:] for row in _FIGURE_1B]}
# The ends of the three simulations that the authors' notebook prints: method, k, rho, sharpness, variance.
PUBLISHED_RUNS = [
    ("sam", 3, 0.5, 11.36, 14.55),
    ("sam", 3, 0.3, 1.65, 0.232),
    ("sharpbalance", 5, 1.0, 0.503, 0.0617),
    ("sharpbalance", 5, 0.4, 0.589, 0.0705),
    ("sharpbalance", 1, 0.4, 0.697, 0.0905),
    ("sharpbalance", 14, 0.4, 0.427, 0.0510),
]

# The simulated grids: method, rho and k, all stable. rho = 0 on all rows is the deep ensemble: gradient descent.
GRIDS: dict[str, tuple[str, list[float], list[int]]] = {
    "theorem_1_rho": ("sam", [0.0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.18], [1, 2, 3, 5]),
    "theorem_1_k": ("sam", [0.0, 0.08, 0.16], [1, 2, 3, 4, 5, 6, 7, 8]),
    "theorem_2_rho": ("sharpbalance", [0.05, 0.5, 1.0, 1.5, 3.0, 5.0], [1, 3, 9]),
    "theorem_2_k": ("sharpbalance", [0.1, 0.5, 1.5], [1, 2, 3, 5, 8, 11, 14]),
    "tradeoff_deep_ensemble": ("deep_ensemble", [0.0], [1, 2, 3, 4, 5, 6, 7, 8]),
    "tradeoff_sam": ("sam", [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14], [1, 2, 3]),
    "tradeoff_blocks": ("sharpbalance", [0.0], [3, 9, 18, 30, 50]),
    "tradeoff_sharpbalance": ("sharpbalance", [0.0, 0.5, 1.5, 3.0, 5.0], [3, 9, 30]),
}
# The algorithm as it is trained, on the same regression: which rows get SAM in the second half of the steps. The share
# of "random" is between those of the two partitions, 0.78 (released) and 0.72 (paper).
TRAINED_K = 4
TRAINED_RHO = [0.0, 0.03, 0.06, 0.09, 0.12, 0.15]
TRAINED: dict[str, dict[str, Any]] = {
    "sam": {"flat_ratio": 1.0, "unselected": "normal"},
    "released": {"flat_ratio": 0.5, "select": "flattest", "unselected": "one"},
    "paper": {"flat_ratio": 0.5, "select": "sharpest", "unselected": "normal"},
    "random": {"flat_ratio": 0.75, "select": "random", "unselected": "normal"},
}


# The matrices are small: more threads gain nothing on an idle machine, take ten times as long on a busy one, and change
# the order of sums.
@threadpool_limits.wrap(limits=1, user_api="blas")
def simulate_all(data_sets: int = 20, progress: Callable[[list], Iterable] = iter) -> dict[str, list[Row]]:
    """Simulate every setting of `GRIDS` and `TRAINED`; the same call gives the same rows.

    Each setting of a grid has its own seed, so their errors are independent. The methods of "trained" share data and
    starts. Standard errors are over data sets.

    Args:
        data_sets: per setting, >= 2.
        progress: wraps the list of settings, for a progress bar such as tqdm.

    Returns:
        rows by the name of the grid, and "trained".
    """
    plan = [(name, method, rho, k) for name, (method, values, steps) in GRIDS.items() for k in steps for rho in values]
    plan += [("trained", method, rho, TRAINED_K) for method in TRAINED for rho in TRAINED_RHO]
    results: dict[str, list[Row]] = {}
    for seed, (name, method, rho, k) in enumerate(progress(plan)):
        row: Row = {"method": method, "rho": rho, "k": k}
        setting = SETTING | {"rho": rho, "k": k}
        if name == "trained":
            regression = theory.Regression(**setting)
            row |= theory.simulate_trained(regression, warmup=k // 2, n_data=data_sets, **TRAINED[method])
        elif method == "sharpbalance":
            row |= theory.simulate_sharpbalance(**setting, s=BLOCKS, n_data=data_sets, n_init=20, seed=seed)
        else:
            row |= theory.simulate_sam(**setting, n_data=data_sets, seed=seed)
        if name != "trained":
            row |= bounds(method, rho, k)
            row["variance_z"] = (row["variance"] - row["variance_bound"]) / row["variance_se"]
            row["upper_z"] = (row["sharpness"] - row["sharpness_upper"]) / row["sharpness_se"]
            row["tightness"] = row["sharpness_upper"] / row["sharpness"]
        results.setdefault(name, []).append(row)
    return results


def bounds(method: str, rho: float, k: int) -> Row:
    """Method, rho, k and the theorem of the method at `SETTING`, its variance as `variance_bound`.

    Divergent settings do not warn.
    """
    setting, blocks = SETTING | {"rho": rho, "k": k}, method == "sharpbalance"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SAM diverges")
        found = theory.sharpbalance_bounds(**setting, s=BLOCKS) if blocks else theory.sam_bounds(**setting)
    return {"method": method, "rho": rho, "k": k, "variance_bound": found.pop("variance")} | found


def published() -> dict[str, list[Row]]:
    """Figure 1(b) and the formulas: a row for each published point, by method, and SAM's formulas over rho as "curve".

    `published_sharpness` and `published_variance` are those of the point, rho is the recovered one, and the rest is
    that of `bounds`.
    """
    rows: dict[str, list[Row]] = {"sam": [], "sharpbalance": []}
    for method, points in PUBLISHED_POINTS.items():
        for rho, (x, y) in zip(PUBLISHED_RHO[method], points, strict=True):
            point = {"published_sharpness": x, "published_variance": y}
            rows[method].append(bounds(method, rho, PUBLISHED_K) | point)
    return rows | {"curve": [bounds("sam", rho, PUBLISHED_K) for rho in np.linspace(0, 0.24, 121).tolist()]}


def stable_limit(method: str) -> float:
    """The rho below which SAM converges at `SETTING`: on all rows, or on one block of SharpBalance."""
    regression = theory.Regression(**SETTING, rho=0, k=1, s=BLOCKS if method == "sharpbalance" else 1)
    return theory.largest_stable_rho(regression.eta, regression.largest_eigenvalue)


def at_sharpness(rows: list[Row], value: float, key: str = "sharpness") -> tuple[float, float]:
    """The highest variance that a method reaches at a given sharpness, over its k, and its standard error.

    Along rho at each k (along k if there is only one rho), as far as the sharpness falls, the logarithm of the variance
    and its relative error are interpolated linearly in the logarithm of the sharpness. NaN where no curve reaches the
    value.

    Args:
        rows: of one method.
        value: the sharpness.
        key: "sharpness", at the mean iterate, or "member_sharpness".
    """
    along, across = ("k", "rho") if len({row["rho"] for row in rows}) == 1 else ("rho", "k")
    found = []
    for level in {row[across] for row in rows}:
        curve = sorted((row for row in rows if row[across] == level), key=lambda row: row[along])
        rises = np.flatnonzero(np.append(np.diff([row[key] for row in curve]) >= 0, True))
        falling = curve[rises[0] :: -1]  # up to the first rise, in ascending order of sharpness
        x = np.log([row[key] for row in falling])
        if x[0] <= np.log(value) <= x[-1]:
            y = np.log([row["variance"] for row in falling])
            error = [row["variance_se"] / row["variance"] for row in falling]
            variance = float(np.exp(np.interp(np.log(value), x, y)))
            found.append((variance, variance * float(np.interp(np.log(value), x, error))))
    return max(found, default=(float("nan"), float("nan")))


def relative_to_sam(rows: list[Row]) -> list[Row]:
    """The variance of each trained ensemble over that of SAM at the same sharpness of a member.

    Rows with rho > 0 that SAM's curve covers, with `ratio` and `ratio_se`. The error treats the two variances as
    independent; they share their data, so it is conservative.
    """
    sam = [row for row in rows if row["method"] == "sam"]
    result = []
    for row in rows:
        variance, error = at_sharpness(sam, row["member_sharpness"], "member_sharpness")
        if row["method"] != "sam" and row["rho"] > 0 and not np.isnan(variance):
            ratio = row["variance"] / variance
            error = ratio * np.hypot(row["variance_se"] / row["variance"], error / variance)
            result.append(row | {"ratio": ratio, "ratio_se": float(error)})
    return result


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows as fixed-width text.

    Args:
        rows: to show.
        columns: the key of each column and its format, as in {"rho": "5.2f"}.
    """
    lines = [[f"{row[key]:{form}}" for key, form in columns.items()] for row in rows]
    width = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, width)) for line in [list(columns), *lines])
