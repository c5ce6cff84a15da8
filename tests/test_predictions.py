"""What is kept of earlier calls: numbers carry the versions of the code, the device and the commit that made them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import measure_diversity
import measure_diversity_variance
import measure_sharpness
import utils.landscape
import utils.metrics
import utils.ood
import utils.predictions
import utils.training
from models import create_model
from scripts import experiment
from tests.test_ensemble import ROOT
from tests.test_measure import SMALL, call, save_member
from tests.test_plots import SAM, make_run
from utils import InputError
from utils.data import ImageSet, Preprocessing
from utils.files import load_json, write_json
from utils.kept import FROM_LOGITS, VERSIONS, up_to_date

# By kind: the version that made these values, and the values. Where a change of the code turns one red, raise the
# version in utils.kept.VERSIONS and here, and put the new values in: what users have kept is then made anew.
GOLDEN = {
    "logits": (1, [-0.9752219, 8.624287, -3.611703, 16.18901]),
    "predict": (
        3,
        [
            *(0.99, 1.069151, 0.09013507, 0.2828968, 1.0, 0.0, 0.3342431, 0.0, 0.0, 0.0),
            *(0.1, 1.310314, 0.8016208, 0.3800999, 0.1095258, 1.10043, 0.2342431, 1.586411, 1.272719, 1.560766),
        ],
    ),
    "ood": (
        1,
        [
            *(0.7166667, 0.6992063, 0.8, 0.6666667, 0.6717593, 1.0, 0.4333333, 0.4233059, 1.0),
            *(0.8333333, 0.7867424, 0.5, 0.5285568, 1.0),
        ],
    ),
    "disagreement": (1, [0.7333333, 1.0, -0.2272727, 0.08018228]),
    "KL": (1, [0.296763, 0.06821408]),
    "CKA": (2, [-0.1534791, 0.09294971, -0.1010724, 0.05847727]),
    "variance": (2, [0.08018228, 1.171125, 1.409517]),
    "variance_mse": (1, [0.08018228, 0.8550756, 0.7748934, 0.08018228]),
    "variance_mse_c": (1, [0.08018228, 0.8550756, 0.7748934, 0.08018228]),
    "APGD_worst": (1, [0.06052725, 0.5825739]),
    "APGD_average": (2, [-0.0005183399, -0.0007242560]),
    "hessian_t": (1, [-2.291555]),
    "hessian_e": (1, [3.606485, 2.579615]),
    "fisher": (1, [11.62374]),
    "NTK": (1, [18.68568, 8.805599]),
    "along": (1, [1.468306, 1.489313, 1.873941, 1.173441, 1.280521, 1.97747]),
    "top": (1, [3.606485, 5.399128, 1.568549, 1.586411, 1.642028]),
    "between": (1, [1.586411, 1.277153, 1.272719]),
}


def images():
    random = np.random.RandomState(0)
    pixels, labels = random.randint(0, 256, (10, 8, 8, 1)).astype(np.uint8), random.randint(0, 3, 10)
    return ImageSet(pixels, labels.astype(np.int64), Preprocessing((0.5,), (0.25,), 0, False))


def network(seed):
    """Smooth, and with weights that no generator of torch draws."""
    model, random = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)),
        np.random.RandomState(seed),
    )
    for weight in model.parameters():
        weight.data = torch.from_numpy(random.normal(0, 0.3, weight.shape).astype(np.float32))
    return model.eval()


def logits_of_a_resnet():
    model, random = create_model("resnet18", 3, 2, 8, 1).eval(), np.random.RandomState(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = random.normal(0, 0.3, tensor.shape) + ("var" in name or tensor.ndim == 1)
            tensor.copy_(torch.from_numpy(np.abs(drawn) if "var" in name else drawn))
    logits, features = utils.training.predict(model, images(), True)
    return [*logits[0].tolist(), features.mean().item()]


def logits_of_three():
    return torch.stack([utils.training.predict(network(seed), images())[0] for seed in (1, 2, 3)])


def diversity(mode):
    args = measure_diversity.parse_args(["--resume", "x", "--mode", mode, "--bins", "5"])
    logits, labels = logits_of_three(), images().labels
    temperatures = measure_diversity.fit_temperatures(torch.log_softmax(logits.double(), 2), labels, "probs")
    row, columns, gaps = measure_diversity.measure_part(args, logits, labels, list(logits), temperatures)
    part = utils.predictions.Part("test", list)
    found = {"test": measure_diversity.PartResult(row, columns, measure_diversity.resample(1, columns, gaps))}
    found = measure_diversity.summarize([part], found, len(logits))
    ensemble = found.get("ensemble", {})
    reliability = found.get("reliability", {}).get("after", {})
    return {
        "predict": lambda: [
            *(found["rates"][name] for name in ("aurc", "entropy", "mutual_information")),
            *(found["excess_aurc"], found["risk_at_percent"][49], *reliability["confidence"]),
            *(ensemble[name] for name in ("accuracy", "nll", "brier", "ece", "calibration_mse")),
            *(ensemble["calibrated"][name] for name in ("nll", "ece")),
            *(member["nll"] for member in found["members"]),
        ],
        "disagreement": lambda: [
            found["disagreement"]["mean"],
            *map(found.get, ("der", "eir", "variance_of_probabilities")),
        ],
        "KL": lambda: [found["kl"]["mean"], found["jensen_shannon"]["mean"]],
        "CKA": lambda: [found["cka"][of][form]["mean"] for of in found["cka"] for form in ("debiased", "biased")],
    }[mode]()


def out_of_distribution():
    """The ten images against the negatives of the first six."""
    logits, negatives = logits_of_three(), images()
    negatives.images = 255 - negatives.images
    others = torch.stack([utils.training.predict(network(seed), negatives)[0][:6] for seed in (1, 2, 3)])
    both = [utils.ood.scores(one, "probs") for one in (logits, others)]
    found = utils.ood.summarize([utils.ood.compare(*both, utils.ood.largest_scores(3, 3), False)], {})
    numbers = [found["scores"][score][name] for score in utils.metrics.OOD_SCORES for name in utils.metrics.OOD_METRICS]
    return [*numbers, *found["intervals_95"]["energy"]["aupr"]]


def sharpness(mode):
    """With a last batch that is smaller than the others."""
    words = ["--resume", "x", "--mode", mode, *SMALL, "--eval_batch_size", 4, "--batch_num", 3, "--rho0", 0.1]
    args = measure_sharpness.parse_args(list(map(str, words)))
    member = SimpleNamespace(model=network(1))
    parts = measure_sharpness.part_names(mode, ["l2", "linf"])
    rows = [measure_sharpness.measure(args, part, member, images()) for part in parts]
    more = {"hessian_e": lambda row: row["eigenvalues"][1:], "NTK": lambda row: [row["condition"]]}
    return [number for row in rows for number in (row["value"], *more.get(mode, lambda row: [])(row))]


def landscape(kind):
    batches, (a, b) = [images().batch(np.arange(10))], (network(1), network(2))
    if kind == "along":
        return [losses[i] for losses in utils.landscape.along_random(a, batches) for i in (0, 5, 16)]
    if kind == "top":
        top = utils.landscape.along_top(a, batches)
        return [top["eigenvalue"], top["length"], *top["losses"][::8]]
    return utils.landscape.losses_between(a, b, [0.0, 0.25, 1.0], batches, batches)


def numbers_of(kind):
    if kind == "logits":
        return logits_of_a_resnet()
    if kind == "ood":
        return out_of_distribution()
    if kind.startswith("variance"):
        return [*measure_diversity_variance.decompose(logits_of_three(), images().labels, {kind}).values()]
    measured = diversity if kind in FROM_LOGITS else landscape if kind in ("along", "top", "between") else sharpness
    return measured(kind)


@pytest.mark.parametrize("kind", VERSIONS)
def test_numbers_change_with_their_version_only(kind):
    version, expected = GOLDEN[kind]
    assert numbers_of(kind) == pytest.approx(expected, rel=2e-4, abs=1e-6), "raise its version, see GOLDEN"
    assert VERSIONS[kind] == version


@pytest.fixture
def members(tmp_path, monkeypatch):
    """Two checkpoints in the current folder, and what `environment` says, which a test may change."""
    monkeypatch.chdir(tmp_path)
    here = utils.predictions.environment(torch.device("cpu")) | {"commit": "first"}
    for module in (utils.predictions, utils.landscape):
        monkeypatch.setattr(module, "environment", lambda device: dict(here))
    return [save_member(tmp_path / f"{seed}.pth.tar", seed) for seed in (3, 5)], here


def watch(monkeypatch, module, name, of=lambda *args, **kwargs: None):
    """The calls of a function, which works as before; `of` is what is noted of each."""
    calls, original = [], getattr(module, name)

    def watched(*args, **kwargs):
        calls.append(of(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return calls


def by_another_version(kind, here, monkeypatch):
    before = VERSIONS[kind]
    monkeypatch.setitem(VERSIONS, kind, before + 1)
    return f"by version {before} of {kind}, which is now {before + 1}"


def on_another_device(kind, here, monkeypatch):
    here["device"] = "NVIDIA X"
    return "on another device (cpu)"


CHANGES = [by_another_version, on_another_device]


@pytest.mark.parametrize("change", CHANGES)
def test_logits_of_other_code_or_another_device_are_made_anew(change, members, monkeypatch, capsys):
    paths, here = members
    common = ["--resume", *paths, "--save", "m", "--bootstrap", 0, "--split", "test,val"]
    passes = watch(monkeypatch, utils.predictions, "predict")
    first = call("diversity", *common, "--mode", "predict")
    assert len(passes) == 4
    assert first["made_by"]["val"]["predict"] == {
        "versions": {"logits": 1, "predict": VERSIONS["predict"]},
        "device": "cpu",
        "commit": "first",
        "commits_of_logits": ["first"],
    }
    # Other code of the same versions: the numbers are new ones, from the logits of before.
    here["commit"] = "second"
    made = call("diversity", *common, "--mode", "KL")["made_by"]
    assert len(passes) == 4
    assert "note" not in capsys.readouterr().err
    assert made["test"]["predict"] == first["made_by"]["test"]["predict"]
    assert (made["test"]["KL"]["commit"], made["test"]["KL"]["commits_of_logits"]) == ("second", ["first"])
    why = change("logits", here, monkeypatch)
    found = call("diversity", *common, "--mode", "predict")
    assert len(passes) == 8
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if f"test.npz: logits made {why}; they and" in line or "val.npz" in line]) == 1
    assert [line for line in lines if "replaces" in line] == [
        f"note: m/diversity.json: replaces what was measured {why}"
    ]
    assert "kl" not in found["result"]["test"]
    assert found["made_by"]["test"]["predict"]["commits_of_logits"] == ["second"]
    assert call("diversity", *common, "--mode", "predict") == found
    assert capsys.readouterr().err == ""


def test_only_the_same_versions_are_the_same():
    """Not one that is missing from a record, and not a newer one."""
    here = {"device": "cpu", "commit": "x"}
    record = utils.predictions.made_by("predict", here)
    assert utils.predictions.why_stale("predict", record, here) is None
    for name in ("logits", "predict"):
        versions, now = record["versions"], VERSIONS[name]
        for change, was in (({}, "None"), ({name: now - 1}, now - 1), ({name: now + 1}, now + 1)):
            other = {k: v for k, v in versions.items() if k != name} | change
            why = utils.predictions.why_stale("predict", record | {"versions": other}, here)
            assert why == f"by version {was} of {name}, which is now {now}"


@pytest.mark.parametrize("entry", [None, np.array("3"), np.array('{"weights": 1}'), np.zeros(3), np.array("{")])
def test_caches_of_earlier_versions(entry, members, capsys):
    """They name no version, or are damaged."""
    common = ["--resume", members[0][0], "--save", "m", "--mode", "predict", "--split", "val", "--bootstrap", 0]
    first = call("diversity", *common)
    (cache,) = members[0][0].parent.glob("m/predictions/*/val.npz")
    with np.load(cache) as file:
        arrays = {name: file[name] for name in ("about", "logits")}
    about = np.array(arrays["about"].item().replace('"versions"', '"form"'))
    np.savez(cache, **(arrays | {"about": about if entry is None else entry}))
    assert call("diversity", *common)["result"] == first["result"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("by a version of logits that is not recorded" if entry is None else "by other weights") in error


def test_modes_that_an_earlier_version_measured_are_not_kept(members, capsys):
    common = ["--resume", *members[0], "--save", "m"]
    for script, first, second in (("diversity", "KL", "predict"), ("variance", "variance", "variance_mse")):
        more = ["--bootstrap", 0, "--split", "val"] if script == "diversity" else []
        before = call(script, *common, "--mode", first, *more)
        del before["made_by"]
        write_json(f"m/{script}.json", before)
        result = call(script, *common, "--mode", second, *more)["result"]
        assert f"replaces what was measured by a version of {second} that is not recorded" in capsys.readouterr().err
        assert not {"kl", "variance_of_logits"} & result["val" if script == "diversity" else "test"].keys()
        for damage in (3, {"val": 3}, {"val": {second: 3}}, {"val": {"of_tomorrow": {"versions": {}}}}):
            write_json(f"m/{script}.json", before | {"made_by": damage})
            result = call(script, *common, "--mode", second, *more)["result"]
            assert not {"kl", "variance_of_logits"} & result["val" if script == "diversity" else "test"].keys()


@pytest.mark.parametrize("split", ["test", "val"])
def test_one_split_of_another_version_is_enough(split, members, capsys):
    common = ["--resume", *members[0], "--save", "m", "--bootstrap", 0, "--split"]
    content = call("diversity", *common, "test,val", "--mode", "predict")
    content["made_by"][split]["predict"]["versions"]["predict"] = 0
    write_json("m/diversity.json", content)
    result = call("diversity", *common, "test", "--mode", "KL")["result"]
    assert "replaces what was measured by version 0 of predict, which is now" in capsys.readouterr().err
    assert "val" not in result
    assert not {"ensemble", "members"} & result["test"].keys()


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_other_code_or_another_device_are_measured_anew(change, members, monkeypatch, capsys):
    paths, here = members
    common = ["--resume", *paths, "--save", "m", *SMALL]
    measured = watch(monkeypatch, measure_sharpness, "measure", lambda args, name, *rest: name)
    first = call("sharpness", *common, "--mode", "fisher,hessian_t")["result"]
    made = {"versions": {"fisher": 1}, "device": "cpu", "commit": "first"}
    assert all(row.items() >= made.items() for row in first["fisher"]["members"])
    here["commit"] = "second"
    content = call("sharpness", *common, "--mode", "fisher")
    assert (content["environment"]["commit"], len(measured)) == ("second", 4)
    assert content["result"] == first  # with the commit that measured it
    # What is not asked for is left out, what is asked for is made anew: each in one line.
    why = change("fisher", here, monkeypatch)
    result = call("sharpness", *common, "--mode", "hessian_t")["result"]
    assert "fisher" not in result
    left = capsys.readouterr().err
    assert left.count("left out of sharpness.json") == 1
    assert f"fisher: left out of sharpness.json, since fisher was measured {why}; measure by --mode fisher" in left
    measured.clear()
    result = call("sharpness", *common, "--mode", "fisher")["result"]
    assert measured == ["fisher", "fisher"]
    error = capsys.readouterr().err
    assert error.count("note: m/sharpness/") == 1
    assert f"fisher.json: measured {why}; measured anew (2 such parts)" in error
    assert result["fisher"]["mean"] == first["fisher"]["mean"]
    assert all(row["commit"] == "second" for row in result["fisher"]["members"])
    assert "hessian_t" in result


def test_parts_of_earlier_versions_are_measured_anew(members, monkeypatch, capsys):
    """They name no version, in the files of the parts and in sharpness.json."""
    common = ["--resume", members[0][0], "--save", "m", *SMALL]
    first = call("sharpness", *common, "--mode", "fisher,hessian_t")
    for path in [*members[0][0].parent.glob("m/sharpness/*/*.json"), members[0][0].parent / "m/sharpness.json"]:
        content = load_json(path)
        rows = [content["result"]] if "about" in content else [content["result"][k]["members"][0] for k in KEPT]
        for row in rows:
            del row["versions"], row["device"], row["commit"]
        write_json(path, content)
    measured = watch(monkeypatch, measure_sharpness, "measure", lambda args, name, *rest: name)
    content = call("sharpness", *common, "--mode", "fisher")
    assert measured == ["fisher"]
    assert "hessian_t" not in content["result"]
    error = capsys.readouterr().err
    assert "fisher.json: measured by a version of fisher that is not recorded" in error
    assert "hessian_t: left out of sharpness.json, since hessian_t was measured by a version of hessian_t that" in error
    again = call("sharpness", *common, "--mode", "hessian_t")["result"]
    assert {name: again[name]["mean"] for name in KEPT} == {name: first["result"][name]["mean"] for name in KEPT}


KEPT = ("fisher", "hessian_t")


@pytest.mark.parametrize("damage", [3, "ab", {"along": 3}, {"top": "abc"}])
def test_damaged_records_of_curves(damage, tmp_path):
    content = load_json(ROOT / "results/digits/landscape.json")
    content["runs"][1]["made_by"] = damage
    write_json(tmp_path / "x.json", content)
    with pytest.raises(InputError, match="not the numbers of a landscape"):
        utils.landscape.read_landscape(tmp_path / "x.json")


@pytest.mark.parametrize("change", [*CHANGES, None])
def test_curves_of_other_code_or_another_device_are_computed_anew(change, members, tmp_path, monkeypatch, capsys):
    for name, steps in (("ALONG", [-0.5, 0.0]), ("BETWEEN", [0.0, 1.0]), ("TOP", [0.0, 0.01])):
        monkeypatch.setattr(utils.landscape, name, steps)
    folders, path, here = [make_run(tmp_path / "sam", SAM, checkpoints=True)], tmp_path / "x.json", members[1]
    utils.landscape.compute_landscape(folders, path)
    first = load_json(path)
    computed = [watch(monkeypatch, utils.landscape, name) for name in ("along_random", "along_top", "losses_between")]
    here["commit"] = "second"
    utils.landscape.compute_landscape(folders, path)
    assert (load_json(path), sum(map(len, computed)), capsys.readouterr().err) == (first, 0, "")
    if change is None:  # a file of an earlier version
        why, content = "by a version of along that is not recorded", load_json(path)
        del content["runs"][0]["made_by"]
        write_json(path, content)
    else:
        why = change("along", here, monkeypatch)
    utils.landscape.compute_landscape(folders, path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    expected = [2, 0, 0] if change is by_another_version else [2, 2, 1]
    assert f"note: {path}: along was computed {why}; computed anew ({sum(expected)} such curves)" in error
    assert [len(calls) for calls in computed] == expected
    row = load_json(path)["runs"][0]
    assert {record["commit"] for record in row["made_by"]["along"].values()} == {"second"}
    assert {name: row[name] for name in ("along", "top", "between")} == {
        name: first["runs"][0][name] for name in ("along", "top", "between")
    }


def test_versions_at_any_depth():
    """A result is up to date if all numbers in it are; what names no version is of this one."""
    now = {kind: VERSIONS[kind] for kind in ("logits", "predict")}
    content = {"result": [{"versions": now}, 3, None], "made_by": {"test": {"predict": {"versions": dict(now)}}}}
    assert up_to_date(content)
    assert up_to_date({"versions": None})
    content["made_by"]["test"]["predict"]["versions"]["predict"] -= 1
    assert not up_to_date(content)
    content["made_by"]["test"]["predict"]["versions"] = now
    assert up_to_date(content)
    content["result"].append({"of": {"versions": {"unknown": 1}}})
    assert not up_to_date([content])


def test_weights_and_versions_say_what_is_measured_not_times(tmp_path, monkeypatch):
    """Of an experiment: a result of other weights, or of other code, is not one of this run, however new it is."""
    words = ["digits", "--data_path", tmp_path, "--runs", tmp_path, "--measurements", tmp_path / "m"]
    place = experiment.Experiment(experiment.parse_args(list(map(str, words))))
    source, folder = tmp_path / "run", tmp_path / "m" / "sam_11"
    weights = source / "seed_1" / "model_best.pth.tar"
    for file in (weights, folder / "diversity.json", folder / "sharpness.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("first")
    monkeypatch.setattr(experiment, "run_script", lambda *args: None)

    def job():
        return place.measuring("sam", source, folder, "test")

    job().work()
    assert job().done()
    weights.write_text("first")  # later, but the same
    assert job().done()
    for file in (weights, folder / "sharpness.json"):
        file.write_text("other")
        assert not job().done()
        file.write_text("first")
        assert job().done()
    monkeypatch.setitem(VERSIONS, "APGD_worst", 7)
    assert not job().done()
