"""scripts/report.py: the verdicts, the signs of the claims, and the page."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import experiment, report, summarize
from tests import commands
from tests.test_ensemble import ROOT
from tests.test_summarize import SAM, write
from utils import claims
from utils.metrics import OOD_SCORES, crossed_interval
from utils.results import BOTH, METHODS, Ensemble, gap_between, interval_of, ood_name, p_value_of


def test_p_value():
    """Student's, by scipy; over images as well where they are given."""
    gaps = [0.3, 0.1, 0.7, 0.2]
    assert p_value_of(gaps) == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, rel=1e-6)
    assert p_value_of([0.2, -0.2, 0.1, -0.1]) == 1
    assert p_value_of([1.0, math.nan]) == 1
    # Ensembles that agree on a difference which three images of a thousand make.
    images = torch.zeros(1000)
    images[:3] = 1
    assert p_value_of([0.003, 0.003, 0.003]) < 1e-6
    assert p_value_of([images] * 3) == pytest.approx(stats.ttest_1samp(images, 0).pvalue, rel=1e-3)
    # Where one of them is not known by image, over ensembles.
    values = [images.mean().item(), 0.002, images.mean().item()]
    assert p_value_of([images, 0.002, images]) == p_value_of(values)


@pytest.mark.parametrize("shape", [(5,), (2, 50), (6, 50), (50, 2), (300, 2)])
def test_a_p_value_is_the_level_at_which_the_interval_ends_at_zero(shape):
    random = np.random.default_rng(len(shape))
    for _ in range(5):
        table = 0.2 + random.normal(size=shape) + random.normal(size=shape[-1])
        gaps = table.tolist() if len(shape) == 1 else list(torch.from_numpy(table))
        p = p_value_of(gaps)
        assert 0 < p < 1
        edges = interval_of(gaps, 1 - p)[1]
        assert min(map(abs, edges)) == pytest.approx(0, abs=1e-9)
    assert p_value_of([torch.zeros(shape[-1])] * 3) == p_value_of([0.0, 0.0]) == 1
    assert p_value_of([torch.ones(shape[-1])] * 3) == p_value_of([0.5, 0.5]) == 0


def test_a_difference_by_image_is_of_the_same_images():
    """Of other numbers of images, as corrupted sets may have, that of the means."""
    one, other, small = (Ensemble(Path(), "x", (1,), {"ensemble": value}) for value in (0.75, 0.5, 0.25))
    for ensemble, images in ((one, 4), (other, 4), (small, 1)):
        ensemble.by_sample = {"ensemble": torch.full((images,), ensemble.values["ensemble"])}
    assert gap_between(one, other, "ensemble").tolist() == [0.25] * 4
    assert gap_between(one, small, "ensemble") == 0.5
    assert gap_between(one, small, "eir") is None


def test_holm():
    """By Holm's own steps; alpha is shared out between the claims that are left."""
    assert claims.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert claims.holm([0.9, 0.5]) == [1.0, 1.0]
    random = np.random.default_rng(0)
    for _ in range(50):
        p_values, rejected = list(random.random(6) ** 3), set()
        for rank, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (6 - rank):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(claims.holm(p_values)) if p <= 0.05} == rejected


def test_verdict():
    assert claims.verdict([1.0, 1.1, 1.2], 0.04, 0.5) == "supported"
    assert claims.verdict([-1.0, -1.1, -1.2], 0.04, 0.5) == "contradicted"
    assert claims.verdict([1.0, 1.1, 1.2], 0.06, 0.5) == "undecided"
    # The 90 % interval of these is 0.09 +- 0.13.
    assert claims.verdict([0.1, 0.0, 0.2, 0.06], 0.6, 0.25) == "equivalent"
    assert claims.verdict([0.1, 0.0, 0.2, 0.06], 0.6, 0.15) == "undecided"
    assert claims.verdict([1.0, math.nan], 0.01, 1) == "undecided"


def test_a_decided_difference_may_be_of_no_interest():
    plain = claims.compare("A", "sam", "deep_ensemble", "ensemble", 0.5)
    gaps = {"1": 0.1, "2": 0.12, "3": 0.11, "4": 0.1}
    for factor, verdict in ((1, "supported, within the margin"), (-1, "contradicted, within the margin")):
        claim = plain._replace(gap=lambda measured, seeds, factor=factor: factor * gaps[seeds] / 100)
        (judged,) = claims.judge([claim], {}, list(gaps))
        assert (judged.verdict, judged.row[-1]) == (verdict, f"**{verdict}**")
    (judged,) = claims.judge([plain._replace(gap=lambda measured, seeds: gaps[seeds])], {}, list(gaps))
    assert judged.verdict == "supported"
    assert judged._replace(p=4e-5, corrected=4e-4).row[4:6] == ["<0.0001", "<0.001"]
    assert judged._replace(p=0.04, corrected=0.0).row[4:6] == ["0.0400", "0.000"]


def test_claims_have_the_sign_of_their_words():
    """Each is above 0 if it is right; numbers in which they are told apart."""
    names = ("ensemble", "corrupted_ensemble", "disagreement", "eir", "sharpness", "nll_calibrated")
    numbers = {
        "deep_ensemble": (0.80, 0.50, 0.30, 0.40, 3.0, 0.7),
        "sam_0.05": (0.82, 0.55, 0.20, 0.30, 2.0, 0.6),
        "sam_0.2": (0.70, 0.40, 0.10, 0.10, 1.0, 0.9),
        "sharpbalance": (0.85, 0.57, 0.22, 0.35, 1.5, 0.55),
        "sharpbalance_paper": (0.84, 0.60, 0.19, 0.33, 1.5, 0.62),
        "random": (0.86, 0.56, 0.25, 0.31, 1.5, 0.5),
    }
    measured = {
        method: {"11": Ensemble(Path(), method, (11,), dict(zip(names, values, strict=True)))}
        for method, values in numbers.items()
    }
    measured |= {"sam": measured["sam_0.05"], "sam_largest": measured["sam_0.2"]}
    for images in (False, True):
        if images:
            for found in measured.values():
                ensemble = found["11"]
                ensemble.by_sample = {
                    name: torch.full((4,), value, dtype=torch.float64)
                    for name, value in ensemble.values.items()
                    if name != "sharpness"
                }
        gaps = {claim.name: float(np.mean(np.asarray(claim.gap(measured, "11")))) for claim in report.CLAIMS}
        logs, rates = np.log([3, 2, 1]), np.array([0.3, 0.2, 0.1])
        assert gaps == pytest.approx(
            {
                "i": np.cov(logs, rates)[0, 1] / np.var(logs, ddof=1),
                "i, diversity": 0.20,
                "i, sharpness": math.log(3),
                "ii": 0.10,
                "iii, released": 0.02,
                "iii, paper": 0.05,
                "iv, corrupted": 0.03,
                "iv, clean": -0.01,
                "v, corrupted": 0.01,
                "v, diversity": -0.03,
                "vi, released": 0.02,
                "vi, paper": -0.01,
                "vii": 0.07,
            }
        )


def test_methods_have_one_name():
    assert list(claims.NAMES.values()) == [
        METHODS[key].name for key in ("deep_ensemble", "sam", "released", "paper", "random")
    ]
    assert claims.NAMES["sharpbalance"] == "SharpBalance (released)"
    assert claims.NAMES["sharpbalance_paper"] == "SharpBalance (paper)"


PLAN = {
    "jobs": 2,
    "chosen": {"rho": 0.1, "k": 0.5, "T_d": 5},
    "validation": {
        "deep ensemble": 0.45,
        "rho": {"0.1": 0.5, "0.2": 0.4},
        "k": {"0.3": 0.52, "0.5": 0.53},
        "T_d": {"2": 0.51, "5": 0.53},
    },
    "finished": True,
    "command": "python scripts/experiment.py nothing",
    "plan": {"file": "PLAN.md", "sha256": "digest of the plan"},
    "mislabelled": {"all": 0.2} | {f"{m}{s}": 0.25 for m in claims.NAMES for s in ("", "_size")},
}


@pytest.fixture
def results(tmp_path):
    """Result files in which SharpBalance is better than SAM by one point, and SAM than a deep ensemble by 0.4 to 3."""
    methods = {"deep_ensemble": 0.0, "sam_0.1": 0.02, "sam_0.2": 0.01, "eoa": 0.0}
    methods |= {"sharpbalance": 0.03, "sharpbalance_paper": 0.02, "random": 0.02}
    folder = tmp_path / "noisy_labels"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    for i, seed in enumerate(("11", "21", "31")):
        for method, gain in methods.items():
            rho = float(method[4:]) if method[:4] == "sam_" else 0.1
            place, accuracy = (
                folder / "measurements" / f"{method}_{seed}",
                0.8 + gain + 0.01 * i * (method == "sam_0.1"),
            )
            write(place, SAM | {"rho": rho, "epochs": 9, "average_from": method}, (int(seed), 99), accuracy, 1.0 + gain)
            content = json.loads((place / "diversity.json").read_text())
            content["data"] |= {"train": 100, "val": 10, "sha256_of_corrupted": "c"}
            content["result"]["corrupted"] = {"mean": content["result"]["test"] | {"samples": 10.0}}
            content["experiment"] = {"plan": {"sha256": "digest in the measurements"}}
            (place / "diversity.json").write_text(json.dumps(content))
    return tmp_path


call = partial(commands.call, report)


def refused(folder, capsys):
    return commands.refusal(capsys, call, folder)


def test_report(results, capsys):
    call(results)
    assert capsys.readouterr().out == f"wrote {results / 'README.md'}\n"
    text = squeezed((results / "README.md").read_text())
    assert len(re.findall(r"\| \*\*\w+[^|]*\*\* \|", text)) == len(report.CLAIMS)
    # The first images are right: 166 of 200 by the released rule, 164 by the paper's.
    gaps = torch.zeros(3, 200)
    gaps[:, 164:166] = -1
    low, high = (100 * edge for edge in crossed_interval(gaps))
    claim = "| iv, clean | clean images: ensemble accuracy, SharpBalance (paper) - SharpBalance (released) |"
    assert f"{claim} -1.00 points | [{low:.2f}, {high:.2f}] | " in text
    # Over three ensembles: 0.01, 0 and -0.01.
    claim = "| iii, released | corrupted images: ensemble accuracy, SharpBalance (released) - SAM | +0.00 points |"
    assert f"{claim} [-2.48, 2.48] | 1.0000 | 1.000 | 1 points | **undecided** |" in text
    assert "| i, sharpness | logarithm of sharpness, deep ensemble - SAM with the largest rho | -0.010 |" in squeezed(
        text
    )
    edge = "(an end of what was tried)"
    assert (
        "validation: deep ensemble, all of them, 45.00 %; SAM, rho 0.1: 50.00 %, rho 0.2: 40.00 %, chosen 0.1 "
        + edge
        + "; SharpBalance "
        "(released) on the first seeds, k 0.3: 52.00 %, k 0.5: 53.00 %, chosen 0.5 "
        + edge
        + "; likewise, T_d 2: 51.00 %, "
        "T_d 5: 53.00 %, chosen 5 "
        + edge
        + ". An ensemble's accuracy of 53.00 % on 10 images has a standard error of 15.8 points, and less in "
        "differences on the same images; the best and the worst value that were tried are apart by 10.00 points for "
        "rho and 1.00 points for k and 2.00 points for T_d."
    ) in text
    assert (
        "within an adaptive l2 ball of radius 0.5, mean over 20 batches of 5 training images, by 'tight' in 7" in text
    )
    assert "SAM on random samples 25 %, 25.0 % of them with a wrong label. Of all, 20.0 % have one." in text
    assert "`python scripts/experiment.py nothing`, after PLAN.md (SHA-256 digest in the measurements) had been" in text
    assert "3 ensembles of 2 members by each method: digits, " in text
    assert ", 9 epochs, " in text
    assert "(2 corruptions at 2 severities); checkpoints 'best'. 2 single-thread processes on 2 cores" in text
    assert "(noisy_labels/tables.md)" in text
    for kind in report.FIGURES:  # of which only those that were drawn are shown
        assert f"(noisy_labels/{kind}.png)" not in text
        (results / "noisy_labels" / f"{kind}.png").touch()
    call(results)
    text = (results / "README.md").read_text()
    assert all(f"(noisy_labels/{kind}.png)" in text for kind in report.FIGURES)


@pytest.mark.parametrize(
    ("mean", "ensembles", "population", "said"),
    [
        (0.2, 5, BOTH, "5 (enough for the margin: what is there is smaller)"),
        (0.2, 6, BOTH, "6"),
        (0.2, None, BOTH, "more than 1000, or more test images"),
        (0.2, None, "ensembles", "more than 1000"),
        (math.nan, None, "ensembles", "unknown"),
    ],
)
def test_how_many_ensembles_are_said_to_do(mean, ensembles, population, said):
    claim = claims.compare("A", "sam", "deep_ensemble", "ensemble", 0.3)
    judged = claims.Judged(claim, mean, [0, 1], population, 0.1, 0.1, "undecided", ensembles, False)
    setting = report.Setting(Path(), {}, {"sam": dict.fromkeys(range(5))}, {"A": judged})
    assert report.undecided([setting])[1].splitlines()[-1].split("|")[-2].strip() == said


def power_of(number, margin, spread, level):
    """The probability that Student's test of normal differences finds a mean of the margin."""
    shift, edge = margin / spread * math.sqrt(number), stats.t.ppf(1 - level / 2, number - 1)
    return stats.nct.sf(edge, number - 1, shift) + stats.nct.cdf(-edge, number - 1, shift)


@pytest.mark.parametrize(("margin", "level"), [(0.3, 0.05), (0.5, 0.0025), (1.5, 0.05)])
def test_ensembles_needed(margin, level):
    """Against the power of Student's test, by the noncentral t distribution; the next smaller number has less."""
    gaps = [0.1, 0.5, -0.4, 0.2, 0.9]
    number = claims.ensembles_needed(gaps, margin, level)
    assert power_of(number, margin, np.std(gaps, ddof=1), level) == pytest.approx(0.8, abs=0.08)
    assert power_of(number - 1, margin, np.std(gaps, ddof=1), level) < 0.81
    assert claims.ensembles_needed(gaps, 0.01, level) is None
    assert claims.ensembles_needed([0.1, math.nan], margin, level) is None
    assert claims.ensembles_needed([0.1], margin, level) is None


def test_images_limit_what_ensembles_can_show():
    """Of differences by image, the images' own variance stays; without it, it is Student's number."""
    random = np.random.default_rng(0)
    of_images, of_ensembles = random.normal(size=400), random.normal(size=(5, 1)) / 4
    table = torch.from_numpy(of_images + of_ensembles + 0.5 * random.normal(size=(5, 400)))
    error = of_images.std() / 20  # of the mean over images, which no number of ensembles lessens
    assert claims.ensembles_needed(list(table), 2.7 * error, 0.05) is None
    number = claims.ensembles_needed(list(table), 4 * error, 0.05)
    means = table.mean(1).tolist()
    assert number > claims.ensembles_needed(means, 4 * error, 0.05)
    low, high = interval_of(list(table))[1]
    half = stats.t.ppf(0.975, number - 1) + stats.t.ppf(0.8, number - 1)
    assert half * math.hypot(error, np.std(means, ddof=1) / math.sqrt(number)) == pytest.approx(4 * error, rel=0.2)
    assert high - low > 2 * error
    # The same images right in all: residuals alone.
    same = torch.zeros(4, 100)
    same[torch.arange(4), torch.arange(4)] = 1
    assert claims.ensembles_needed(list(same), 0.03, 0.05) > 2


STUDY_PLAN = PLAN | {"claims": "study", "choose_on": 3, "choices_of": None}
STUDY_METHODS = {"deep_ensemble": 0.0, "sam_0.1": 0.02, "sam_0.2": 0.01, "late_sam": 0.02, "random": 0.02}
STUDY_METHODS |= {"sharpbalance": 0.1, "sharpbalance_paper": 0.01, "random_paper": 0.05, "sharpbalance_next": 0.02}


def write_setting(folder, noise, images, methods, **change):
    """A setting in which SharpBalance (released) is better than SAM by 8 points, and (paper) worse by 1."""
    folder.mkdir(parents=True)
    plan = STUDY_PLAN | {"measured": list(methods)} | change
    (folder / "plan.json").write_text(json.dumps(plan))
    for i, seed in enumerate(("11", "21", "31")):
        for method, gain in methods.items():
            rho = float(method[4:]) if method[:4] == "sam_" else 0.1
            place = folder / "measurements" / f"{method}_{seed}"
            settings = SAM | {"rho": rho, "epochs": 9, "average_from": method}
            write(place, settings, (int(seed), 99), 0.5 + gain + 0.005 * i, 1 + gain + rho)
            content = json.loads((place / "diversity.json").read_text())
            content["data"] |= {"train": images, "val": 10, "label_noise": noise}
            content["result"]["test"]["ensemble"]["calibrated"] = {"nll": 1 - gain + 0.001 * i, "ece": 0.1}
            content["passes"] = 2.0 if method == "sam_0.1" else 1.85
            content["experiment"] = {"asked": "a", "plan": {"sha256": "digest of the plan"}}
            (place / "diversity.json").write_text(json.dumps(content))


def test_the_map_says_what_its_columns_are(tmp_path, monkeypatch):
    saved = []
    write_setting(tmp_path / "b", 0.2, 1000, STUDY_METHODS)
    monkeypatch.setattr(report.plots, "save", lambda figure, path: saved.append(figure))
    call(tmp_path)
    text = " ".join(saved[0].texts[-1].get_text().split())
    assert "Columns: share of wrong labels (or data), number of training images. Blue: better" in text
    assert text.endswith("? undecided; empty: not compared.")


def test_a_study(tmp_path, capsys):
    """All settings on one page: the map, verdicts by family, advice with its cells, and what it would take."""
    fewer = {name: gain for name, gain in STUDY_METHODS.items() if name[:6] in ("deep_e", "sam_0.", "sharpb")}
    write_setting(tmp_path / "b", 0.2, 1000, STUDY_METHODS)
    clean = {"sharpbalance_size": 0.25, "sharpbalance_paper_size": 0.25}
    fewer = {name: gain for name, gain in fewer.items() if "next" not in name}
    write_setting(tmp_path / "a", 0, 4000, fewer, mislabelled=clean)
    write_setting(tmp_path / "c", 0.4, 1000, {}, finished=False)
    call(tmp_path)
    text = squeezed((tmp_path / "README.md").read_text())
    assert text.count("SHA-256 of the plan that the results name: digest of the plan.") == 2  # each setting its own
    assert "Not finished, and left out: c." in text
    assert (tmp_path / "map.png").exists()
    table = text.split("## Verdicts")[1].split("##")[0]
    columns = "| claim | | 20 % wrong labels, 1000 images | 0 % wrong labels, 4000 images |"
    assert columns in table
    what = "clean images: ensemble accuracy, SharpBalance (released)"
    assert f"| A1, released | {what} - SAM | +8.00 points, **supported** | +8.00 points, **supported** |" in table
    assert f"| A2, released | {what} - SAM on random samples | +8.00 points, **supported** | - |" in table
    assert "(paper) - SAM | -1.00 points, **undecided** |" in table  # 2 of 200 images
    for name in ("A4, late SAM", "A5, released", "N2, paper", "D2, released", "U1, paper"):
        assert f"| {name} |" in table
    assert "D2, paper" not in text  # which was not trained
    where = "20 % wrong labels, 1000 images and with 0 % wrong labels, 4000 images (+8.00 points"
    assert f"Against SAM:\n\n- accuracy, SharpBalance (released): better with {where}; A1, released)\n" in text
    before = "(+0.0800 nats; N2, released; before the temperature +0.0000 nats)\n"
    assert f"- calibrated NLL, SharpBalance (released): better with 20 % wrong labels, 1000 images {before}" in text
    assert "| 0 % wrong labels, 4000 images | rho 0.1, k 0.5, T_d 5 | 25 % | 25 % | 2.00 | 1.85 | 1.85 |" in text
    said = (
        "with 20 % wrong labels, 1000 images, it helps because of which samples it picks (A1, released supported and A2"
    )
    assert f"{said}, released supported)" in text
    (row,) = re.findall(r"\| 20 % wrong labels, 1000 images \| A1, paper \|.*", text)
    assert re.fullmatch(r".*\| -1.00 points \| \[.*\] \| 0.3 points \| more than 1000, or more test images \|", row)
    assert "| 0 % wrong labels, 4000 images | U1, released | none | - | 1 points | unknown |" in text
    # The families are corrected each for itself.
    primary = text.split("Primary claims:")[1].split("Secondary claims:")[0]
    p, corrected = (float(cell) for cell in re.findall(r"\| A1, paper .*", primary)[0].split("|")[5:7])
    assert corrected == pytest.approx(p, abs=1e-3)  # the larger of two

    (tmp_path / "a" / "plan.json").write_text(json.dumps(PLAN))
    assert f"{tmp_path / 'a'}: made without --claims study" in refused(tmp_path, capsys)
    (tmp_path / "a" / "plan.json").write_text(
        json.dumps(STUDY_PLAN | {"measured": ["deep_ensemble", "sam_0.1"], "jobs": None})
    )
    assert f"{tmp_path}: not experiments with the methods of the claims (" in refused(tmp_path, capsys)
    for folder in "ab":
        shutil.rmtree(tmp_path / folder)
    assert f"{tmp_path}: no setting is finished (c); run the same command again to go on" in refused(tmp_path, capsys)
    (tmp_path / "PLAN.md").write_text("of six settings, of which none has begun")
    assert "no setting is finished (c, noise_0_images_1000, noise_0.2_images_1000, " in refused(tmp_path, capsys)


@pytest.mark.parametrize("methods", ["sam_0.1 sharpbalance", "deep_ensemble sam_0.1"])
def test_a_study_of_few_methods(methods, tmp_path):
    """What they lack is left out: the curve over rho, panels of the map, and values that main.py chose."""
    few = {name: STUDY_METHODS[name] for name in methods.split()}
    write_setting(tmp_path / "b", 0.2, 1000, few, chosen={"rho": 0.1, "k": 0.5, "T_d": None})
    call(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ("](map.png)" in text) == (tmp_path / "map.png").exists()
    assert "likewise" not in text


def setting_of(verdicts, title="A", **plan):
    """A finished setting with these verdicts, without result files."""
    judged = {
        name: claims.Judged(claims.Claim(name, "", "", 1, None), 1.0, None, "", 1, 1, word, None, small)
        for name, (word, small) in verdicts.items()
    }
    return report.Setting(Path(), STUDY_PLAN | plan, {}, judged, title)


def test_advice():
    """It has every claim that is decided, beside the sizes of sets, and what the choice on validation means."""
    names = [claim.name for claim in report.PRIMARY + report.SECONDARY]
    equal = dict.fromkeys(names, ("equivalent", True))
    found = equal | {"N2, released": ("supported", False), "A6, late": ("contradicted", True)}
    found |= {"A3, SAM": ("undecided", False), "D2, paper": ("supported", False), "U1, paper": ("undecided", False)}
    text = "\n".join(report.advice([setting_of(found)]))
    for name in set(names) - {"U1, paper"}:
        assert text.count(name) == 1 + (name[:2] in ("A1", "N1")), name  # these twice, with what was said before
    assert "training?** Against a plain deep ensemble:\n\n- accuracy, SAM: undecided with A (+1.000; A3, SAM)\n" in text
    assert "- accuracy, SharpBalance (released): equivalent with A (+1.000; A3, released)\n" in text
    assert "- calibrated NLL, SharpBalance (released): better with A (+1.000; N2, released)\n" in text
    assert "in the last eighth of training: worse by less than the margin with A (+1.000; A6, late)\n" in text
    both = "with A, the rule changes nothing of interest (A1, {0} equivalent and N1, {0} equivalent)"
    said = f"plan says of such outcomes:** {both.format('released')}; {both.format('paper')}.\n"
    assert said in text
    assert "Supported or contradicted are 0 primary and 3 secondary claims." in text
    other = setting_of({"A3, SAM": ("supported", False)}, "B")
    other.judged["A3, SAM"] = other.judged["A3, SAM"]._replace(mean=2.0)
    two = "\n".join(report.advice([setting_of(found), other]))
    assert "- accuracy, SAM: better with B; undecided in 1 of 2 settings (+1.000 to +2.000; A3, SAM)\n" in two
    others = "; ".join(f"{name} {found[name][0]} with A" for name in names if name[:2] in ("A5", "D1", "D2", "U1"))
    assert f"table below these are not undecided: {others.replace('; U1, paper undecided with A', '')}." in text
    choice = "The choice of rho and k and T_d, on some of the ensembles that are compared, favours SAM and SharpBalance"
    assert f"{choice} (released) a little; the plan says how much." in text

    few = dict.fromkeys(("A1, released", "A3, SAM"), ("equivalent", True))
    of_others = {"validation": {}, "choices_of": "b", "plan": {}, "mislabelled": {}}
    text = "\n".join(report.advice([setting_of(few, **of_others)]))
    assert "Are fewer passes as good?" not in text
    assert "outcomes:** with A, neither SAM nor SharpBalance is worth its passes (A3, SAM equivalent).\n" in text
    assert "all are undecided." in text
    assert "favours" not in text
    assert "With A they are those of b, chosen on other networks." in text
    text = report.chosen_on([setting_of(few, plan={}, validation={"rho": {"0.1": 1, "0.2": 1}, "k": {"0.5": 1}})])
    assert "The choice of rho, on some of the ensembles that are compared, favours SAM a little. The other" in text


def test_claims_of_the_study_have_the_sign_of_their_words():
    """Each is above 0 where the method named first is better, or SAM's NLL larger; at the margins of the plan."""
    names = ("ensemble", "nll_calibrated", "disagreement", "sharpness", "auroc entropy digits")
    numbers = {
        "deep_ensemble": (0.80, 0.70, 0.30, 3.0, 0.90),
        "sam": (0.82, 0.65, 0.20, 2.0, 0.91),
        "late_sam": (0.81, 0.66, 0.25, 2.5, 0.92),
        "plain_start": (0.81, 0.61, 0.25, 2.5, 0.92),
        "late_sharpbalance": (0.80, 0.62, 0.25, 2.5, 0.92),
    }
    for i, name in enumerate(("sharpbalance", "sharpbalance_paper", "random", "random_paper")):
        numbers[name] = (0.83 + i / 100, 0.60 - i / 100, 0.21 + i / 100, 1.9, 0.93 + i / 100)
        numbers[f"{name}_next"] = (0.85 + i / 50, 0.60, 0.15 + i / 100, 1.5, 0.95)
    measured = {
        method: {"11": Ensemble(Path(), method, (11,), dict(zip(names, values, strict=True)))}
        for method, values in numbers.items()
    }
    for group in measured.values():
        group["21"] = group["11"]  # with which the jackknife's values are that of either
    found = {claim.name: claim.gap(measured, "11") for claim in report.PRIMARY + report.SECONDARY}
    assert found == pytest.approx(
        {
            **{"A1, released": 0.01, "A1, paper": 0.02, "A2, released": -0.02, "A2, paper": -0.02},
            **{"A3, released": 0.03, "A3, paper": 0.04, "A3, SAM": 0.02, "A4, late SAM": -0.01},
            **{"A5, released": 0.03, "A5, paper": 0.05, "N1, released": 0.05, "N1, paper": 0.06},
            **{"N2, released": -0.02, "N2, paper": -0.02, "N3, released": 0.10, "N3, paper": 0.11},
            # All are flatter than SAM, whose disagreement is 0.2.
            **{"D1, released": 0.01, "D1, paper": 0.02, "D2, released": -0.05, "D2, paper": -0.04},
            **{"U1, released": 0.02, "U1, paper": 0.03},
            **{"A6, plain start": -0.02, "A6, late": -0.03, "N4, plain start": -0.01, "N4, late": -0.02},
        }
    )


def test_disagreement_at_equal_sharpness():
    """By the textbook's jackknife of a curve that is followed by hand; beyond its ends, as is said, it is constant."""
    random = np.random.default_rng(0)
    sharpness = {
        "deep_ensemble": 4.0,
        "sam_0.05": 2.0,
        "sam_0.1": 1.0,
        "sharpbalance": 2.0**0.5,
        "sharpbalance_paper": 8,
    }
    values = {
        name: np.exp(0.1 * random.normal(size=(5, 2))) * [mean, 0.1 + 0.05 * mean] for name, mean in sharpness.items()
    }
    seeds = [str(seed) for seed in range(5)]
    measured = {
        name: {
            seed: Ensemble(Path(), name, (1,), {"sharpness": s, "disagreement": d})
            for seed, (s, d) in zip(seeds, rows, strict=True)
        }
        for name, rows in values.items()
    }
    measured |= {"sam": measured["sam_0.05"], "sam_largest": measured["sam_0.1"]}
    measured["sam_0.2"] = {"0": Ensemble(Path(), "sam", (1,), {"sharpness": 99, "disagreement": 0.9})}  # of some seeds

    def theta(rows):
        (s0, _), (s1, d1), (s2, d2), (s, d) = (values[n][list(rows)].mean(0) for n in list(sharpness)[:4])
        share = (math.log(s) - math.log(s2)) / (math.log(s1) - math.log(s2))
        assert s2 < s < s1 < s0
        return d - (d2 + share * (d1 - d2))

    without = np.array([theta([j for j in range(5) if j != i]) for i in range(5)])
    estimate = 5 * theta(range(5)) - 4 * without.mean()
    error = math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
    claim = claims.above_the_curve("D1", "sharpbalance")
    found = [claim.gap(measured, seed) for seed in seeds]
    assert np.mean(found) == pytest.approx(estimate, rel=1e-9)
    assert np.std(found, ddof=1) / math.sqrt(5) == pytest.approx(error, rel=1e-9)
    # Sharper than SGD: its disagreement less SGD's.
    gaps = [claims.above_the_curve("D1", "sharpbalance_paper").gap(measured, seed) for seed in seeds]
    assert gaps == pytest.approx(list(values["sharpbalance_paper"][:, 1] - values["deep_ensemble"][:, 1]))
    sides = [claims.beyond_the_curve(measured, name) for name in ("sharpbalance", "sharpbalance_paper", "sam_0.05")]
    assert sides == ["", "sharper", ""]
    for one in measured["sharpbalance"].values():
        one.values["sharpness"] = 0.1
    assert claims.beyond_the_curve(measured, "sharpbalance") == "flatter"
    measured["sharpbalance"]["0"].values["sharpness"] = math.inf
    assert math.isnan(claim.gap(measured, "1"))


def squeezed(text):
    return re.sub(" +", " ", text)


def test_one_value_that_was_chosen_without_others():
    plan = {"chosen": {"rho": 0.2, "k": 0.5, "T_d": 5}, "validation": {"k": {"0.3": 0.1, "0.5": 0.2, "0.7": 0.1}}}
    scores = "k 0.3: 10.00 %, k 0.5: 20.00 %, k 0.7: 10.00 %, chosen 0.5"
    assert report.choices(plan) == f"rho 0.2; SharpBalance (released) on the first seeds, {scores}; T_d 5"


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        (
            {"k": {"0.3": 0.9, "0.5": 0.8}, "T_d": {"2": 0.88, "5": 0.91}},
            (91, 400, "10.00 points for k and 3.00 points"),
        ),
        ({"k": {"0.3": 0.98, "0.50": 0.96, "0.7": 0.97}}, (96, 900, "2.00 points for k.")),
        ({"T_d": {"5": 0.5}}, None),
        ({}, None),
    ],
)
def test_the_standard_error_is_that_of_the_accuracy_found(tried, expected):
    text = report.chance({"chosen": {"rho": 0.2, "k": 0.5, "T_d": 5}, "validation": tried}, expected and expected[1])
    if expected is None:
        assert text == ""
    else:
        percent, images, apart = expected
        error = math.sqrt(percent * (100 - percent) / images)
        assert f"of {percent}.00 % on {images} images has a standard error of {error:.1f} points, " in text
        assert f"apart by {apart}" in text


def test_bad_results(results, tmp_path, capsys):
    folder = results / "noisy_labels"
    assert "expected folders with a plan.json; run scripts/experiment.py first" in refused(folder, capsys)
    for change in ({"chosen": {}}, {"chosen": {"rho": "x"}}, {"validation": 3}, {"jobs": None}):
        (folder / "plan.json").write_text(json.dumps(PLAN | change))
        assert f"{folder}: not an experiment with all methods of the claims (" in refused(results, capsys)
    (folder / "plan.json").write_text(json.dumps(PLAN | {"finished": False}))
    assert f"{folder}: not finished; run the same command of scripts/experiment.py again" in refused(results, capsys)
    (folder / "plan.json").write_text("{")
    assert "plan.json: cannot be read" in refused(results, capsys)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    shutil.rmtree(folder / "measurements" / "random_21")
    assert f"{folder}: expected the same two or more seeds for all methods" in refused(results, capsys)
    for place in (folder / "measurements").glob("random_*"):
        shutil.rmtree(place)
    assert "not an experiment with all methods of the claims ('random'); run" in refused(results, capsys)
    assert not (results / "README.md").exists()


def test_table_of_corruptions():
    """Means over severities and ensembles; no table without the numbers."""
    measured = {method: {} for method in ("deep_ensemble", "sam", "sharpbalance", "sharpbalance_paper", "random")}
    for i, method in enumerate(measured):
        for seeds, shift in (("11", 0.0), ("21", 0.1)):
            parts = {f"{name}-{s}": 0.1 * i + 0.02 * s + shift for s in (1, 3) for name in ("glass_blur", "fog")}
            parts = {name: {"rates": {"ensemble_accuracy": rate}} for name, rate in parts.items()}
            content = {"result": {"corrupted": {"parts": parts}}}
            measured[method][seeds] = Ensemble(Path(), method, (11,), content=content)
    text, table = report.by_corruption(measured)
    assert text.startswith("Ensemble accuracy in % under each corruption")
    header, _, glass, fog = table.splitlines()
    assert re.findall(r"[^|]+", squeezed(header)) == [
        " ",
        *(f" {name} " for name in [*claims.NAMES.values(), "SAM, 1", "SAM, 3"]),
    ]
    assert squeezed(glass) == "| glass blur | 9.0 | 19.0 | 29.0 | 39.0 | 49.0 | 17.0 | 21.0 |"
    assert squeezed(fog).startswith("| fog | 9.0 |")
    for ensemble in measured["sam"].values():
        ensemble.content["result"] = {}
    assert report.by_corruption(measured) == []


def test_table_of_uncertainty():
    """AUROC beside disagreement and sharpness; no table without other data."""
    measured = {method: {} for method in ("deep_ensemble", "sam", "sharpbalance", "sharpbalance_paper", "random")}
    sets = {"noise": 0.9, "digits": 0.7}
    for i, method in enumerate(measured):
        for seeds, shift in (("11", 0.0), ("21", 0.02)):
            content = {"result": {"test": {"ood": sets}}}
            ensemble = measured[method][seeds] = Ensemble(Path(), method, (11,), content=content)
            ensemble.values = {"sharpness": 2.0 - i / 10 + shift, "disagreement": 0.2 + shift}
            for of, value in sets.items():
                for score in OOD_SCORES:
                    column = torch.linspace(-0.1, 0.1, 40) + value + shift + i / 100
                    name = ood_name(of, score, "auroc")
                    ensemble.values[name], ensemble.by_sample[name] = column.mean().item(), column
    text, table = report.uncertainty(measured)
    assert text.startswith("What flatness does to uncertainty")
    header, _, *rows = map(squeezed, table.splitlines())
    assert re.findall(r"[^|]+", header)[1:] == [f" {name} " for name in claims.NAMES.values()]
    assert rows[0].startswith("| sharpness (worst, l2) | 2.0100 [1.8829, 2.1371] | 1.9100 [")
    assert rows[1].startswith("| disagreement % | 21.00 [")
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        f"AUROC %, {of}, {score}" for of in sets for score in OOD_SCORES.values()
    ]
    low, high = crossed_interval(
        torch.stack([one.by_sample["auroc energy digits"] for one in measured["sam"].values()])
    )
    assert f"| 72.00 [{100 * low:.2f}, {100 * high:.2f}] |" in rows[-1]
    for ensemble in measured["sam"].values():
        ensemble.values = {"sharpness": 1.0}
    assert report.uncertainty(measured) == []


PLANS = [file for file in ROOT.glob("results/*/*/plan.json") if json.loads(file.read_text())["finished"]]
SETTINGS = sorted(str(file.parent.relative_to(ROOT / "results")) for file in PLANS)


@pytest.mark.parametrize("place", ["fashion_mnist", "study"])
def test_the_report_in_the_repository_is_that_of_its_result_files(place, tmp_path):
    shutil.copytree(ROOT / "results" / place, tmp_path / "x", ignore=shutil.ignore_patterns("README.md"))
    call(tmp_path / "x")
    assert (tmp_path / "x/README.md").read_text() == (ROOT / "results" / place / "README.md").read_text()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_tables_in_the_repository_are_those_of_their_result_files(setting, tmp_path, monkeypatch):
    """By the command that draws an experiment again, apart from its figures, which depend on matplotlib's version."""
    place = Path("results") / setting
    shutil.copytree(ROOT / place, tmp_path / place, ignore=shutil.ignore_patterns("*.md", "*.png"))
    (tmp_path / "results/study").mkdir(exist_ok=True)
    shutil.copy(ROOT / "results/study/PLAN.md", tmp_path / "results/study")
    monkeypatch.chdir(tmp_path)

    def tables(words, *more):
        if words[0] == "scripts/summarize.py":
            summarize.main(summarize.parse_args(list(map(str, words[1:]))))

    monkeypatch.setattr(experiment, "run_script", tables)
    experiment.main(experiment.parse_args([setting, "--redraw"]))
    assert (place / "tables.md").read_text() == (ROOT / place / "tables.md").read_text()


def test_a_folder_of_any_name(results):
    """Its links are links, and its heading is one line."""
    name = "noisy |<labels>\n(a) %"
    (results / "noisy_labels").rename(results / name)
    call(results)
    text = (results / "README.md").read_text()
    assert r"## Noisy \|\<labels>\\n(a) %" in text.splitlines()
    assert r"[noisy \|\<labels>\\n(a) %/tables.md](noisy%20%7C%3Clabels%3E%0A%28a%29%20%25/tables.md)" in text
    (results / name / "tradeoff.png").touch()
    call(results)
    assert "(noisy%20%7C%3Clabels%3E%0A%28a%29%20%25/tradeoff.png)" in (results / "README.md").read_text()
