"""The shell scripts: in an old bash, under another shell, in a clone with CRLF, and on a half-made environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_ensemble import ROOT

SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))
CALLED = [path for path in SCRIPTS if path.name != "setup.sh"]  # which the others source
AGAIN = '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"'


def name(path):
    return str(path.relative_to(ROOT))


# What the bash of macOS, 3.2, does not have.
NEWER = {
    r"\b(mapfile|readarray|coproc)\b": "4.0",
    r"\b(declare|local|typeset) -[a-zA-Z]*[Agn]": "4.0, 4.3",
    r"\$\{[^}]*(\^|,,|@[A-Za-z])[^}]*\}": "4.0, 4.4",
    r"\|&|&>>": "4.0",
    r";;?&": "4.0",
    r"\[\[? -v ": "4.2",
    r"\bwait -n\b": "4.3",
    r"\$\{\w+: -|\$\{\w+\[-\d": "4.2",
    r"\{0\d*\.\.": "4.0",
    r"\$EPOCH|\$\{?BASHPID|shopt -s (globstar|lastpipe|inherit_errexit)": "4.0",
    r"%\([^)]*\)T": "4.2",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_bash_3_2(path):
    """No newer feature, and no array that may be empty expanded bare, which set -u refuses before bash 4.4."""
    code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert [since for pattern, since in NEWER.items() if re.search(pattern, code)] == []
    empty = set(re.findall(r"(\w+)=\(\)", code))
    bare = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', code)
    assert empty & set(bare) == set()
    for mode in (["bash"], ["bash", "--posix"]):
        done = subprocess.run([*mode, "-n", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "line", ["mapfile -t a", "x=${a,,}", "declare -A a", "a |& b", "[[ -v a ]]", "echo {01..3}", "wait -n", "${a@Q}"]
)
def test_the_patterns_find_what_is_newer(line):
    assert any(re.search(pattern, line) for pattern in NEWER)


@pytest.mark.parametrize("path", CALLED, ids=name)
def test_any_shell_gives_way_to_bash(path):
    """`sh script`: the first command, so that no other shell comes to what it does not know."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith(AGAIN)


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("shell", ["sh", "bash --posix", "bash"])
def test_started_by_another_shell(shell, tmp_path):
    write_program(tmp_path / "bin" / "python", 'printf "%s\\n" "$@"')
    variables = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RESUME": "a run"}
    for script in ("measure/variance.sh", "train/deep_ensemble.sh"):
        command = [*shell.split(), str(ROOT / "scripts" / script), "--device", "a b"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == ["--device", "a b"]


# setup.sh, with a Python that makes environments of nothing: `python` in them says what it was called with.
PYTHON = """
case "$1 $2 $3" in
    "-c import sys;"*) exit ${OLD:-0} ;;
    "-m venv --clear")
        [ -z "${NO_ENSUREPIP:-}" ] || { mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"; exit 1; }
        rm -rf "$4"; mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"
        printf '#!/bin/sh\\ncase "$*" in *"-r "*) exit ${PIP_FAILS:-0} ;; main.py) echo reached ;; esac\\n' \\
            >"$4/bin/python"
        chmod +x "$4/bin/python" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Call a script that sources setup.sh, in a copy of the repository's scripts; its status and output."""
    copy = tmp_path / "a clone"
    copy.mkdir()
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", copy)
    (copy / "scripts" / "x.sh").write_text('source "$(dirname "$0")/setup.sh"\npython main.py\n')
    python = write_program(tmp_path / "bin" / "python3.12", PYTHON)

    def call(**variables):
        environment = os.environ | {"PYTHON": str(python), "HOME": str(tmp_path), "VENV": ""} | variables
        done = subprocess.run(
            ["bash", "scripts/x.sh"],
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    call.folder, call.bin = copy, tmp_path / "bin"
    return call


def test_setup_makes_it_once(setup):
    status, output = setup()
    assert (status, output.splitlines()[-1]) == (0, "reached"), output
    assert "setup: making .venv" in output
    assert setup() == (0, "reached\n")
    (setup.folder / "requirements.txt").write_text("more\n")
    status, output = setup()
    assert "making" not in output
    assert "installing requirements.txt" in output


def no_python(venv):
    (venv / "bin" / "python").unlink()


def link_to_nothing(venv):
    no_python(venv)
    (venv / "bin" / "python").symlink_to("/usr/bin/python3.5-that-was-removed")


def python_that_does_not_run(venv):
    (venv / "installed-requirements.txt").unlink()
    (venv / "bin" / "python").write_text("#!/no/such/interpreter\n")


def no_pip(venv):
    (venv / "installed-requirements.txt").unlink()
    write_program(venv / "bin" / "python", '[ "$1" = -c ]')


def no_description(venv):
    no_python(venv)
    (venv / "pyvenv.cfg").unlink()


@pytest.mark.parametrize("damage", [no_description, no_python, link_to_nothing, python_that_does_not_run, no_pip])
def test_setup_makes_a_half_made_environment_anew(damage, setup):
    setup()
    (setup.folder / ".venv" / "old").touch()
    damage(setup.folder / ".venv")
    status, output = setup()
    assert (status, output.splitlines()[-1]) == (0, "reached"), output
    assert "setup: making .venv" in output
    assert "installing" in output
    assert not (setup.folder / ".venv" / "old").exists()


def test_setup_with_an_environment_of_an_old_python(setup):
    """Made by hand, perhaps with more in it."""
    setup()
    (setup.folder / ".venv" / "installed-requirements.txt").unlink()
    write_program(setup.folder / ".venv" / "bin" / "python", 'case "$1" in -c) exit 1 ;; -V) echo Python 3.8.1 ;; esac')
    status, output = setup()
    assert (status, output) == (2, "setup: .venv: expected Python 3.10 or newer, got Python 3.8.1; remove it\n")


def test_setup_without_ensurepip(setup):
    """Debian without python3-venv: one line says so; once it is there the same command goes on."""
    status, output = setup(NO_ENSUREPIP="1")
    assert status == 2
    assert "setup: .venv could not be made, see above; on Debian and Ubuntu, apt install python3-venv first" in output
    assert setup()[0] == 0


def test_setup_when_pip_fails(setup):
    status, output = setup(PIP_FAILS="1")
    assert status == 2
    assert "setup: requirements.txt could not be installed" in output
    assert "installing" in setup()[1]


def test_setup_empties_no_folder_that_is_something_else(setup):
    (setup.folder / "mine" / "bin").mkdir(parents=True)
    (setup.folder / "mine" / "thesis").touch()
    status, output = setup(VENV="mine")
    assert status == 2
    assert output.startswith("setup: mine: expected a virtual environment, got something else; remove it")
    assert output.count("\n") == 1
    assert (setup.folder / "mine" / "thesis").exists()


def test_setup_elsewhere(setup, tmp_path):
    """A ~ that no shell has expanded, and a CDPATH, with which cd prints where it went."""
    status, output = setup(VENV="~/envs/a", CDPATH=".:/")
    assert (status, output.splitlines()[-1]) == (0, "reached"), output
    assert (tmp_path / "envs" / "a" / "pyvenv.cfg").exists()
    assert not (setup.folder / "~").exists()


@pytest.mark.parametrize("variables", [{"OLD": "1"}, {"PYTHON": "/no/python"}])
def test_setup_with_another_python(variables, setup):
    status, output = setup(**variables)
    assert (status, output) == (2, "setup: expected Python 3.10 or newer; name one by PYTHON=/path/to/python\n")


@pytest.mark.parametrize("system", ["MINGW64_NT-10.0-19045", "MSYS_NT-10.0", "CYGWIN_NT-10.0"])
def test_setup_on_windows(system, setup):
    write_program(setup.bin / "uname", f"echo {system}")
    status, output = setup(PATH=f"{setup.bin}:{os.environ['PATH']}")
    assert (status, output) == (
        2,
        f"setup: expected Linux or macOS, got {system}; on Windows use WSL, see INSTALL.md\n",
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_clone_by_a_git_that_writes_crlf(tmp_path):
    """core.autocrlf=true, the default of Git for Windows, whose clones are also used from WSL."""

    def git(*words, cwd=tmp_path):
        settings = [
            "-c",
            "core.autocrlf=true",
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.invalid",
            "-c",
            "core.safecrlf=false",
        ]
        subprocess.run(["git", *settings, *words], cwd=cwd, check=True, capture_output=True)

    git("init", "first")
    files = [".gitattributes", "scripts/setup.sh", "scripts/quickstart.sh", "main.py", "requirements.txt"]
    (tmp_path / "first" / "scripts").mkdir()
    for file in files:
        shutil.copy(ROOT / file, tmp_path / "first" / file)
    picture = bytes(range(256)) + b"\r\n\0"
    (tmp_path / "first" / "x.png").write_bytes(picture)
    git("add", ".", cwd=tmp_path / "first")
    git("commit", "-m", "x", cwd=tmp_path / "first")
    git("clone", "first", "second")
    for file in files:
        assert (tmp_path / "second" / file).read_bytes() == (ROOT / file).read_bytes(), file
    assert (tmp_path / "second" / "x.png").read_bytes() == picture


def test_pip_install(tmp_path):
    """The requirements, and the one file that stands alone; no `utils` or `models` among everybody's packages."""
    pytest.importorskip("setuptools", minversion="70.1")  # older ones require wheel besides
    pytest.importorskip("pip")
    for file in ("pyproject.toml", "requirements.txt", "sam.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
    command = [sys.executable, "-m", "pip", "install", *options, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "site").glob("*") if "info" not in path.name} - {"__pycache__"} == {
        "sam.py"
    }
    about = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    required = [line for line in Path(ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(re.findall(r"Requires-Dist: (.*)", about)) == sorted(required)
