"""The measuring scripts and the predictions they share, from checkpoint files to result files."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import measure_diversity
import measure_diversity_variance
import measure_sharpness
import utils.diversity
import utils.landscape
import utils.metrics
import utils.predictions
from models import create_model
from tests import files, reference
from tests.commands import refusal
from utils import cli
from utils.checkpoint import load_model, save_checkpoint
from utils.datasets import CORRUPTIONS, load_data
from utils.metrics import bootstrap_counts, calibration_mse, unpack_counts, unpack_values
from utils.sharpness import NORMS, worst_case_sharpness

SCRIPTS = {
    "diversity": measure_diversity,
    "variance": measure_diversity_variance,
    "sharpness": measure_sharpness,
}
SMALL = ["--eval_batch_size", 5, "--batch_num", 2, "--n_iters", 2, "--n_draws", 4, "--hessian_samples", 40]
SMALL += ["--probes", 6, "--top_k", 2, "--ntk_samples", 6]


def save_member(path, seed, data="digits", classes=10, width=2, size=8, channels=1, model="resnet18", change=None):
    """A checkpoint of a network with random weights and statistics."""
    torch.manual_seed(seed)
    network = reference.randomize_batch_norm(create_model(model, classes, width, size, channels))
    if change is not None:
        with torch.no_grad():
            change(network)
    about = {"model": model, "dataset": data, "width": width, "num_classes": classes, "image_size": size}
    path.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    save_checkpoint(path, {"state_dict": state, "epoch": 1, "seed": seed, "in_channels": channels} | about)
    return path


def save_corrupted(folder, images=30, corruptions=CORRUPTIONS, size=8, channels=1, classes=10):
    """Random pictures in the layout of CIFAR-10-C."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in corruptions:
        np.save(folder / f"{name}.npy", random.integers(0, 256, (5 * images, size, size, channels), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(random.integers(0, classes, images), 5))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three members, and a corrupted set of the digits."""
    folder = tmp_path_factory.mktemp("saved")
    paths = [save_member(folder / f"seed_{seed}" / "model_best.pth.tar", seed) for seed in (3, 5, 8)]
    save_corrupted(folder / "data" / "digits-C")
    return folder, paths


def call(name, *argv):
    """What `python measure_<name>.py ...` does, in this process; the result file."""
    args = SCRIPTS[name].parse_args([str(word) for word in argv])
    cli.run(SCRIPTS[name].main, args)
    found = [args.save / f"{name}.json"] if args.save else list(Path("measurements").glob(f"*/{name}.json"))
    return json.loads(found[0].read_text()) if found and found[0].exists() else None


def refused(capsys, name, *argv):
    return refusal(capsys, call, name, *argv)


def no_pass(*args, **kwargs):
    raise AssertionError("a forward pass where the cache holds its result")


def outputs(paths, images):
    """Softmax in float64, one image at a time for each member."""
    probs = []
    for path in paths:
        model, _ = load_model(path)
        with torch.no_grad():
            logits = torch.cat([model(images.batch(np.array([i]))[0]) for i in range(len(images))])
        probs.append(torch.softmax(logits.double(), dim=1))
    return torch.stack(probs)


def values_by_image(members, labels, temperature):
    """NLL before and after a temperature, Brier score, entropy and mutual information, of [M, N, C]: [N] each."""
    probs = members.mean(dim=0)
    images, onehot = range(len(labels)), torch.nn.functional.one_hot(labels, probs.shape[1])
    cooled = torch.softmax(probs.log() / temperature, dim=1)
    nll, calibrated = (-p[images, labels].log() for p in (probs, cooled))
    brier = (probs - onehot).square().sum(dim=1)
    entropy, single = (-(p * p.log()).sum(dim=-1) for p in (probs, members))
    found = {"ensemble_nll": nll, "ensemble_nll_calibrated": calibrated, "ensemble_brier": brier, "entropy": entropy}
    return found | {"mutual_information": entropy - single.mean(dim=0)}


def test_diversity_equals_the_slow_forms(saved, tmp_path):
    paths = saved[1]
    result = call("diversity", "--resume", *paths, "--data_path", tmp_path, "--save", tmp_path / "m")["result"]
    images = load_data("digits", tmp_path).test
    probs, labels = outputs(paths, images), images.labels
    test = result["test"]
    for row, member in zip(test["members"], probs, strict=True):
        assert row["accuracy"] == pytest.approx(reference.accuracy(member, labels), rel=1e-12)
        assert row["nll"] == pytest.approx(reference.nll(member, labels), rel=1e-5)
        assert row["brier"] == pytest.approx(reference.brier(member, labels), rel=1e-5)
        assert row["ece"] == pytest.approx(reference.ece(member, labels, 15), abs=2e-3)
    mean = probs.mean(dim=0)
    assert test["ensemble"]["accuracy"] == pytest.approx(reference.accuracy(mean, labels), rel=1e-12)
    assert test["ensemble"]["nll"] == pytest.approx(reference.nll(mean, labels), rel=1e-5)
    predictions = probs.argmax(dim=2)
    pairs = [(predictions[i] != predictions[j]).double().mean().item() for i, j in itertools.combinations(range(3), 2)]
    assert test["disagreement"]["mean"] == pytest.approx(np.mean(pairs), rel=1e-12)
    error = 1 - np.mean([reference.accuracy(member, labels) for member in probs])
    assert test["der"] == pytest.approx(np.mean(pairs) / error, rel=1e-12)
    gain = error - (1 - reference.accuracy(mean, labels))
    assert test["eir"] == pytest.approx(gain / error, rel=1e-9, abs=1e-12)
    assert test["variance_of_probabilities"] == pytest.approx(probs.var(dim=0).sum(dim=1).mean().item(), rel=1e-5)
    logs = probs.log()
    kl = np.mean([(probs[i] * (logs[i] - logs[j])).sum(1).mean() for i, j in itertools.permutations(range(3), 2)])
    assert test["kl"]["mean"] == pytest.approx(kl, rel=1e-4)
    # The whole ensemble is the last of its sizes; one member is the mean of the members.
    by_size = test["ensemble_by_size"]
    for name in ("accuracy", "nll", "brier", "ece"):
        assert by_size["3"][name] == pytest.approx(test["ensemble"][name], rel=1e-12)
    assert by_size["1"]["nll"] == pytest.approx(np.mean([row["nll"] for row in test["members"]]), rel=1e-12)
    by_size_two = test["disagreement_by_size"]["2"]
    assert test["disagreement_by_size"]["3"]["der"] == pytest.approx(test["der"], rel=1e-12)
    # The mean over subsets of an unbiased variance is the variance of all.
    for size in ("2", "3"):
        found = test["disagreement_by_size"][size]["variance_of_probabilities"]
        assert found == pytest.approx(test["variance_of_probabilities"], rel=1e-12)
    assert by_size_two["disagreement"] == pytest.approx(test["disagreement"]["mean"], rel=1e-12)
    two = [reference.nll((probs[i] + probs[j]) / 2, labels) for i, j in itertools.combinations(range(3), 2)]
    assert by_size["2"]["nll"] == pytest.approx(np.mean(two), rel=1e-5)
    for name in ("ensemble_accuracy", "ensemble_nll", "ensemble_ece", "disagreement", "der", "eir"):
        low, high = test["intervals_95"][name]
        assert low <= high
    for name in ("accuracy", "ece"):
        low, high = test["intervals_95"][f"ensemble_{name}"]
        assert low < test["ensemble"][name] < high
    counts = {name: unpack_counts(text) for name, text in test["right_of_samples"].items()}
    assert (counts["members"] == (predictions == labels).sum(dim=0).numpy()).all()
    assert (counts["ensemble"] == (mean.argmax(dim=1) == labels).numpy()).all()
    differ = sum((predictions[i] != predictions[j]).long() for i, j in itertools.combinations(range(3), 2))
    assert (counts["differing_pairs"] == differ.numpy()).all()
    values = {name: unpack_values(text) for name, text in test["values_of_samples"].items()}
    expected = values_by_image(probs, labels, result["temperatures"]["ensemble"])
    sizes = [f"ensemble_nll_calibrated_of_{size}" for size in (1, 2)]
    assert values.keys() == {*expected, "aurc", *sizes}
    assert values["aurc"].mean() == pytest.approx(test["rates"]["aurc"], rel=1e-3)
    by_size = test["calibrated_nll_by_size"]
    members = [row["calibrated"]["nll"] for row in test["members"]]
    assert by_size["1"] == pytest.approx(np.mean(members), rel=1e-9)
    assert by_size["3"] == pytest.approx(test["ensemble"]["calibrated"]["nll"], rel=1e-9)
    for name, size in zip(sizes, "12", strict=True):
        assert values[name].mean() == pytest.approx(test["calibrated_nll_by_size"][size], rel=1e-3)
    for name, column in expected.items():
        assert values[name] == pytest.approx(column.numpy(), rel=1e-3, abs=1e-4)
        assert test["rates"][name] == pytest.approx(column.mean().item(), rel=1e-5)
    calibrated = test["ensemble"]["calibrated"]
    assert calibrated["nll"] == pytest.approx(expected["ensemble_nll_calibrated"].mean().item(), rel=1e-5)
    cooled = torch.softmax(mean.log() / result["temperatures"]["ensemble"], dim=1)
    assert calibrated["brier"] == pytest.approx(reference.brier(cooled, labels), rel=1e-5)
    assert calibrated["ece"] == pytest.approx(reference.ece(cooled, labels, 15), abs=2e-3)
    # Temperatures were fitted on validation, where no other one is better.
    val = load_data("digits", tmp_path).val
    logits = outputs(paths, val)[0].log()
    best = result["temperatures"]["members"][0]
    nll = {t: reference.nll(torch.softmax(logits / t, dim=1), val.labels) for t in (best, best * 1.02, best / 1.02)}
    assert nll[best] == min(nll.values())


BROKEN = [
    ("metrics", "per_sample", "correct", "member accuracy"),
    ("metrics", "per_sample", "correct", "ensemble accuracy"),
    ("metrics", "per_sample", "nll", "ensemble  "),
    ("metrics", "per_sample", "brier", "ensemble  "),
    ("metrics", "expected_calibration_error", None, "ensemble  "),
    ("metrics", "risk_coverage", "aurc", "AURC of the ensemble"),
    ("metrics", "risk_coverage", "excess_aurc", "excess AURC"),
    ("metrics", "predictive_entropy", None, "entropy, nats"),
    ("metrics", "mutual_information", None, "mutual information, nats"),
    ("metrics", "out_of_distribution", "auroc", "maximum probability"),
    ("diversity", "disagreement", None, "disagreement"),
    ("diversity", "disagreement_error_ratio", None, "DER"),
    ("diversity", "ensemble_improvement_rate", None, "EIR"),
    ("diversity", "ensemble_variance", None, "variance of probabilities"),
    ("diversity", "pairwise_kl", None, "KL"),
    ("diversity", "pairwise_js", None, "Jensen-Shannon"),
    ("diversity", "linear_cka", None, "CKA of centred logits"),
]


@pytest.mark.parametrize(("module", "name", "column", "line"), BROKEN)
def test_what_is_printed_comes_from_the_tested_function(
    module, name, column, line, saved, tmp_path, monkeypatch, capsys
):
    """One function a number: if it is wrong, so is what the script prints."""
    common = ["--resume", *saved[1], "--save", tmp_path, "--data_path", tmp_path, "--mode", "all", "--bootstrap", 0]

    def printed():
        capsys.readouterr()
        call("diversity", *common)
        return next(text for text in capsys.readouterr().out.splitlines() if text.strip().startswith(line.strip()))

    before, owner = printed(), {"metrics": utils.metrics, "diversity": utils.diversity}[module]
    right = getattr(owner, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return 0.5 * result if column is None else result | {column: 0.5 * result[column]}

    monkeypatch.setattr(owner, name, wrong)
    assert printed() != before


def test_what_is_printed_says_over_what(saved, tmp_path, capsys):
    """Intervals and deviations; and of which output they are, where it is not the usual one."""
    folder, paths = saved
    common = ["--resume", *paths, "--save", tmp_path, "--data_path", folder / "data", "--mode", "disagreement,ood"]
    only = ["--corruptions", "fog", "--severities", 1, "--ood", "noise"]
    call("diversity", *common, *only, "--split", "test,val,corrupted", "--bootstrap", 20)
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if line.startswith("[ ]: ")]
    assert said == [
        "[ ]: 95 % interval over validation images, of these networks only",
        "[ ]: 95 % interval over test images, of these networks only",
        "[ ]: 95 % interval over test images and other images, of these networks only",
        "[ ]: 95 % interval over test images, of these networks and corruptions only",
    ]
    assert "logit" not in out
    call("diversity", *common[:-1], "disagreement", "--split", "test", "--bootstrap", 0, "--average", "logits")
    out = capsys.readouterr().out
    assert "\ntest (899 images; ensemble: softmax of the mean logit)\n" in out
    assert "[" not in out
    sharpness = [*SMALL, "--mode", "APGD_worst,fisher", "--norms", "l2", "--save", tmp_path, "--resume"]
    call("sharpness", *sharpness, *paths)
    *_, said, _ = capsys.readouterr().out.splitlines()
    assert said == "±: standard deviation over members"
    call("sharpness", *sharpness, paths[0])
    assert "±" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ensemble_variance", "bias_and_variance"])
def test_the_printed_variance_comes_from_the_tested_function(name, saved, tmp_path, monkeypatch, capsys):
    common = ["--resume", *saved[1], "--save", tmp_path, "--data_path", tmp_path]
    call("variance", *common)
    before, right = capsys.readouterr().out, getattr(utils.diversity, name)

    def wrong(*args):
        result = right(*args)
        return 0.5 * result if isinstance(result, float) else {key: 0.5 * value for key, value in result.items()}

    monkeypatch.setattr(utils.diversity, name, wrong)
    call("variance", *common)
    assert capsys.readouterr().out != before


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("worst_case_sharpness", "APGD_worst"),
        ("average_sharpness", "APGD_average"),
        ("hessian_trace", "hessian_t"),
        ("top_eigenpairs", "hessian_e"),
        ("per_sample_fisher", "fisher"),
        ("ntk_gram", "NTK"),
    ],
)
def test_the_printed_sharpness_comes_from_the_tested_function(name, mode, saved, tmp_path, monkeypatch, capsys):
    common = ["--resume", saved[1][0], "--data_path", tmp_path, *SMALL, "--mode", mode, "--norms", "l2", "--save"]
    call("sharpness", *common, tmp_path / "right")
    before, right = capsys.readouterr().out.splitlines()[1], getattr(measure_sharpness, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        if isinstance(result, dict):
            return {key: 0.5 * value if isinstance(value, float) else value for key, value in result.items()}
        return (0.5 * result[0], *result[1:]) if isinstance(result, tuple) else 0.5 * result

    monkeypatch.setattr(measure_sharpness, name, wrong)
    call("sharpness", *common, tmp_path / "wrong")
    assert capsys.readouterr().out.splitlines()[1] != before


def test_corrupted_by_part_severity_and_mean(saved, tmp_path):
    folder, paths = saved
    data_path = folder / "data"
    result = call("diversity", "--resume", *paths, "--data_path", data_path, "--save", tmp_path, "--bootstrap", 20)
    assert set(result["result"]) == {"temperatures", "test", "corrupted"}
    corrupted = result["result"]["corrupted"]
    assert len(corrupted["parts"]) == 75
    one = corrupted["parts"]["fog-4"]
    images = np.load(data_path / "digits-C" / "fog.npy")[90:120]
    labels = torch.from_numpy(np.load(data_path / "digits-C" / "labels.npy")[90:120])
    info = load_data("digits", data_path).info.preprocessing
    normal = torch.from_numpy((images / 255 - np.array(info.mean)) / np.array(info.std)).permute(0, 3, 1, 2).float()
    outputs_of_fog = []
    for path, row in zip(paths, one["members"], strict=True):
        with torch.no_grad():
            probs = torch.softmax(load_model(path)[0](normal).double(), dim=1)
        outputs_of_fog.append(probs)
        assert row["accuracy"] == reference.accuracy(probs, labels)
        assert row["nll"] == pytest.approx(reference.nll(probs, labels), rel=1e-5)
    by_severity = [corrupted["by_severity"][str(s)]["ensemble"]["nll"] for s in range(1, 6)]
    rows = [corrupted["parts"][f"{name}-4"]["ensemble"]["nll"] for name in CORRUPTIONS]
    assert by_severity[3] == pytest.approx(np.mean(rows), rel=1e-12)
    assert corrupted["mean"]["ensemble"]["nll"] == pytest.approx(np.mean(by_severity), rel=1e-12)
    counts = corrupted["mean"]["right_of_samples"]
    rates, pairs = corrupted["mean"]["rates"], unpack_counts(counts["differing_pairs"])
    assert pairs.sum() / (75 * 3 * len(pairs)) == pytest.approx(rates["disagreement"], rel=1e-12)
    assert unpack_counts(counts["ensemble"]).mean() / 75 == pytest.approx(rates["ensemble_accuracy"], rel=1e-12)
    assert not any({"right_of_samples", "values_of_samples"} & part.keys() for part in corrupted["parts"].values())
    for name, text in corrupted["mean"]["values_of_samples"].items():
        assert unpack_values(text).mean() == pytest.approx(rates[name], rel=1e-3)
    # The root of the mean, which has no interval: parts share their images.
    square = corrupted["mean"]["ensemble"]["calibration_mse"]
    assert corrupted["mean"]["rmsce"] == pytest.approx(math.sqrt(square), rel=1e-12)
    assert square == pytest.approx(np.mean([p["ensemble"]["calibration_mse"] for p in corrupted["parts"].values()]))
    assert "ensemble_rmsce" in one["intervals_95"]
    assert "ensemble_rmsce" not in corrupted["mean"]["intervals_95"]
    # A part of the set, and the figures that one pass gave are found again by the other script.
    part = ["--data_path", data_path, "--split", "corrupted", "--corruptions", "fog,snow", "--severities", "4"]
    again = call("diversity", "--resume", *paths, "--save", tmp_path / "part", *part)["result"]["corrupted"]
    assert set(again["parts"]) == {"fog-4", "snow-4"}
    assert again["parts"]["fog-4"]["ensemble"] == one["ensemble"]
    part[5] = "fog"
    again = call("diversity", "--resume", *paths, "--save", tmp_path / "fog", *part)["result"]
    temperature = again["temperatures"]["ensemble"]
    for name, column in values_by_image(torch.stack(outputs_of_fog), labels, temperature).items():
        found = unpack_values(again["corrupted"]["mean"]["values_of_samples"][name])
        assert found == pytest.approx(column.numpy(), rel=2e-3, abs=1e-3)
    # The file tells which corrupted images these were: others have another digest.
    shutil.copytree(data_path, tmp_path / "other")
    fog = np.load(data_path / "digits-C" / "fog.npy")
    fog[100] = 255 - fog[100]  # of severity 4
    np.save(tmp_path / "other" / "digits-C" / "fog.npy", fog)
    digests = []
    for place, names in ((data_path, "fog,snow"), (tmp_path / "other", "fog,snow"), (tmp_path / "other", "snow")):
        part = ["--data_path", place, "--split", "corrupted", "--corruptions", names, "--severities", "4"]
        found = call("diversity", "--resume", *paths, "--save", tmp_path / "part", *part)
        digests.append(found["data"]["sha256_of_corrupted"])
    assert len(set(digests)) == 3
    part = ["--data_path", data_path, "--split", "corrupted", "--corruptions", "fog,snow", "--severities", "4"]
    assert (
        call("variance", "--resume", *paths, "--save", tmp_path / "v", *part)["data"]["sha256_of_corrupted"]
        == digests[0]
    )


def test_variance_equals_numpy(saved, tmp_path):
    folder, paths = saved
    modes = "variance,variance_mse,variance_mse_c"
    content = call("variance", "--resume", *paths, "--mode", modes, "--save", tmp_path, "--data_path", folder / "data")
    assert content["protocol"]["split"] == ["test", "corrupted"]  # what was measured
    result = content["result"]
    images = load_data("digits", tmp_path).test
    probs = outputs(paths, images).numpy()
    test = result["test"]
    assert test["variance_of_probabilities"] == pytest.approx(np.var(probs, axis=0, ddof=1).sum(1).mean(), rel=1e-5)
    onehot = np.eye(10)[images.labels.numpy()]
    assert test["mse"] == pytest.approx(((probs - onehot) ** 2).sum(2).mean(), rel=1e-5)
    assert len(result["corrupted"]["parts"]) == 75
    assert set(result["corrupted"]["mean"]) >= {"variance_of_probabilities", "bias2", "mse"}
    assert "compare methods by the variance of probabilities" in result["note"]


def test_one_pass_ever(saved, tmp_path, monkeypatch):
    paths = saved[1]
    common = ["--resume", *paths, "--save", tmp_path, "--data_path", tmp_path, "--split", "test,val,train"]
    first = call("diversity", *common)
    monkeypatch.setattr(utils.predictions, "predict", no_pass)
    assert call("diversity", *common)["result"] == first["result"]
    call("variance", *common, "--mode", "variance")  # the other script finds them too
    with pytest.raises(AssertionError, match="forward pass"):
        call("diversity", *common, "--mode", "CKA")  # which needs features


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other weights", "rows", "dtype", "pickle"])
def test_a_damaged_or_stale_cache_is_made_anew(damage, saved, tmp_path):
    paths = saved[1]
    common = ["--resume", *paths, "--save", tmp_path, "--data_path", tmp_path, "--bootstrap", 10]
    first = call("diversity", *common)["result"]
    cache = sorted((tmp_path / "predictions").glob("*/test.npz"))
    assert len(cache) == 3
    content = cache[0].read_bytes()
    if damage == "cut":
        cache[0].write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        cache[0].write_bytes(content[:9000] + bytes([content[9000] ^ 1]) + content[9001:])
    elif damage == "empty":
        cache[0].write_bytes(b"")
    elif damage == "other weights":
        cache[0].write_bytes(cache[1].read_bytes())
    else:
        with np.load(cache[0]) as file:
            arrays = dict(file)
        logits = arrays["logits"]
        arrays["logits"] = {"rows": logits[:-1], "dtype": logits.astype(np.float64), "pickle": logits.astype(object)}[
            damage
        ]
        np.savez(cache[0], **arrays)
    assert call("diversity", *common)["result"] == first
    assert cache[0].read_bytes() == content


def test_other_weights_or_images_are_measured_anew(saved, tmp_path):
    paths = saved[1]
    common = ["--save", tmp_path, "--data_path", tmp_path, "--mode", "disagreement", "--split", "val"]
    first = call("diversity", "--resume", *paths, *common)["result"]
    other = [*paths[:2], save_member(tmp_path / "x" / "model_best.pth.tar", 9)]
    assert call("diversity", "--resume", *other, *common)["result"] != first
    np.save(tmp_path / "train.npy", np.arange(700))
    np.save(tmp_path / "val.npy", np.arange(700, 700 + len(load_data("digits", tmp_path).val)))  # as many
    split = ["--train_idx_path", tmp_path / "train.npy", "--val_idx_path", tmp_path / "val.npy"]
    found = call("diversity", "--resume", *paths, *common, *split)["result"]
    assert found != first
    assert found == call("diversity", "--resume", *paths, *common, *split, "--save", tmp_path / "new")["result"]
    assert call("diversity", "--resume", *paths, *common)["result"] == first


def test_cka(saved, tmp_path):
    paths = saved[1]
    result = call("diversity", "--resume", *paths, "--mode", "CKA", "--save", tmp_path, "--data_path", tmp_path)
    cka = result["result"]["test"]["cka"]
    images = load_data("digits", tmp_path).test
    features, logits = [], []
    for path in paths[:2]:
        model, _ = load_model(path)
        with torch.no_grad():
            rows = model(images.batch(np.arange(len(images)))[0]).double()
        rows -= rows.mean(dim=1, keepdim=True)  # softmax ignores it
        logits.append((rows - rows.mean(dim=0)).numpy())
        model.linear = torch.nn.Identity()
        with torch.no_grad():
            rows = model(images.batch(np.arange(len(images)))[0]).double()
        features.append((rows - rows.mean(dim=0)).numpy())  # the Gram form would cancel digits otherwise
    for form in ("debiased", "biased"):
        expected = reference.cka_by_gram(*features, form == "debiased")
        assert cka["features"][form]["matrix"][0][1] == pytest.approx(expected, rel=1e-4)
        expected = reference.cka_by_gram(*logits, form == "debiased")
        assert cka["centred_logits"][form]["matrix"][0][1] == pytest.approx(expected, rel=1e-4)


def test_the_mean_of_logits(saved, tmp_path):
    paths = saved[1]
    common = ["--resume", *paths, "--mode", "predict", "--save", tmp_path, "--data_path", tmp_path]
    result = call("diversity", *common, "--average", "logits", "--bins", 3)["result"]["test"]
    images = load_data("digits", tmp_path).test
    probs = torch.softmax(outputs(paths, images).log().mean(dim=0), dim=1)
    assert result["ensemble"]["nll"] == pytest.approx(reference.nll(probs, images.labels), rel=1e-5)
    # The root of the calibration error, and of its interval, of the same bins.
    confidence, prediction = probs.max(dim=1)
    square, edges = calibration_mse(confidence, prediction == images.labels, 3)
    assert square > 0
    assert result["rmsce"] == pytest.approx(math.sqrt(square), rel=0.02)
    assert result["intervals_95"]["ensemble_rmsce"] == pytest.approx(list(map(math.sqrt, edges)), rel=0.02)


def test_one_member_can_be_scored(saved, tmp_path):
    result = call(
        "diversity", "--resume", saved[1][0], "--mode", "predict", "--save", tmp_path, "--data_path", tmp_path
    )
    assert result["result"]["test"]["ensemble"]["accuracy"] == result["result"]["test"]["members"][0]["accuracy"]


@pytest.mark.parametrize("model", ["resnet18", "wrn-40-2"])
def test_the_authors_checkpoints(model, tmp_path, monkeypatch):
    """Files as their release writes them, by a command as docs/MEASURING.md gives it."""
    files.write_cifar(tmp_path / "data" / "cifar100", "cifar100", images=120)
    monkeypatch.chdir(tmp_path)
    for seed in (13, 17):
        torch.manual_seed(seed)
        state = create_model(model, 100, 16 if model == "wrn-40-2" else 2, 32).state_dict()
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 200}, f"seed_{seed}.pth.tar")
    result = call("diversity", "--resume", "seed_13.pth.tar", "seed_17.pth.tar", "--dataset", "cifar100")
    assert len(result["members"]) == 2
    assert result["network"]["model"] == model
    assert result["result"]["test"]["disagreement"]["mean"] > 0


def test_tiny_imagenet_and_its_corrupted_folders(tmp_path):
    """The 64x64 network with mask buffers, and Tiny-ImageNet-C as folders."""
    folder = files.write_tiny_imagenet(tmp_path / "tiny-imagenet-200", per_class=8)
    names = sorted(path.name for path in (folder / "train").iterdir())
    for severity, name in itertools.product((1, 2), names):
        place = tmp_path / "Tiny-ImageNet-C" / "fog" / str(severity) / name
        place.mkdir(parents=True)
        Image.fromarray(np.full((64, 64, 3), 80 * severity, np.uint8)).save(place / "val_0.JPEG")
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = reference.randomize_batch_norm(create_model("resnet18", 200, 2, 64)).state_dict()
        masks = {k.replace(".weight", ".weight_mask"): torch.ones_like(v) for k, v in state.items() if v.dim() == 4}
        paths.append(tmp_path / f"seed_{seed}.pth.tar")
        torch.save({"state_dict": state | masks}, paths[-1])
    common = ["--resume", *paths, "--data", "tiny_imgnet", "--data_path", tmp_path, "--save", tmp_path / "m"]
    split = ["--split", "test,corrupted", "--corruptions", "fog", "--severities", "1,2"]
    result = call("diversity", *common, *split)["result"]
    assert set(result["corrupted"]["parts"]) == {"fog-1", "fog-2"}
    found = call("sharpness", *common, "--mode", "APGD_worst,fisher", *SMALL)["result"]
    assert found["APGD_worst-l2"]["mean"] > 0


MODES = ("APGD_worst", "APGD_average", "hessian_t", "hessian_e", "fisher", "NTK")


def test_sharpness_parts_are_kept_and_made_anew_where_the_protocol_changed(saved, tmp_path, monkeypatch, capsys):
    paths = saved[1]
    common = ["--resume", *paths[:2], "--save", tmp_path, "--data_path", tmp_path, *SMALL]
    first = call("sharpness", *common, "--mode", ",".join(MODES))["result"]
    assert first["missing"] == []
    names = {"APGD_worst-l2", "APGD_worst-linf", "APGD_average-l2", "APGD_average-linf", *MODES[2:]}
    assert set(first) == names | {"missing"}
    for name in names - {"NTK"}:
        values = [row["value"] for row in first[name]["members"]]
        assert first[name]["mean"] == pytest.approx(np.mean(values))
        assert first[name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert len(first["APGD_worst-l2"]["members"][0]["loss_by_batch"]) == 2
    assert len(first["hessian_e"]["members"][0]["eigenvalues"]) == 2
    assert "mean" in capsys.readouterr().out
    measured = []
    original = measure_sharpness.measure

    def watched(args, name, member, *rest):
        measured.append((name, member.seed))
        return original(args, name, member, *rest)

    monkeypatch.setattr(measure_sharpness, "measure", watched)
    assert call("sharpness", *common, "--mode", ",".join(MODES))["result"] == first
    assert measured == []
    call("sharpness", *common, "--mode", "fisher,APGD_worst", "--rho0", 0.1)
    assert {name for name, _ in measured} == {"APGD_worst-l2", "APGD_worst-linf"}  # fisher knows no radius
    measured.clear()
    (next((tmp_path / "sharpness").glob("*/fisher.json"))).write_text("{")
    call("sharpness", *common, "--mode", "fisher")
    assert len(measured) == 1


def test_a_cut_off_measurement_says_what_is_missing(saved, tmp_path, monkeypatch):
    paths = saved[1]
    common = ["--resume", *paths[:2], "--save", tmp_path, "--data_path", tmp_path, *SMALL, "--mode", "fisher,hessian_t"]
    original = measure_sharpness.measure

    def deadly(args, name, member, *rest):
        if (name, member.seed) == ("fisher", 5):
            raise KeyboardInterrupt
        return original(args, name, member, *rest)

    monkeypatch.setattr(measure_sharpness, "measure", deadly)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        call("sharpness", *common)
    result = json.loads((tmp_path / "sharpness.json").read_text())["result"]
    assert result["missing"] == [f"fisher of {paths[1]}"]
    assert (result["hessian_t"]["n"], result["fisher"]["n"]) == (2, 1)
    monkeypatch.setattr(measure_sharpness, "measure", original)
    assert call("sharpness", *common)["result"]["missing"] == []


def test_sharpness_equals_the_functions(saved, tmp_path):
    """The protocol: the first images of the split, shuffled by the subset seed, in batches, without augmentation."""
    paths = saved[1]
    result = call(
        "sharpness", "--resume", paths[0], "--save", tmp_path, "--data_path", tmp_path, *SMALL, "--mode", "fisher"
    )["result"]
    images = load_data("digits", tmp_path).train
    index = np.random.RandomState(13).permutation(809)[:10]
    model, _ = load_model(paths[0])
    scores = reference.fisher_by_samples(model, *images.batch(index))
    assert result["fisher"]["mean"] == pytest.approx(scores.mean().item(), rel=1e-4)


def test_protocol_prints_and_stops(saved, tmp_path, capsys):
    assert call("sharpness", "--resume", saved[1][0], "--save", tmp_path, "--protocol", "--mode", "APGD_worst") is None
    out = capsys.readouterr().out
    for part in ("--n_iters 20", "--eval_batch_size 5", "--batch_num 100", "--split train"):
        assert out.count(part) == 2
    for norm, radius in measure_sharpness.RADII.items():
        assert re.search(rf"^APGD_worst: .*--rho0 {radius} .*--norms {norm}$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "radii"), [([], (0.5, 0.01)), (["--rho0", 0.1], (0.1, 0.1)), (["--gamma", 2], (2, 2))]
)
def test_the_radius_of_each_norm(flags, radii, saved, tmp_path):
    """Given, it is that of both norms, as in the authors' commands; else each has its own."""
    common = ["--resume", saved[1][0], "--save", tmp_path, "--data_path", tmp_path, "--mode", "APGD_worst,APGD_average"]
    result = call("sharpness", *common, *SMALL, *flags)["result"]
    member, images = load_model(saved[1][0])[0], load_data("digits", tmp_path).train
    index = np.random.RandomState(13).permutation(len(images))[:10]
    batches = [images.batch(rows) for rows in (index[:5], index[5:])]
    for norm, radius in zip(NORMS, radii, strict=True):
        worst = worst_case_sharpness(member, batches, radius, norm, n_iters=2)["loss"]
        assert result[f"APGD_worst-{norm}"]["mean"] == pytest.approx(worst, rel=1e-3)
        for mode in ("APGD_worst", "APGD_average"):
            assert result[f"{mode}-{norm}"]["protocol"]["rho0"] == radius


@pytest.mark.parametrize(("size", "equal"), [(90, False), (400, False), (899, True)])
def test_average_sharpness_with_a_smaller_last_batch(size, equal, saved, tmp_path):
    """Value and standard error over batches weigh by images."""
    common = ["--resume", saved[1][0], "--save", tmp_path, "--data_path", tmp_path, "--mode", "APGD_average"]
    common += [*SMALL, "--norms", "linf", "--batch_num", 1000, "--eval_batch_size", size]
    images = len(load_data("digits", tmp_path).train)
    (found,) = call("sharpness", *common)["result"]["APGD_average-linf"]["members"]
    sizes = np.array([min(size, images - start) for start in range(0, images, size)])
    assert (len(set(sizes)) == 1) == equal
    losses, share = np.array(found["loss_by_batch"]), sizes / images
    assert found["value"] == pytest.approx((share * losses).sum(), rel=1e-12)
    error = found["loss_standard_error_over_batches"]
    if equal:
        assert error is None  # one batch
    else:
        gaps, count = share * (losses - found["value"]), len(sizes)
        assert error == pytest.approx(math.sqrt((gaps**2).sum() * count / (count - 1)), rel=1e-9)


def test_variances_of_logits():
    """The authors' is of the logits as they are; a shift that softmax ignores changes no other."""
    args = measure_diversity_variance.parse_args(["--resume", "x"])
    random = np.random.default_rng(0)
    logits, labels = torch.from_numpy(random.normal(0, 2, (3, 40, 4))), torch.from_numpy(random.integers(0, 4, 40))
    rows = [
        measure_diversity_variance.decompose(one, labels, set(args.mode))
        for one in (logits, logits + torch.tensor([0.0, 3.0, -3.0])[:, None, None])
    ]
    authors = [row.pop("variance_of_logits") for row in rows]
    assert rows[0] == pytest.approx(rows[1], rel=1e-12)
    assert authors[1] > authors[0] + 4 * 8
    assert authors[0] == pytest.approx(logits.numpy().var(axis=0, ddof=1).sum(axis=1).mean(), rel=1e-12)


def test_no_measure_leaves_a_trace(saved, tmp_path):
    """Members, generators and flags are the same before and after each mode."""
    paths = saved[1]
    args = measure_sharpness.parse_args(
        [str(w) for w in ("--resume", paths[0], "--save", tmp_path, "--data_path", tmp_path, *SMALL)]
    )
    measurement = utils.predictions.Measurement(utils.predictions.measure_settings(args))
    member = measurement.members[0]
    next(iter(member.model.parameters())).requires_grad_(False)
    names = [name for mode in MODES for name in measure_sharpness.part_names(mode, ["l2", "linf"])]

    def state():
        weights = {name: tensor.clone() for name, tensor in member.model.state_dict().items()}
        flags = [p.requires_grad for p in member.model.parameters()]
        grads = [p.grad is None for p in member.model.parameters()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in member.model.modules()]
        return weights, flags, grads, hooks, torch.random.get_rng_state(), np.random.get_state()[1].tolist()

    def same(a, b):
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
        assert a[1:4] == b[1:4]
        assert torch.equal(a[4], b[4])
        assert a[5] == b[5]

    def twice(*arguments):
        """Some measures make a single pass."""
        for _ in range(2):
            measure_sharpness.measure(*arguments)

    torch.manual_seed(1)
    for name in names:
        before = state()
        measure_sharpness.measure(args, name, member, measurement.data.train)
        same(before, state())
        count = itertools.count()

        def failing(module, inputs, count=count):
            if next(count) == 1:
                raise RuntimeError("from within")

        hook = member.model.register_forward_pre_hook(failing)
        before = state()
        with pytest.raises(RuntimeError, match="from within"):
            twice(args, name, member, measurement.data.train)
        same(before, state())
        hook.remove()
    before = state()
    utils.predictions.predict(member.model, measurement.data.val, features=True)
    same(before, state())


class NoFloat64(TorchDispatchMode):
    """Refuses conversions to float64, as Apple's devices do: ours go through numpy, on the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        made = isinstance(result, torch.Tensor) and result.dtype is torch.float64
        if made and inputs and not any(x.dtype is torch.float64 for x in inputs):
            raise TypeError(f"{operation}: Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.mark.parametrize("name", [*MODES, "landscape"])
def test_a_device_without_float64(name, saved, tmp_path):
    """The same values as without its restriction."""
    words = ["--resume", saved[1][0], "--save", tmp_path, "--data_path", tmp_path, *SMALL, "--trace_method", "hutch++"]
    args = measure_sharpness.parse_args([str(word) for word in words])
    measurement = utils.predictions.Measurement(utils.predictions.measure_settings(args))
    member, images = measurement.members[0], measurement.data.train

    def measured():
        if name == "landscape":
            batches = [images.batch(np.arange(20))]
            along, top = utils.landscape.along_random, utils.landscape.along_top
            return [*itertools.chain(*along(member.model, batches)), *top(member.model, batches)["losses"]]
        parts = measure_sharpness.part_names(name, NORMS)
        return [measure_sharpness.measure(args, part, member, images)["value"] for part in parts]

    expected = measured()
    with NoFloat64():
        assert measured() == pytest.approx(expected, rel=1e-5)


def nan_weight(network):
    network.linear.weight[0, 0] = float("nan")


def no_logits(network):
    network.linear.weight.zero_()


def no_features(network):
    for name, weight in network.named_parameters():
        if not name.startswith("linear"):
            weight.zero_()


def test_cka_of_members_that_say_the_same_of_all_images(saved, tmp_path, capsys):
    """It is said of which members, and whether of features or of logits."""
    common = ["--data_path", tmp_path, "--save", tmp_path / "m", "--mode", "CKA"]
    for change, what in ((no_logits, "centred logits"), (no_features, "features")):
        flat = save_member(tmp_path / f"{change.__name__}.pth.tar", 2, change=change)
        line = refused(capsys, "diversity", "--resume", saved[1][0], flat, *common)
        problem = f"--mode CKA: CKA: a representation is the same for all samples: the {what} of member 2; leave that"
        assert line.endswith(f"{problem} mode or member out")


def test_bad_input(saved, tmp_path, capsys):
    paths = saved[1]
    common = ["--save", tmp_path / "out", "--data_path", tmp_path]
    for name, mode in (("diversity", ["--mode", "disagreement"]), ("diversity", ["--mode", "KL"]), ("variance", [])):
        line = refused(capsys, name, "--resume", paths[0], *mode, *common)
        assert "expected 2 or more members" in line
    wide = save_member(tmp_path / "wide.pth.tar", 1, width=4)
    line = refused(capsys, "diversity", "--resume", paths[0], wide, *common)
    assert "wide.pth.tar has width 4" in line
    other = save_member(tmp_path / "other.pth.tar", 1, data="cifar10", size=32, channels=3)
    line = refused(capsys, "diversity", "--resume", paths[0], other, *common)
    assert "dataset cifar10" in line
    fewer = save_member(tmp_path / "fewer.pth.tar", 1, classes=9)
    assert "num_classes 9" in refused(capsys, "diversity", "--resume", paths[0], fewer, *common)
    assert "num_classes is 10" in refused(capsys, "diversity", "--resume", fewer, "--mode", "predict", *common)
    assert "the same weights" in refused(capsys, "diversity", "--resume", paths[0], paths[0], *common)
    broken = save_member(tmp_path / "nan.pth.tar", 1, change=nan_weight)
    assert "linear.weight holds values that are not finite" in refused(
        capsys, "diversity", "--resume", paths[0], broken, *common
    )
    (tmp_path / "empty").mkdir()
    assert "model_best.pth.tar is missing" in refused(capsys, "diversity", "--resume", tmp_path / "empty", *common)
    assert "no such file" in refused(capsys, "sharpness", "--resume", tmp_path / "nowhere", *common)
    line = refused(capsys, "diversity", "--resume", *paths, "--mode", "predict,accuracy", *common)
    assert "accuracy" in line
    assert "CKA" in line
    (tmp_path / "file").write_text("")
    line = refused(capsys, "diversity", "--resume", *paths, "--save", tmp_path / "file", "--data_path", tmp_path)
    assert f"--save {tmp_path / 'file'}: cannot be written" in line
    line = refused(capsys, "sharpness", "--resume", *paths, "--params", "nothing", *common)
    assert "--params: no trainable parameter matches 'nothing'" in line
    for mode in ("fisher", "all", "NTK,fisher"):
        line = refused(capsys, "sharpness", "--resume", *paths, "--params", "weight", "--mode", mode, *common)
        assert "--params: has no effect on --mode fisher" in line
    call("sharpness", "--resume", *paths, "--n_draws", 6, "--save", tmp_path / "o", "--n_iters", 1, "--batch_num", 1)
    assert "note: --n_draws: no effect on --mode APGD_worst" in capsys.readouterr().err
    line = refused(capsys, "variance", "--resume", *paths, "--mode", "variance_mse_c", "--split", "val", *common)
    assert "--split: --mode variance_mse_c takes the corrupted images alone" in line
    for flags in (["--n_draws", 5], ["--rho0", 0], ["--norms", "l1"], ["--probes", 5, "--trace_method", "hutch++"]):
        assert flags[0] in refused(capsys, "sharpness", "--resume", *paths, *flags, *common)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


IDLE = [
    ("diversity", "--split test --severities 5 --corruptions fog", "--corruptions, --severities: no effect where no"),
    ("diversity", "--mode ood --severities 5", "--severities: no effect where no corrupted images are measured; add"),
    ("diversity", "--mode ood --ood corrupted --severities 5", None),
    ("diversity", "--split test,corrupted --severities 5", None),
    ("diversity", "--severities 5", None),  # the set may be there
    ("diversity", "--mode ood --bins 3", "--bins: no effect on --mode ood"),
    ("diversity", "--mode disagreement,KL --bins 3", "--bins: no effect on --mode disagreement,KL"),
    ("diversity", "--mode predict,KL --bins 3 --average logits --bootstrap 5 --split val", None),
    ("variance", "--severities 5", "--severities: no effect where no corrupted images are measured"),
    ("variance", "--split test --mode variance,variance_mse_c --severities 5", None),
    ("variance", "--split val,corrupted --severities 5", None),
    ("sharpness", "--n_draws 6 --norms l2 --mode fisher", "--norms, --n_draws: no effect on --mode fisher"),
    ("sharpness", "--n_draws 6 --mode APGD_average", None),
]


@pytest.mark.parametrize(("name", "words", "said"), IDLE)
def test_options_without_effect_are_noted(name, words, said, capsys):
    SCRIPTS[name].parse_args(["--resume", "x", *words.split()])
    note = capsys.readouterr().err
    assert note.startswith(f"note: {said}") if said else note == ""
    assert note.count("\n") == bool(said)


def test_a_choice_of_a_corrupted_set_that_is_not_there(saved, tmp_path, capsys):
    folder, paths = saved
    common = ["--resume", *paths, "--mode", "disagreement", "--bootstrap", 0]
    note = "note: --severities: no effect, since no digits-C/ is found beside the data\n"
    for words, said in ((["--severities", 5], note), ([], "")):
        call("diversity", *common, "--data_path", tmp_path, "--save", tmp_path / str(words), *words)
        assert capsys.readouterr().err == said
    words = ["--severities", 5, "--corruptions", "fog", "--save", tmp_path / "m"]
    call("diversity", *common, "--data_path", folder / "data", *words)
    assert "no effect" not in capsys.readouterr().err


def test_bad_corrupted_sets(saved, tmp_path, capsys):
    paths = saved[1]
    split = ["--split", "corrupted", "--resume", *paths, "--save", tmp_path / "out", "--data_path", tmp_path]
    line = refused(capsys, "diversity", *split)
    assert "no digits-C/" in line
    corrupted = save_corrupted(tmp_path / "digits-C", corruptions=CORRUPTIONS[:13])
    line = refused(capsys, "diversity", *split)
    assert "pixelate.npy, jpeg_compression.npy missing" in line
    assert "--corruptions" in line
    fog = corrupted / "fog.npy"
    good = np.load(fog)
    for bad in (good[:, :, :4], good[:-1], good.astype(np.float32), good[:0]):
        np.save(fog, bad)
        line = refused(capsys, "diversity", *split, "--corruptions", "fog")
        assert str(fog) in line
    fog.write_bytes(b"\x93NUMPY")
    assert "not a readable .npy file" in refused(capsys, "diversity", *split, "--corruptions", "fog")
    np.save(fog, good)
    labels = np.load(corrupted / "labels.npy")
    for bad in (labels[:-1], labels + 5, labels * 1.0):
        np.save(corrupted / "labels.npy", bad)
        assert "labels.npy" in refused(capsys, "diversity", *split, "--corruptions", "fog")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_draws_of_the_calibration_error():
    """Each resample's ECE by a loop over bins, whatever other columns are drawn beside it."""
    random = np.random.default_rng(0)
    logits, labels = torch.from_numpy(random.normal(0, 2, (2, 40, 3))), torch.from_numpy(random.integers(0, 3, 40))
    args = measure_diversity.parse_args(["--resume", "x", "--mode", "predict,disagreement", "--bins", "5"])
    weights = torch.cat(list(bootstrap_counts(40, 6))).double() / 40
    temperatures = {"members": [1.0, 1.0], "ensemble": 1.0}
    result, columns, gaps = measure_diversity.measure_part(args, logits, labels, [], temperatures)
    draws = measure_diversity.resample(6, columns, gaps)
    confidence, prediction = torch.softmax(logits, 2).mean(0).max(1)
    edges = calibration_mse(confidence, prediction == labels, 5)[1]
    assert edges != pytest.approx(calibration_mse(confidence, prediction == labels)[1], rel=0.05)
    part = utils.predictions.Part("test", list)
    whole = measure_diversity.mean_of_parts([part], {"test": measure_diversity.PartResult(result, columns, draws)})
    assert whole["intervals_95"]["ensemble_rmsce"] == pytest.approx(list(map(math.sqrt, edges)))
    for weight, drawn in zip(weights, draws["ensemble_ece"], strict=True):
        error = 0.0
        for low in range(5):
            inside = (confidence >= low / 5) & (confidence < (low + 1) / 5)
            error += abs((weight * ((prediction == labels).double() - confidence))[inside].sum().item())
        assert drawn.item() == pytest.approx(error, rel=1e-9)
    assert draws["disagreement"].shape == (6,)


def test_counts_and_values_of_many_parts():
    """Sums and means over parts; a count that 16 bits do not hold, and parts of different images, have none."""

    def part(name, samples=3):
        columns = {
            "member_accuracy": 0.98,
            "disagreement": 1.0,
            "ensemble_accuracy": 1.0,
            "ensemble_nll": 2.0 + len(name),
        }
        columns = {name: torch.full((samples,), value, dtype=torch.float64) for name, value in columns.items()}
        return measure_diversity.PartResult({}, columns, {})

    parts = [utils.predictions.Part("x" * (1 + i % 2), list) for i in range(75)]
    found = {"x": part("x"), "xx": part("xx")}
    for members, names in ((3, {"members", "ensemble", "differing_pairs"}), (50, {"members", "ensemble"})):
        kept = measure_diversity.of_samples(parts, found, members)
        assert kept["right_of_samples"].keys() == names
        assert unpack_counts(kept["right_of_samples"]["members"]).tolist() == [round(0.98 * members * 75)] * 3
        value = 2 + (38 * 1 + 37 * 2) / 75
        assert unpack_values(kept["values_of_samples"]["ensemble_nll"]) == pytest.approx([value] * 3, rel=5e-4)
    found["xx"] = part("xx", samples=4)
    assert measure_diversity.of_samples(parts, found, 3) == {"right_of_samples": {}, "values_of_samples": {}}


def test_a_calibration_error_without_its_bias_is_not_below_zero():
    """Its square is at times; of several parts the mean of squares counts."""
    found = {
        name: measure_diversity.PartResult(
            {"ensemble": {"ece": 0.1, "calibration_mse": square}, "rmsce_interval": [0.0, 0.1]},
            {},
            {"ensemble_ece": torch.full((3,), 0.1)},
        )
        for name, square in (("a", -0.03), ("b", 0.07))
    }
    parts = [utils.predictions.Part(name, list) for name in found]
    assert measure_diversity.mean_of_parts(parts[:1], found)["rmsce"] == 0
    assert measure_diversity.mean_of_parts(parts, found)["rmsce"] == pytest.approx(math.sqrt(0.02))
