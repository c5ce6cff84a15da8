"""Images of other data: what is read, how it is fitted to the run, and what measure_diversity.py says of it."""

import numpy as np
import pytest
import torch
from PIL import Image

import utils.predictions
from tests import files, reference
from tests.test_measure import call, no_pass, outputs, refused, save_corrupted, save_member
from utils import InputError, ood
from utils.data import ImageSet, Preprocessing
from utils.datasets import load_data
from utils.files import write_json
from utils.metrics import OOD_METRICS, crossed_interval, out_of_distribution, risk_coverage, unpack_values
from utils.results import copy_results, read_ensemble


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two members of digits; beside the data Fashion-MNIST, copies of 30 images, and 12 pictures without classes."""
    folder = tmp_path_factory.mktemp("saved")
    data = folder / "data"
    files.write_fashion_mnist(data / "FashionMNIST" / "raw")
    save_corrupted(data / "digits-C", corruptions=("fog", "snow"))
    files.write_image_folder(folder, {"pictures": 12})
    return folder, [save_member(folder / f"{seed}.pth.tar", seed) for seed in (3, 5)]


def measured(saved, tmp_path, *words):
    folder, paths = saved
    common = ["--resume", *paths, "--data_path", folder / "data", "--save", tmp_path / "m", "--bootstrap", 0]
    return call("diversity", *common, "--corruptions", "fog,snow", *words)


def test_scores_tell_other_data_from_test_images(saved, tmp_path, monkeypatch, capsys):
    folder, paths = saved
    words = ["fashion_mnist", "noise", f"folder:{folder / 'pictures'}"]
    result = measured(saved, tmp_path, "--mode", "ood", "--ood", *words)["result"]
    assert result.keys() == {"temperatures", "test"}
    found = result["test"]["ood"]
    assert list(found) == ["fashion_mnist", "noise", "folder:pictures"]
    assert [one["images"] for one in found.values()] == [20, 899, 12]
    # From the files, image by image.
    test = load_data("digits", folder).test
    fashion = load_data("fashion_mnist", folder / "data").test.images.numpy()
    small = np.stack([reference.scaled(image, 8) for image in fashion]).round().clip(0, 255).astype(np.uint8)
    others = ImageSet(small, np.zeros(20, np.int64), test.preprocessing)
    inside, outside = (outputs(paths, images) for images in (test, others))
    entropy = [-(p * p.log()).sum(dim=-1) for p in (inside.mean(0), outside.mean(0))]
    single = [-(p * p.log()).sum(dim=-1).mean(0) for p in (inside, outside)]
    scores = {
        "max_probability": [1 - p.mean(0).amax(1) for p in (inside, outside)],
        "entropy": entropy,
        "mutual_information": [whole - of for whole, of in zip(entropy, single, strict=True)],
    }
    rows = found["fashion_mnist"]["scores"]
    for name, pair in scores.items():
        expected = reference.out_of_distribution(*(score.tolist() for score in pair))
        assert {key: rows[name][key] for key in expected} == pytest.approx(expected, abs=3e-3)
    for one in found.values():
        for name, row in one["scores"].items():
            assert len(row["tpr"]) == 101
            assert np.trapezoid(row["tpr"], dx=0.01) == pytest.approx(row["auroc"], abs=0.02)
            for kind in ("in", "out"):
                assert sum(row["histogram"][kind]) == pytest.approx(1, abs=1e-4)
            for number, text in one["values_of_samples"][name].items():
                column = torch.from_numpy(unpack_values(text))
                assert len(column) == 899 + one["images"]
                low, high = one["intervals_95"][name][number] or (0, 1)
                again = crossed_interval(torch.stack([column + row[number] - column.mean()] * 2))
                if low > 0 and high < 1:
                    assert again == pytest.approx([low, high], rel=0.02)  # as if of one more ensemble that is the same
    out = capsys.readouterr().out
    assert "out of distribution: folder:pictures (12 images), from 899 test images\n" in out
    # One pass: another mode, and the same sets again, find the logits; the results stay.
    monkeypatch.setattr(utils.predictions, "predict", no_pass)
    again = measured(saved, tmp_path, "--mode", "ood,disagreement", "--split", "test", "--ood", *words[::-1])
    assert again["result"]["test"]["ood"] == found
    assert again["made_by"]["test"]["ood"]["versions"] == {"logits": 1, "ood": 1}
    assert set(again["protocol"]["ood"]) == set(words)
    measured(saved, tmp_path, "--mode", "ood", "--ood", "noise")


def test_risk_and_coverage_of_the_test_images(saved, tmp_path, capsys):
    """Also where mode predict is not asked for, which writes the same numbers."""
    content = measured(saved, tmp_path, "--mode", "ood")
    found, out = content["result"]["test"], capsys.readouterr().out
    inside = outputs(saved[1], load_data("digits", saved[0]).test).mean(dim=0)
    right = inside.argmax(dim=1) == load_data("digits", saved[0]).test.labels
    curve = risk_coverage(inside.amax(dim=1), right)
    assert found["rates"]["aurc"] == pytest.approx(curve["aurc"], rel=1e-3)
    assert found["excess_aurc"] == pytest.approx(curve["excess_aurc"], rel=1e-2)
    assert found["risk_at_percent"][99] == pytest.approx(1 - right.double().mean().item())
    assert f"AURC of the ensemble       {found['rates']['aurc']:8.4f}" in out
    assert "entropy" not in found["rates"]
    with_it = measured(saved, tmp_path / "new", "--mode", "predict,ood")["result"]["test"]
    assert {key: with_it[key] for key in ("excess_aurc", "risk_at_percent")}.items() <= found.items()
    assert with_it["rates"]["aurc"] == found["rates"]["aurc"]
    assert with_it["values_of_samples"]["aurc"] == found["values_of_samples"]["aurc"]
    again = call("diversity", "--resume", *saved[1], "--save", tmp_path / "m2", "--mode", "ood", "--bootstrap", 50)
    low, high = again["result"]["test"]["intervals_95"]["aurc"]
    assert low < found["rates"]["aurc"] < high


def test_corrupted_copies(saved, tmp_path):
    """Paired with the images that they were made of, where the labels say so."""
    folder, paths = saved
    content = measured(saved, tmp_path, "--mode", "ood", "--ood", "corrupted")
    one = content["result"]["test"]["ood"]["corrupted"]
    assert (one["parts"], one["images"], one["test_images"]) == (10, 30, 899)  # labels are random here
    assert one["scores"]["entropy"]["auroc"] == pytest.approx(
        np.mean([row["entropy"]["auroc"] for row in one["by_severity"].values()])
    )
    assert "sha256_of_corrupted" in content["data"]
    test = load_data("digits", folder).test
    np.save(folder / "data" / "digits-C" / "labels.npy", np.tile(test.labels[:30].numpy(), 5))
    one = measured(saved, tmp_path, "--mode", "ood", "--ood", "corrupted")["result"]["test"]["ood"]["corrupted"]
    assert one["test_images"] == 30
    logits = outputs(paths, test)[:, :30]
    fog = np.load(folder / "data" / "digits-C" / "fog.npy")[:30]
    copies = ImageSet(fog, np.zeros(30, np.int64), test.preprocessing)
    low, high = ((1 - p.mean(0).amax(1)) for p in (logits, outputs(paths, copies)))
    again = measured(saved, tmp_path, "--mode", "ood", "--ood", "corrupted", "--corruptions", "fog", "--severities", 1)
    one = again["result"]["test"]["ood"]["corrupted"]
    assert one["scores"]["max_probability"]["auroc"] == pytest.approx(out_of_distribution(low, high)["auroc"], abs=3e-3)
    assert len(unpack_values(one["values_of_samples"]["entropy"]["auroc"])) == 30


def test_parts_with_different_numbers_of_images(saved, tmp_path):
    """As of a published set of which files are missing: means over parts stand, without intervals."""
    random = np.random.RandomState(0)
    parts = []
    for count in (20, 19):
        low, high = (torch.from_numpy(random.rand(2, n, 4)).log() for n in (30, count))
        parts.append(ood.compare(ood.scores(low), ood.scores(high), ood.largest_scores(2, 4), False))
    found = ood.summarize(parts, {"images": 20})
    assert found["intervals_95"]["entropy"] == dict.fromkeys(OOD_METRICS)
    both = [part["entropy"]["auroc"] for part, _ in parts]
    assert found["scores"]["entropy"]["auroc"] == pytest.approx(np.mean(both))
    # Whoever reads or copies the results has the means.
    content = measured(saved, tmp_path, "--mode", "disagreement,ood", "--ood", "corrupted")
    content["result"]["test"]["ood"]["corrupted"] |= found
    write_json(tmp_path / "m" / "diversity.json", content)
    write_json(tmp_path / "m" / "sharpness.json", {"result": {}})
    copy_results(tmp_path / "m", tmp_path / "copy", by_image=["auroc entropy"])
    (tmp_path / "copy" / "sharpness.json").unlink()
    read = read_ensemble(tmp_path / "copy")
    assert read.values["auroc entropy corrupted"] == pytest.approx(np.mean(both))
    assert "auroc entropy corrupted" not in read.by_sample


def test_one_member_has_no_mutual_information(saved, tmp_path, capsys):
    call("diversity", "--resume", saved[1][0], "--save", tmp_path, "--mode", "ood")
    out = capsys.readouterr().out
    assert "One member: its mutual information is 0 for every image, and tells nothing apart." in out
    line = next(line for line in out.splitlines() if line.startswith("  mutual information"))
    assert line.split()[2:] == ["0.5000", "0.5000", "1.0000"]


def test_the_same_data_is_refused(saved, tmp_path, capsys):
    folder, paths = saved
    common = ["diversity", "--resume", *paths, "--data_path", folder, "--save", tmp_path / "m", "--mode", "ood"]
    problem = "--ood digits: is what the members were trained on; name other data, or corrupted, or noise"
    assert problem in refused(capsys, *common, "--ood", "digits")
    test = load_data("digits").test
    (tmp_path / "copy").mkdir()
    for i in range(5):
        Image.fromarray(test.images[i, ..., 0].numpy()).save(tmp_path / "copy" / f"{i}.png")
    place = tmp_path / "copy"
    with pytest.raises(SystemExit):
        call(*common, "--ood", f"folder:{place}")
    assert "copy: its images are the test images of the run; name other data" in capsys.readouterr().err
    Image.fromarray(255 - test.images[0, ..., 0].numpy()).save(tmp_path / "copy" / "other.png")
    call(*common, "--ood", f"folder:{place}")
    assert "5 of its 6 images are test images of the run" in capsys.readouterr().err


def test_the_same_pictures_are_refused_without_their_border(tmp_path):
    """Inputs of Fashion-MNIST are its pictures with two zeros around them; a folder's are scaled to the whole size."""
    files.write_fashion_mnist(tmp_path / "fashion-mnist", train=130, test=6)
    data = load_data("fashion_mnist", tmp_path)
    (tmp_path / "copy").mkdir()
    for i, image in enumerate(data.test.pixels(slice(6)).numpy()):
        Image.fromarray(image[2:-2, 2:-2, 0]).save(tmp_path / "copy" / f"{i}.png")
    with pytest.raises(InputError, match="copy: its images are the test images of the run"):
        ood.read_set("folder", tmp_path / "copy", data, tmp_path)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["digit"], "--ood: expected one of cifar10, "),
        (["folder"], "--ood: 'folder' says no folder; write folder:PATH"),
        (["noise:x"], "--ood: 'noise:x': noise is not read from a path; write noise"),
        (["noise", "noise"], "--ood noise: a set named noise is given twice"),
        (["folder:nowhere"], "--ood folder:nowhere: expected a folder of images, got no such folder"),
        (["cifar10:nowhere"], "--ood cifar10:nowhere: no cifar10 found"),
        (["corrupted"], "--ood corrupted: no digits-C/ in "),
        (["noise", "--mode", "KL"], "--ood: given without --mode ood; add that mode, or leave it out"),
        (["noise", "--split", "val"], "--split val: --mode ood compares with the test images; add test"),
    ],
)
def test_bad_words(words, problem, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--resume", *saved[1], "--data_path", tmp_path, "--save", tmp_path / "m", "--mode", "ood"]
    assert problem in refused(capsys, "diversity", *common, "--ood", *words)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [5, 12, 30])
def test_fitted_images(channels, size):
    """Grey as Pillow's; scaled as by the slow form."""
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    found = ood.fit(images, size, channels)
    assert found.shape == (3, size, size, channels)
    for image, one in zip(images, found, strict=True):
        grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] if channels == 1 else image
        assert np.abs(one - reference.scaled(grey, size)).max() <= 0.51
    grey = ood.fit(images[..., :1], size, 3)
    assert (grey == ood.fit(images[..., :1], size, 1)).all()


def test_a_folder_of_a_run_of_large_images(tmp_path):
    """Decoded as the run's own: larger, of which the middle is taken; a folder with parts gives its test images."""
    counts = {"train/a": 2, "train/b": 2, "test/a": 3, "test/b": 1}
    files.write_image_folder(tmp_path / "other", counts, size=40)
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, size=128)
    test = ImageSet(np.zeros((2, 147, 147, 3), np.uint8), np.zeros(2, np.int64), preprocessing, rows=np.arange(2))
    data = type("Run", (), {"name": "folder", "test": test})
    found = ood.read_set("folder", tmp_path / "other", data, tmp_path)
    assert len(found) == 4
    assert found.batch(np.arange(4))[0].shape == (4, 3, 128, 128)
    assert found.stored_size == 147
    noise = ood.read_set("noise", None, data, tmp_path)
    assert noise.batch(np.arange(2))[0].shape == (2, 3, 128, 128)
