"""The ensemble in use: load_ensemble against measured probabilities, images of any form, temperature, predict.py."""

import csv
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import measure_diversity
import utils.predictions
import utils.run
from scripts import predict
from tests import files
from tests.test_measure import call, save_member
from tests.test_networks import skip_without_timm
from utils import InputError, cli, datasets
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data import ImageSet
from utils.datasets import DATASETS, load_data
from utils.folder import decode
from utils.inference import CLASS_NAMES, load_ensemble, scaled
from utils.training import predict as logits_of

# Data set, classes, network, width, size, channels.
NETWORKS = {
    "resnet18": ("cifar10", 10, "resnet18", 4, 32, 3),
    "tiny": ("tiny_imgnet", 200, "resnet18", 4, 64, 3),
    "wrn": ("cifar100", 100, "wrn-40-2", 8, 32, 3),
    "vit": ("fashion_mnist", 10, "vit_t", 8, 32, 1),
    "torchvision": ("cifar10", 10, "torchvision:shufflenet_v2_x0_5", 64, 32, 3),
    "timm": ("cifar10", 10, "timm:lcnet_050", 64, 32, 3),
}


@pytest.fixture(autouse=True)
def _say_again():
    """Notes are said once a process."""
    datasets.note.cache_clear()


def members_of(folder, name, count=3):
    skip_without_timm(NETWORKS[name][2])
    data, classes, model, *sizes = NETWORKS[name]
    return [save_member(folder / f"{seed}.pth.tar", seed, data, classes, *sizes, model=model) for seed in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with three members on digits, whose logits are small enough for a temperature to matter."""

    def smaller(network):
        network.linear.weight.mul_(0.2)

    folder = tmp_path_factory.mktemp("run")
    for seed in (3, 5, 8):
        save_member(folder / f"seed_{seed}" / "model_best.pth.tar", seed, change=smaller)
    (folder / "args.json").write_text(json.dumps({"seed": [3, 5, 8], "data": "digits", "partition": "released"}))
    return folder


@pytest.fixture
def measured(run, tmp_path):
    """The temperatures that measure_diversity.py fits; what it keeps with the run is taken away afterwards."""
    result = call("diversity", "--resume", run, "--save", tmp_path / "measured", "--mode", "predict", "--bootstrap", 0)
    yield result["result"]["temperatures"]
    (run / "temperatures.json").unlink(missing_ok=True)


def slow_probs(ensemble, name, pixels):
    """The mean of the members' softmax in float64, of the logits that every measuring script takes."""
    images = ImageSet(pixels, np.zeros(len(pixels), np.int64), DATASETS[name].preprocessing)
    return torch.stack([logits_of(member, images)[0].double().softmax(1) for member in ensemble.members]).mean(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_are_those_that_are_measured(name, tmp_path):
    """To 1e-6, of uint8 and float, of one image and of more than one pass."""
    ensemble = load_ensemble(members_of(tmp_path, name))
    size, channels = NETWORKS[name][4:]
    pixels = np.random.default_rng(0).integers(0, 256, (140, size, size, channels), dtype=np.uint8)
    expected = slow_probs(ensemble, NETWORKS[name][0], pixels)
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    for images in (pixels, torch.from_numpy(pixels), floats, floats.float().numpy()):
        torch.testing.assert_close(ensemble(images).probs.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ensemble(pixels[:1]).probs.double(), expected[:1], rtol=0, atol=1e-6)


def test_ten_thousand_images_take_the_memory_of_few(run, tmp_path):
    """Of a memory map too, which may be read-only; never more than 128 at once."""
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    ensemble, seen = load_ensemble(run), []
    ensemble.members[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = ensemble(np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert (max(seen), sum(seen)) == (128, 10_000)
    expected = slow_probs(ensemble, "digits", pixels)
    torch.testing.assert_close(found.probs.double(), expected, rtol=0, atol=1e-6)


def test_what_it_says(run):
    """Shapes, entropies against scipy, no gradients, and eval mode for good."""
    ensemble = load_ensemble(str(run)).train()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    found = ensemble(pixels)
    assert found.probs.shape == (5, 10)
    assert found.member_probs.shape == (3, 5, 10)
    probs, members = found.probs.double().numpy(), found.member_probs.double().numpy()
    entropies = scipy.stats.entropy(members, axis=2)
    np.testing.assert_allclose(found.entropy, scipy.stats.entropy(probs, axis=1), atol=1e-6)
    np.testing.assert_allclose(
        found.mutual_information, scipy.stats.entropy(members.mean(0), axis=1) - entropies.mean(0), atol=1e-6
    )
    assert found.predicted.tolist() == probs.argmax(1).tolist()
    assert not any(module.training for module in ensemble.modules())
    assert not any(value.requires_grad for value in (found.probs, *ensemble.parameters()))
    assert ensemble.classes == list("0123456789")
    assert ensemble(pixels[:0]).member_probs.shape == (3, 0, 10)
    one = load_ensemble(run / "seed_3")(pixels)
    assert one.mutual_information.tolist() == [0] * 5


def test_temperature(run, measured, capsys):
    """That of exactly these members; it acts on the ensemble's probabilities, as in the measured ones."""
    pixels = load_data("digits").test.pixels(slice(50))
    plain = load_ensemble(run / "seed_3", checkpoint="best")
    assert plain.temperature == 1
    assert "no temperature of these members is kept" in capsys.readouterr().err
    ensemble = load_ensemble([run / f"seed_{seed}" for seed in (8, 3, 5)])  # in any order
    assert abs(measured["ensemble"] - 1) > 0.05
    assert ensemble.temperature == measured["ensemble"]
    assert f"{run}: its temperature, {measured['ensemble']:.4g}, is used" in capsys.readouterr().err
    found, mean = ensemble(pixels), slow_probs(ensemble, "digits", pixels.numpy())
    expected = torch.softmax(mean.log() / ensemble.temperature, 1)
    torch.testing.assert_close(found.probs.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.member_probs.mean(0).double(), mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.entropy, scipy.stats.entropy(expected, axis=1), atol=1e-5)
    ensemble.temperature = 1
    without = ensemble(pixels)
    torch.testing.assert_close(without.probs.double(), mean, rtol=0, atol=1e-6)
    assert torch.equal(without.mutual_information, found.mutual_information)


def test_what_a_file_holds_is_kept_by_one_program_at_a_time(run, measured, tmp_path, monkeypatch):
    """From reading a result file, or the temperatures, to writing it."""
    held = []

    def watched(module, name):
        function = getattr(module, name)

        def call_it(path, *rest):
            number = os.open(path if path.is_dir() else path.parent, os.O_RDONLY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(name)
            os.close(number)
            return function(path, *rest)

        monkeypatch.setattr(module, name, call_it)

    watched(utils.predictions, "with_earlier")
    watched(utils.run, "kept_temperatures")
    call("diversity", "--resume", run, "--mode", "predict", "--bootstrap", 0, "--save", tmp_path)
    assert set(held) == {"with_earlier", "kept_temperatures"}


def test_temperatures_are_kept_beside_each_other(run, measured, tmp_path):
    """Of other members, or of another average, which is not used; the same ones replace what was there."""
    args = "--mode", "predict", "--bootstrap", 0, "--save", tmp_path / "again"
    one = call("diversity", "--resume", run / "seed_5", *args)["result"]["temperatures"]["ensemble"]
    for _ in range(2):
        call("diversity", "--resume", run, *args, "--average", "logits")
    content = json.loads((run / "temperatures.json").read_text())["temperatures"]
    assert [(len(record["weights"]), record["average"]) for record in content] == [
        (3, "probs"),
        (1, "probs"),
        (3, "logits"),
    ]
    (run / "temperatures.json").write_text(json.dumps({"temperatures": content[::-1]}))
    assert load_ensemble(run).temperature == measured["ensemble"]
    assert load_ensemble(run / "seed_5").temperature == one


@pytest.mark.parametrize("change", [{"versions": {"logits": 0, "predict": 2}}, {"temperature": "2"}, {"weights": []}])
def test_a_temperature_that_does_not_fit_is_not_used(run, measured, change, capsys):
    path = run / "temperatures.json"
    record = json.loads(path.read_text())["temperatures"][0]
    path.write_text(json.dumps({"temperatures": [7, record | change]}))
    assert load_ensemble(run).temperature == 1
    assert ("another version" if "versions" in change else "no temperature") in capsys.readouterr().err


def test_a_run_that_may_only_be_read(run, tmp_path, monkeypatch, capsys):
    def refuse(folder, record):
        raise measure_diversity.RunError(f"{folder}: could not be written")

    monkeypatch.setattr(measure_diversity, "keep_temperature", refuse)
    assert call("diversity", "--resume", run, "--save", tmp_path, "--mode", "predict", "--bootstrap", 0)
    assert f"note: the temperature is not kept with the run: {run}" in capsys.readouterr().err


def test_checkpoints_of_others(tmp_path, capsys):
    """The authors' form names neither network nor data; of ours, a folder's classes and deviations count."""
    ours = members_of(tmp_path, "resnet18")
    theirs = [tmp_path / f"theirs_{path.name}" for path in ours]
    for path, other in zip(ours, theirs, strict=True):
        state = {f"module.{name}": value for name, value in load_checkpoint(path)["state_dict"].items()}
        torch.save({"state_dict": state, "epoch": 3}, other)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    ensemble = load_ensemble(theirs)
    assert "taken for a network of cifar10" in capsys.readouterr().err
    assert torch.equal(ensemble(pixels).probs, load_ensemble(ours)(pixels).probs)
    assert ensemble.classes[:2] == ["airplane", "automobile"]
    other = save_member(tmp_path / "seven.pth.tar", 0, "digits", 7)
    torch.save({"state_dict": load_checkpoint(other)["state_dict"]}, other)
    with pytest.raises(
        InputError, match=r"seven.* does not say which data set .*7 classes.*name it by data \(--data\)"
    ):
        load_ensemble(other)
    with pytest.raises(InputError, match=r"7 classes.*; digits has 10 classes"):
        load_ensemble(other, data="digits")


def test_names_of_classes(tmp_path):
    assert {name: len(names.split()) for name, names in CLASS_NAMES.items()} == {
        name: info.num_classes for name, info in DATASETS.items() if name != "tiny_imgnet"
    }
    assert load_ensemble(members_of(tmp_path, "vit", 1)).classes[-2:] == ["Bag", "Ankle boot"]
    assert load_ensemble(members_of(tmp_path / "wrn", "wrn", 1)).classes[1] == "aquarium fish"
    path = tmp_path / "seed_0" / "model_best.pth.tar"
    path.parent.mkdir()
    members_of(tmp_path, "tiny", 1)[0].rename(path)
    assert load_ensemble(path).classes == [str(i) for i in range(200)]
    names = [f"n{i:08d}" for i in range(200)]
    (tmp_path / "args.json").write_text(json.dumps({"seed": [0], "data": "tiny_imgnet", "partition": "released"}))
    (tmp_path / "environment.json").write_text(json.dumps({"data": {"files": [{"path": "x", "classes": names}]}}))
    assert load_ensemble(tmp_path).classes == names


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((8, 8, 1), np.uint8), r"expected uint8 \[N, H, W, C\] or float .*got uint8 \[8, 8, 1\]"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"got uint8 \[2, 1, 8, 8\]"),
        (np.zeros((2, 8, 8, 1), np.float32), r"got float32 \[2, 8, 8, 1\]"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.int64), "got torch.int64"),
        (torch.full((2, 1, 8, 8), 255.0), "floats from 0 to 1, neither normalised nor of 0 to 255, got 255 to 255"),
        (torch.full((2, 1, 8, 8), float("nan")), "floats from 0 to 1"),
        (np.zeros((2, 0, 8, 1), np.uint8), "a pixel or more, got 0x8"),
        ([[0]], "expected a tensor or an array of numpy, got list"),
    ],
)
def test_other_forms_are_refused(run, images, words):
    with pytest.raises(ValueError, match=words):
        load_ensemble(run)(images)


def test_what_cannot_be_loaded(run, tmp_path):
    for path, words in (([], "path: expected a run"), (tmp_path / "x", "no such file"), (tmp_path, "is missing")):
        with pytest.raises(InputError, match=words):
            load_ensemble(path)
    with pytest.raises(InputError, match="checkpoint: expected one of last, best, averaged, got 'newest'"):
        load_ensemble(run, checkpoint="newest")
    with pytest.raises(InputError, match=r"--checkpoint last: chooses in folders, and --resume .* is 'best'; leave"):
        load_ensemble(run / "seed_3/model_best.pth.tar", checkpoint="last")


@pytest.mark.parametrize(("height", "width", "size"), [(40, 31, 8), (9, 30, 16), (64, 64, 64), (200, 150, 32)])
def test_scaling_is_that_of_a_folder(height, width, size, tmp_path):
    """Within one of Pillow's 256 levels, and floats as uint8."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = torch.from_numpy(decode(str(tmp_path / "image.png"), size)).int()
    found = scaled(torch.from_numpy(pixels)[None], size)
    assert found.dtype == torch.uint8
    assert (found[0].int() - expected).abs().max() <= 1
    floats = scaled(torch.from_numpy(pixels)[None].float(), size)
    assert (floats[0] - expected).abs().max() <= 1.01


def test_images_of_other_sizes_and_channels(run, capsys):
    """Said once each, and the same as what one would do by hand."""
    ensemble, random = load_ensemble(run), np.random.default_rng(0)
    large = random.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    by_hand = [np.asarray(Image.fromarray(one[:, 5:25]).convert("L")) for one in large]
    by_hand = [Image.fromarray(one).resize((8, 8), Image.Resampling.BILINEAR) for one in by_hand]
    by_hand = np.stack([np.asarray(one) for one in by_hand])[..., None]
    found, expected = ensemble(large), ensemble(by_hand)
    torch.testing.assert_close(found.probs, expected.probs, rtol=0, atol=0.02)
    ensemble(large)
    said = capsys.readouterr().err
    assert said.count("images of 20x30 pixels: the middle square is scaled to 8x8") == 1
    assert said.count("images of 3 channels: turned grey") == 1
    grey = Image.fromarray(large[0]).convert("L")
    np.testing.assert_array_equal(ensemble.coloured(torch.from_numpy(large[:1]))[0, :, :, 0], np.asarray(grey))


def test_a_border_is_put_around_pictures_of_fashion_mnist(tmp_path):
    """As it is around the set's images of 28x28; inputs of 32x32 have it."""
    ensemble = load_ensemble(members_of(tmp_path, "vit"))
    files.write_fashion_mnist(tmp_path / "fashion-mnist")
    pixels = load_data("fashion_mnist", tmp_path).test.pixels(slice(None))
    inner = pixels[:, 2:30, 2:30]
    assert not torch.equal(pixels, torch.zeros_like(pixels))
    assert torch.equal(ensemble(inner).probs, ensemble(pixels).probs)
    for name, images in (("inner", inner), ("whole", pixels)):
        Image.fromarray(images[0, :, :, 0].numpy()).save(tmp_path / f"{name}.png")
        picture = predict.read_picture(str(tmp_path / f"{name}.png"), ensemble)
        assert torch.equal(picture.pixels, pixels[:1])
        assert not picture.other_size
        assert not picture.other_colour


def test_a_folder_is_predicted_as_it_is_measured(tmp_path):
    """Of 128 pixels and more the stored images are larger, and their middle is taken; the checkpoint has the rest."""
    files.write_image_folder(tmp_path / "pictures", {"ape": 12, "bee": 12}, size=150)
    path = save_member(tmp_path / "0.pth.tar", 0, "folder", 2, 64, 128, 3, "torchvision:shufflenet_v2_x0_5")
    data = load_data("folder", tmp_path / "pictures", image_size=128)
    save_checkpoint(path, load_checkpoint(path) | data.inputs)
    ensemble = load_ensemble(path)
    assert ensemble.classes == ["ape", "bee"]
    assert (ensemble.picture_size, ensemble.image_size) == (147, 128)
    names = predict.find_images([tmp_path / "pictures" / "ape"])
    assert len(names) == 12
    for size, other in ((128, True), (147, False), (150, True)):  # of the inputs: it is scaled, and its middle taken
        Image.new("RGB", (size, size)).save(tmp_path / "x.png")
        assert predict.read_picture(str(tmp_path / "x.png"), ensemble).other_size == other
    found = {picture.pixels.numpy().tobytes() for picture in next(predict.read_pictures(names, ensemble))}
    measured = data.test.pixels(slice(None))[data.test.labels == 0].numpy()
    assert len(measured) == 2
    assert {image.tobytes() for image in measured} <= found
    expected = logits_of(ensemble.members[0], data.test)[0].softmax(1)
    torch.testing.assert_close(ensemble(data.test.pixels(slice(None))).probs, expected, rtol=0, atol=1e-6)


# scripts/predict.py


def predicted(*argv):
    cli.run(predict.main, predict.parse_args([str(word) for word in argv]))


@pytest.fixture
def pictures(tmp_path):
    """Two digits, a photo of another size and mode, a text, and what systems leave behind."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    pixels = load_data("digits").test.pixels(slice(2))[..., 0].numpy()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(folder / "below" / "photo.png")
    (folder / "notes.png").write_text("none")
    (folder / ".DS_Store").write_text("none")
    return folder


def test_predict(run, measured, pictures, tmp_path, capsys):
    predicted("--resume", run, "--images", pictures, pictures / "0.png", "--csv", tmp_path / "table.csv")
    out, said = capsys.readouterr()
    found = load_ensemble(run)(load_data("digits").test.pixels(slice(2)))
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "photo.png"]
    for i, row in enumerate(rows[:2]):
        assert int(row["class"]) == found.predicted[i]
        assert float(row["probability"]) == pytest.approx(found.probs[i].max().item(), abs=1e-6)
        assert float(row["entropy"]) == pytest.approx(found.entropy[i].item(), abs=1e-5)
        assert float(row["mutual_information"]) == pytest.approx(found.mutual_information[i].item(), abs=1e-5)
        agree = (found.member_probs[:, i].argmax(1) == found.predicted[i]).sum().item()
        assert (int(row["agree"]), row["members"]) == (agree, "3")
        assert f"{agree}/3  {pictures / f'{i}.png'}" in out
    assert "note: 1 of 3 images are of another size: the middle square is scaled to 8x8" in said
    assert "note: 1 of 3 images are of another mode: turned grey" in said
    assert f"1 of 4 files are left out: {pictures / 'notes.png'} (no image of a format that Pillow reads)" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--images", "empty"], "--images empty: an empty folder"),
        (["--images", "missing.png"], "--images missing.png: no such file or folder"),
        (["--images", "notes.txt"], "--images: none of 1 files is an image that can be read: notes.txt (no image of"),
        (["--images", "notes.txt", "--csv", "no/table.csv"], "--csv no/table.csv: expected a file in a folder"),
        ([], "the following arguments are required: --images"),
        (["--images", "notes.txt", "--data", "cifar10"], "--dataset cifar10 contradicts the checkpoint"),
    ],
)
def test_predict_refuses(run, argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("none")
    with pytest.raises(SystemExit, match="2"):
        predicted("--resume", run, *argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
