"""What all command lines share: paths, devices, and standard output and error that people have."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
import measure_diversity
from models import create_model, full_name
from tests.test_ensemble import ROOT
from utils import InputError, cli, distributed, first_line, ood, processes, some
from utils.inference import load_ensemble

HOME = "/home/of/a/user"


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)


def why_not(kind, text):
    """The reason for which a text is refused."""
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/runs/a", f"{HOME}/runs/a"),
        ("~", HOME),
        ("./~", f"{Path.cwd()}/~"),
        ("./~nobody/x", f"{Path.cwd()}/~nobody/x"),
        ("a/~", "a/~"),
        ("läufe/a b", "läufe/a b"),
    ],
)
def test_home_folder(text, expected):
    """Also where a path that was expanded once comes to where it is expanded again."""
    found = cli.path(text)
    assert found == Path(expected)
    assert cli.path(str(found)) == found


@pytest.mark.parametrize("script", ["measure_diversity", "scripts.experiment"])
def test_help_shows_no_default_that_says_nothing(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\(default: (|\[\]|\[None\]|None)\)", text)
    assert "(default: " in text


NOBODY = "'~no-such-user/x': there is no such user; for a folder of that name write ./~no-such-user/x"


def test_home_of_nobody(capsys):
    assert why_not(cli.path, "~no-such-user/x") == NOBODY
    # A network's file, other data, and a saved ensemble take paths within other words, or from a program.
    net = NOBODY.replace("/x", "/net.py")
    for words, parse in (
        (["--model", "~no-such-user/net.py:make"], main.parse_args),
        (["--resume", "x", "--mode", "ood", "--ood", "folder:~no-such-user/x"], measure_diversity.parse_args),
        (["--resume", "x", "--model", "~no-such-user/net.py:make"], measure_diversity.parse_args),
    ):
        with pytest.raises(SystemExit) as end:
            parse(words)
        assert end.value.code == 2
        flag, reason = words[-2], net if "net.py" in words[-1] else NOBODY
        assert capsys.readouterr().err.endswith(f"error: {flag}: {reason}\n")
    with pytest.raises(ValueError, match=re.escape(f"model: {net}")):
        create_model("~no-such-user/net.py:make", 10)
    for place in ("~no-such-user/x", Path("~no-such-user/x"), ["~no-such-user/x"]):
        with pytest.raises(InputError, match=re.escape(f"path: {NOBODY}")):
            load_ensemble(place)


def test_a_folder_that_is_called_like_a_user(tmp_path, monkeypatch):
    """The way out that the message names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~net").mkdir()
    (tmp_path / "~net" / "net.py").write_text("from torch import nn\n\ndef make(n):\n    return nn.Linear(1, n)\n")
    assert full_name("./~net/net.py:make").startswith(f"{tmp_path}/~net/net.py:make@")
    args = measure_diversity.parse_args(["--resume", "x", "--mode", "ood", "--ood", "folder:./~net"])
    assert ood.split_word(args.ood[0]) == ("folder", tmp_path / "~net")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/~net/model_best.pth.tar is missing")):
        load_ensemble(cli.path("./~net"))


def test_all_paths_of_all_scripts_are_of_this_kind():
    """Or what ~ means would depend on the script."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        assert not re.search(r"type=(pathlib\.)?Path\b|, Path, \"", file.read_text()), file


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("runs/a\r", r"runs/a\r"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\x85b", r"a\x85b"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_control_characters(text, shown, capsys):
    with pytest.raises(SystemExit) as end:
        main.parse_args(["--save_path", text])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(f": error: --save_path: expected a path without control characters, got '{shown}'\n")


@pytest.mark.parametrize("name", ["a b", "läufe", "a\u200db", "a\u00a0b", "a|b", "$(x)", "-"])
def test_characters_that_are_fine(name):
    assert cli.path(name) == Path(name)


def test_links_whose_target_is_not_there(tmp_path):
    (tmp_path / "link").symlink_to("/mnt/disk that is not mounted")
    for place in (tmp_path / "link", tmp_path / "link" / "run" / "a"):
        assert "link is a link to /mnt/disk that is not mounted, which does not exist" in why_not(cli.path, str(place))
    (tmp_path / "target").mkdir()
    (tmp_path / "good").symlink_to("target")
    assert cli.path(str(tmp_path / "good" / "new")) == tmp_path / "good" / "new"


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_devices(text):
    assert main.parse_args(["--device", text]).device == text


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda 1", "0", "CPU", "cuda:1,2", "cuda:٣"])
def test_words_that_are_no_device(text):
    assert why_not(cli.device, text) == f"expected auto, cpu, cuda, cuda:N or mps, got '{text}'"


def test_one_gpu_of_several(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.start_device("cuda:1", None) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    assert distributed.start_device("cuda", None) == torch.device("cuda")
    with pytest.raises(InputError, match="--device cuda:2: expected cuda:0 to cuda:1, torch finds 2 here"):
        distributed.start_device("cuda:2", None)


def test_a_message_of_several_lines_is_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.fail("first  x\n  second\tthird \x1b[2J", 2)
    assert capsys.readouterr().err.endswith(r"error: first  x second\tthird \x1b[2J" + "\n")


@pytest.mark.parametrize("forks", [False, True])
def test_only_scripts_that_fork_begin_with_one_thread(forks, monkeypatch):
    begun = []
    monkeypatch.setattr(processes, "begin", lambda: begun.append(True))
    cli.run(lambda args: None, None, forks=forks)
    assert begun == [True] * forks


# Standard output and error: what a script prints goes through the streams that its parser opens.
PROGRAM = """
import os, sys
from utils import cli
cli.Parser("x")
def main(args):
    print("0.5 ± 0.1 ä \\udce9", flush=len(sys.argv) > 1)
    with open(os.environ["TO"], "w") as file:
        file.write("done")
cli.run(main, None)
"""


def program(tmp_path, shell, encoding="utf-8", words=""):
    """Run it in a shell, with what stands around IT; its output, its errors, and whether it came to its end."""
    command = shell.replace("IT", f'"{sys.executable}" -c "$PROGRAM" {words}')
    variables = os.environ | {"PROGRAM": PROGRAM, "TO": str(tmp_path / "to"), "PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=variables, capture_output=True)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr.decode(), (tmp_path / "to").is_file()


def test_a_terminal_without_the_characters(tmp_path):
    status, output, errors, finished = program(tmp_path, "IT", "ascii")
    assert (status, output, errors, finished) == (0, b"0.5 +- 0.1 \\xe4 \\udce9\n", "", True)


@pytest.mark.parametrize("words", ["", "flush"])
def test_a_reader_that_went_away(words, tmp_path):
    """As in `main.py | head`; printing at once, or at the end."""
    status, _, errors, finished = program(tmp_path, "IT | true; exit ${PIPESTATUS[0]}", words=words)
    assert (status, finished) == (0, True)
    assert errors in ("", "note: standard output is closed; going on without it\n")  # "": it was quicker


def test_a_closed_pipe_and_a_hung_up_terminal():
    read, write = os.pipe()
    os.close(read)
    main_side, terminal = os.openpty()
    os.close(main_side)
    for number in (write, terminal):
        stream = cli._Output(number, "w")
        assert stream.write(b"line\n") == 5
        assert stream.write(b"line\n") == 5
        assert os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev
        stream.close()


@pytest.mark.parametrize("shell", ["IT >&-", "IT >&- 2>&-", "IT <&- >&- 2>&-"])
def test_streams_that_are_closed(shell, tmp_path):
    """What is printed must not go into the next file that is opened."""
    assert program(tmp_path, shell) == (0, b"", "", True)
    assert (tmp_path / "to").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk(tmp_path):
    """What was asked for is not there, so that the status says it."""
    status, _, errors, _ = program(tmp_path, "IT >/dev/full")
    assert status == 1
    assert errors.endswith("error: standard output: No space left on device\n")
    assert errors.count("\n") == 1


def test_some_names_and_how_many_more():
    assert [some("abcde"[:n], 3) for n in (0, 1, 3, 4, 5)] == [
        "",
        "a",
        "a, b, c",
        "a, b, c and 1 more",
        "a, b, c and 2 more",
    ]
    assert some([Path("x"), 2], 1) == "x and 1 more"


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"epochs": 3}, "interrupted; re-run the same command to resume after the last finished epoch"),
        ({"resume": [], "save": None}, "interrupted; what is finished is kept, re-run the same command"),
        ({"save": None}, "interrupted"),
        ({}, "interrupted"),
    ],
)
def test_ctrl_c_says_what_is_true_of_the_script(known, said, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(interrupted, argparse.Namespace(**known))
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().endswith(f"error: {said}")


def test_the_first_line_of_an_error_has_no_colours():
    assert first_line(ValueError("\x1b[96mno\x1b[0m room\nsee the log")) == "no room"
    assert first_line(MemoryError()) == "MemoryError"
