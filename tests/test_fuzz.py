"""Any flag and any byte: it works, or it ends with one line and status 1 or 2.

`HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py` tries 20 times as many examples, and other ones each time.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
import measure_diversity
import measure_diversity_variance
import measure_sharpness
import utils.cli
import utils.datasets
import utils.formats
import utils.predictions
from scripts import summarize
from tests import files
from tests.test_measure import save_corrupted, save_member
from tests.test_summarize import SAM, write
from utils import InputError, cli
from utils.checkpoint import load_checkpoint
from utils.datasets import load_data
from utils.member import LOG, log_text, restore_log
from utils.run import Run, read_settings

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def examples(count):
    """The settings of one test: the same examples each time, or many."""
    return settings(
        max_examples=count * (20 if LONG else 1),
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Flags
SCRIPTS = {
    "main": main,
    "diversity": measure_diversity,
    "variance": measure_diversity_variance,
    "sharpness": measure_sharpness,
}


def options_of(script):
    """All options of a script, from the parser that it builds."""
    found = []
    with mock.patch.object(cli.Parser, "parse_known_args", autospec=True) as parse:
        parse.side_effect = lambda parser, *_: found.append(parser) or exit()
        with contextlib.suppress(SystemExit):
            script.parse_args([])
    return [action for action in found[0]._actions if action.dest != "help"]


OPTIONS = {name: options_of(script) for name, script in SCRIPTS.items()}
PLACES = ["file", "folder", "missing", "file/below", "a loop", "no rights", "run", "run/seed_1", "member", "pipe"]
PLACES += ["empty", "/dev/null", "/dev/zero", "x" * 300, "numbers.npy"]
WORDS = ["", " ", "0", "-1", "1", "2", "3", "9", "1.5", "1e9", "1e-400", "1e400", "nan", "inf", "-inf", "0x10", "1_000"]
WORDS += [
    "٣",
    "²",
    "True",
    "false",
    "None",
    "all",
    "13 17",
    "13 13",
    "13,17",
    "a,b",
    "--",
    "-",
    "=",
    "--sam",
    "9" * 5000,
]
WORDS += ["%s %(x)s", "(", "[", "weight$", "\x1b[2J", "\ud800", "é\u2028", "{}", "$HOME", "~", "*"]
WORDS += [str(2**32), str(2**63), str(10**30)]
# No name leads out of the folder that the tests work in.
TEXT = st.text(max_size=10).filter(lambda text: "/" not in text and ".." not in text and "\0" not in text)


@st.composite
def command_lines(draw, name):
    """Up to five options with values of any kind, or what is no option."""
    words = []
    for option in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=5)):
        good = [str(choice) for choice in option.choices or getattr(option, "among", None) or ()]
        value = st.one_of(
            st.sampled_from(good or ["1"]),
            st.sampled_from(WORDS),
            st.sampled_from(PLACES),
            TEXT,
            st.integers().map(str),
            st.integers(0, 20).map(str),
            st.floats().map(str),
        )
        flag = draw(st.sampled_from(option.option_strings))
        if draw(st.booleans()):
            flag = flag.replace("_", "-")
        if draw(st.booleans()):
            words.append(f"{flag}={draw(value)}")
        else:
            words += [flag, *draw(st.lists(value, max_size=3))]
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(TEXT))
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with all that a path can be."""
    path = tmp_path_factory.mktemp("fuzz") / "a" / "b"
    path.mkdir(parents=True)
    (path / "file").write_text("text")
    (path / "folder").mkdir()
    (path / "a loop").symlink_to("a loop")
    (path / "no rights").mkdir(mode=0)
    os.mkfifo(path / "pipe")
    (path / "empty").touch()
    np.save(path / "numbers.npy", np.arange(20))
    for seed in (1, 2):
        save_member(path / "run" / f"seed_{seed}" / "model_best.pth.tar", seed)
    (path / "run" / "args.json").write_text(json.dumps({"seed": [1, 2], "data": "digits"}))
    save_member(path / "member", 3)
    yield path
    (path / "no rights").chmod(0o700)


def ends_well(call):
    """What a call printed and returned; it may only end as a script is allowed to."""
    output, errors, status, result = io.StringIO(), io.StringIO(), 0, None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            result = call()
        except SystemExit as end:
            status = end.code
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith(("note: ", "warning: "))]
    assert status in (0, 1, 2)
    assert len(lines) == (status != 0), (status, lines)
    assert not status or re.match(r"[\w.-]+: error: .", lines[0])
    return status, result


class Started(Exception):  # noqa: N818
    """It got as far as the work itself."""


def load(name, data_path, device="cpu", train_idx_path=None, val_idx_path=None, download=False, *rest, **more):
    """The real one, but for the network."""
    return load_data(name, data_path, "cpu", train_idx_path, val_idx_path, False, *rest, **more)


def open_only(run):
    with run.open():
        raise Started


def measurement_only(*arguments, **options):
    utils.predictions.Measurement(*arguments, **options)
    raise Started


@contextlib.contextmanager
def without_work(script):
    """Training, measuring, downloads and settings of the process are away; everything before them is real."""
    work = {"load_data": load, "train_ensemble": open_only} if script is main else {"Measurement": measurement_only}
    with contextlib.ExitStack() as stack:
        for name, replacement in work.items():
            stack.enter_context(mock.patch.object(script, name, replacement))
        stack.enter_context(mock.patch.object(utils.predictions, "load_data", load))
        stack.enter_context(mock.patch.object(torch, "set_num_threads"))
        yield


def means_what_it_says(words, args, options):
    """Compare the numbers and words of a command line that was accepted with the settings that came out of it."""
    flags = [word.partition("=")[0].replace("-", "_") for word in words]
    for option in options:
        names = {name.replace("-", "_") for name in option.option_strings}
        places = [i for i, flag in enumerate(flags) if flag in names]
        if not places or option.nargs in ("+", "?"):
            continue
        _, equals, text = words[places[-1]].partition("=")
        text = text if equals else words[places[-1] + 1]
        value = getattr(args, option.dest)
        if isinstance(value, Path):
            assert value == Path(text).expanduser()
            assert text
        else:
            assert value == type(value)(text)
            assert isinstance(value, str) or text.isascii()


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags(name, folder, monkeypatch):
    script = SCRIPTS[name]

    @examples(40)
    @given(command_lines(name))
    def check(words):
        if script is not main and not any(word.startswith("--resume") for word in words):
            words = [*words, "--resume", "run"]
        # What an accepted command line makes must not be there for the next one.
        before = set(Path().rglob("*"))

        def call():
            args = script.parse_args(words)
            told = copy.copy(args)
            with contextlib.suppress(Started):
                cli.run(script.main, args)
            return told

        with without_work(script):
            status, args = ends_well(call)
        if status == 0 and "--" not in words and not any(word.startswith("--resume=") for word in words):
            means_what_it_says(words, args, OPTIONS[name])
        for path in sorted(set(Path().rglob("*")) - before, reverse=True):
            path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "folder"))  # what ~ stands for
    check()


def test_a_folder_without_rights(tmp_path_factory, monkeypatch):
    """Nobody may enter it: as every user but root sees it."""
    closed = tmp_path_factory.mktemp("closed")
    closed.chmod(0)
    monkeypatch.chdir("/")
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        for script in SCRIPTS.values():
            for words in (
                ["--resume", str(closed / "x")],
                ["--resume", str(closed)],
                ["--data_path", str(closed / "x")],
            ):
                words = words if "--resume" in words else [*words, "--resume", "/nowhere"]
                with without_work(script):
                    assert ends_well(lambda s=script, w=words: cli.run(s.main, s.parse_args(w)))[0] in (1, 2)
    finally:
        os.seteuid(was)
        closed.chmod(0o700)


# Files
@st.composite
def mutations(draw):
    """A few changes of bytes, as a function of the content: each is a place and a size, as shares of the whole."""
    share = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(["flip", "flip", "flip", "cut", "insert", "swap", "end", "zero", "start"])
    steps = draw(st.lists(st.tuples(kinds, share, share, st.integers(0, 2**32)), min_size=1, max_size=3))

    def mutate(content):
        for kind, place, size, seed in steps:
            if not content:
                break
            # Half of the changes in the first bytes, where headers stand.
            start = int(place * len(content)) if seed % 2 else int(place * min(len(content), 256))
            length = 1 + int(size**4 * (len(content) - start))
            some = random.Random(seed)
            head, middle, tail = content[:start], content[start : start + length], content[start + length :]
            if kind == "flip":
                middle = bytes([middle[0] ^ 1 << some.randrange(8)]) + middle[1:]
            elif kind == "cut":
                middle = b""
            elif kind == "insert":
                middle = some.randbytes(min(length, 64)) + middle
            elif kind == "swap":
                middle, tail = tail[:length], middle + tail[length:]
            elif kind == "end":
                middle = tail = b""
            elif kind == "zero":
                middle = bytes(length)
            else:
                head = b""
            content = head + middle + tail
        return content

    return mutate


def of_file(path, mutate):
    """Write the file anew, with changes; the bytes that were there and those that are."""
    good = path.read_bytes()
    bad = mutate(good)
    path.write_bytes(bad)
    return good, bad


@contextlib.contextmanager
def mutated(path, mutate):
    """Within this the file holds other bytes."""
    good, bad = of_file(path, mutate)
    try:
        yield bad
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(good)


def read(call):
    """The result of a reader that may refuse in one line."""
    try:
        return call()
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 5000
    return None


def fuzz(check, count=14):
    """Run a check on many mutations."""
    examples(count)(given(mutations())(check))()


def same_state(a, b):
    return list(a) == list(b) and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.values(), b.values(), strict=True)
    )


@pytest.mark.parametrize("form", ["ours", "the authors'"])
def test_checkpoints(form, tmp_path):
    """What is loaded is what was saved: every change of a tensor is noticed."""
    path = save_member(tmp_path / "x", 1)
    saved = load_checkpoint(path)
    if form != "ours":
        torch.save({"state_dict": saved["state_dict"], "epoch": 3}, path)
        saved = load_checkpoint(path)

    def check(mutate):
        with mutated(path, mutate):
            loaded = read(lambda: load_checkpoint(path, ours=form == "ours"))
        if loaded is not None:
            assert same_state(loaded["state_dict"], saved["state_dict"])
            assert {**loaded, "state_dict": 0} == {**saved, "state_dict": 0}

    fuzz(check, 24)


def numpys(content):
    """The array of the bytes of an .npy file, by numpy's own reader."""
    file = io.BytesIO(content)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array


@pytest.mark.filterwarnings("ignore")
def test_arrays(tmp_path):
    path, other = tmp_path / "train.npy", tmp_path / "val.npy"
    np.save(path, np.arange(40))
    np.save(other, np.arange(40, 50))

    def check(mutate):
        with mutated(path, mutate) as content:
            parts = read(lambda: utils.datasets.split_indices(898, path, other))
        if parts is not None:
            assert (parts[0] == numpys(content)).all()

    fuzz(check)


@pytest.mark.filterwarnings("ignore")
def test_blocks(tmp_path):
    folder, data = save_corrupted(tmp_path / "digits-C", images=2, corruptions=["fog"]), load_data("digits")

    def check(mutate):
        for name in ("fog", "labels"):
            with mutated(folder / f"{name}.npy", mutate) as content:
                found = read(
                    lambda: [np.array(array) for array in utils.datasets.corrupted_arrays(folder, data, "fog")]
                )
            if found is not None:
                assert (found[name == "labels"] == numpys(content)).all()

    fuzz(check)


def test_caches(tmp_path):
    """Dropped, or what was written."""
    path, logits = tmp_path / "x.npz", np.random.default_rng(0).random((7, 10), dtype=np.float32)
    np.savez(path, about=np.array("about"), logits=logits)
    assert (utils.predictions.read_cache(path, "about", (7, 10))["logits"] == logits).all()

    def check(mutate):
        with mutated(path, mutate):
            found = utils.predictions.read_cache(path, "about", (7, 10))
        assert found is None or (found["logits"] == logits).all()

    fuzz(check)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(zipped, tmp_path):
    folder, end = files.write_fashion_mnist(tmp_path, train=20, test=10, zipped=zipped), ".gz" * zipped
    digest = load_data("fashion_mnist", folder).record["sha256_of_arrays_and_split"]

    def check(mutate):
        for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            with mutated(folder / (name + end), mutate) as content:
                data = read(lambda: load_data("fashion_mnist", folder))
            if data is None:
                continue
            assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 10)
            if zipped:
                assert data.record["sha256_of_arrays_and_split"] == digest
            elif "labels" in name:
                assert data.test.labels.tolist() == list(content[8:])

    fuzz(check)


def test_cifar(tmp_path):
    files.write_cifar(tmp_path, images=3)
    path = tmp_path / "data_batch_1"

    def check(mutate):
        with mutated(path, mutate) as content:
            found = read(lambda: utils.formats.cifar_batch(path, content, "labels", 10))
        if found is not None:
            batch = pickle._Unpickler(io.BytesIO(content), encoding="latin1").load()
            assert (found[0].transpose(0, 3, 1, 2).reshape(-1, 3072) == batch["data"]).all()
            assert found[1].tolist() == list(batch["labels"])

    fuzz(check, 30)


def test_images(tmp_path):
    folder = files.write_tiny_imagenet(tmp_path, classes=2)
    path = next((folder / "train").glob("*/images/*"))

    def check(mutate):
        with mutated(path, mutate):
            pixels = read(lambda: utils.formats.read_jpeg(path))
        assert pixels is None or (pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8)

    fuzz(check)


@pytest.mark.parametrize("name", ["val/val_annotations.txt", "wnids.txt"])
def test_lists_of_images(name, tmp_path):
    folder = files.write_tiny_imagenet(tmp_path, classes=2, per_class=5)

    def check(mutate):
        with mutated(folder / name, mutate):
            data = read(lambda: load_data("tiny_imgnet", folder))
        assert data is None or (len(data.train), len(data.test)) == (9, 4)

    fuzz(check, 8)


def test_settings(tmp_path):
    """args.json: read by all scripts, and taken for a command line by `main.py --resume`."""
    path = tmp_path / "args.json"
    args = vars(main.parse_args(["--sam", "--flat_ratio", "0.5", "--save_path", str(tmp_path)]))
    path.write_text(json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in args.items()}))

    def check(mutate):
        with mutated(path, mutate):
            found = read(lambda: read_settings(tmp_path))
            status, args = ends_well(lambda: main.parse_args(["--resume", str(tmp_path)]))
        assert found is None or all(type(seed) is int and 0 <= seed < 2**32 for seed in found["seed"])
        assert (found is not None) or status == 2
        if status == 0:
            assert args.seed == found["seed"]
            assert type(args.epochs) is int
            assert type(args.lr) is float

    fuzz(check, 20)


def test_the_record_of_the_data(tmp_path):
    args = main.parse_args(["--seed", "1", "--save_path", str(tmp_path)])
    run = Run(main.settings_of(args), SimpleNamespace(record={"sha256_of_arrays_and_split": "a" * 64}))
    (tmp_path / "args.json").write_text(json.dumps(run.recorded))
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({"torch": "2", "data": {"sha256_of_arrays_and_split": "a" * 64}}))

    def check(mutate):
        with mutated(path, mutate) as content:
            accepted = read(lambda: run.check_same() or True)
        assert not accepted or b"a" * 64 in content or b"\\u0061" in content

    fuzz(check)


def test_logs(tmp_path):
    """The lines are those of the checkpoint, whatever the file says; only the wall times are its own."""
    path = tmp_path / "log.jsonl"
    lines = [dict(zip(LOG, [epoch, 0.1, 2.0, 0.5, 2.1, 0.4, 0.0], strict=True)) for epoch in range(3)]
    path.write_text("".join(json.dumps({"epoch": 0, "seconds": 1.5} | line) + "\n" for line in lines))

    def check(mutate):
        log = copy.deepcopy(lines)
        with mutated(path, mutate), contextlib.redirect_stderr(io.StringIO()):
            restore_log(path, log)
            assert path.read_text() == log_text(log)
        assert [{name: line[name] for name in LOG} for line in log] == lines
        assert all(line["seconds"] is None or isinstance(line["seconds"], float) for line in log)

    fuzz(check)


def test_parts_of_sharpness(tmp_path):
    path, about = tmp_path / "x.json", {"part": "fisher", "rho0": 0.5}
    path.write_text(json.dumps({"about": about, "result": {"value": 1.25, "images": 3}}, indent=2))

    def check(mutate):
        with mutated(path, mutate):
            found = measure_sharpness.read_part(path, about)
        assert found is None or found["value"] is None or isinstance(found["value"], float)

    fuzz(check)


def test_results(tmp_path):
    """The tables of what measure_*.py wrote."""
    write(tmp_path / "a", SAM, (1, 2), 0.8, 2.0)
    path = tmp_path / "a" / "diversity.json"

    def check(mutate):
        with mutated(path, mutate):
            ends_well(lambda: cli.run(summarize.main, summarize.parse_args([str(tmp_path / "a")])))

    fuzz(check, 20)
