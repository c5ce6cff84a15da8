"""The documents and the code agree: commands, options, paths and snippets; what is cheap runs, at a tiny size."""

import doctest
import glob
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from tests import files
from utils import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "INSTALL.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")])
CODE = re.compile(
    r"^ *```(?P<language>\w*)\n(?P<block>.*?)^ *```"
    r"|^ {4}(?P<indented>(?:python|bash|torchrun) [^\n]*)"
    r"|`(?P<span>[^`]+)`",
    re.MULTILINE | re.DOTALL,
)
ASSIGNMENT = re.compile(r"([A-Z_]+)=")

# What is appended to a command to make it cheap. Other scripts are not run here, only their options are parsed.
TINY = {
    "main.py": [],  # see `tiny`
    "measure_diversity.py": ["--bootstrap", "20"],
    "measure_diversity_variance.py": [],
    "measure_sharpness.py": [
        *("--eval_batch_size", "5", "--batch_num", "2", "--n_iters", "2", "--n_draws", "4", "--hessian_samples", "40"),
        *("--probes", "6", "--top_k", "2", "--ntk_samples", "6"),
    ],
    "scripts/make_corrupted.py": ["--corruptions", "contrast", "--to", "elsewhere", "--data_path", "data"],
    "scripts/summarize.py": [],
    "scripts/plot.py": [],  # but `theory` simulated anew, which tests/test_notebook.py does
    "scripts/benchmark.py": ["--only", "partition", "--repeats", "3"],
}
# Shell scripts that only call python: it is seen how they call it.
RECORDED = [
    "scripts/quickstart.sh",
    "scripts/reproduce_fashion_mnist.sh",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("scripts/[emt]*/*.sh"))),
]
RECORDED.remove("scripts/experiments/paper.sh")  # which is sourced
QUICKSTART = "runs/quickstart/sharpbalance"
COMMAND = re.compile(r"(?<!\S)(?:[A-Z_]+=\S+ )*(?:python \w\S*\.py\b|bash scripts/|torchrun )")


def read(documents=DOCUMENTS):
    """Every piece of code: document, language ("" for code within a sentence), and text; a line each if it is shell."""
    pieces = []
    for document in documents:
        for found in CODE.finditer(document.read_text()):
            if found["span"] is not None:
                pieces.append((document.name, "", " ".join(found["span"].split())))
            elif found["indented"] or found["language"] in ("bash", "sh", "yaml"):
                lines = (found["indented"] or found["block"]).replace("\\\n", " ").splitlines()
                lines = [" ".join(re.sub(r"(?<!\S)#.*", "", line).split()) for line in lines]
                pieces += [(document.name, "shell", line) for line in lines if line]
            else:
                pieces.append((document.name, found["language"] or "text", found["block"]))
    return pieces


def commands(codes):
    """The commands that call the repository's scripts, each once, in their order."""
    found = []
    for _, language, text in codes:
        command = {"": COMMAND.match, "shell": COMMAND.search}.get(language, lambda text: None)(text)
        if command and re.search(r"\w\.(py|sh)\b", text):
            found.append(text[command.start() :])
    return list(dict.fromkeys(found))


CODES = read()
COMMANDS = commands(CODES)
SNIPPETS = [(name, language, text) for name, language, text in CODES if language in ("python", "pycon")]


def expand(word):
    """Braces and stars, as the shell expands them; a word that nothing fits stays as it is."""
    braces = re.fullmatch(r"(.*)\{([^{}]*,[^{}]*)\}(.*)", word)
    if braces:
        return [done for part in braces[2].split(",") for done in expand(braces[1] + part + braces[3])]
    return sorted(glob.glob(word)) or [word]


def split(command):
    """Variables that are set, the script, and its arguments; "..." stands for a run."""
    words = shlex.split(command)
    variables = [found[1] for found in map(ASSIGNMENT.match, words) if found]
    script = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    arguments = [QUICKSTART if word == "..." else word for word in words[script + 1 :]]
    return variables, words[script], [done for word in arguments for done in expand(word)]


def load(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def tiny(script, argv):
    """The arguments that make a command cheap."""
    if script != "main.py":
        return [*argv, *TINY.get(script, [])]
    args = load(script).parse_args(argv)
    if args.evaluate or "--resume" in argv:
        return argv
    epochs = ["--epochs", "2", "--initial_epochs", "1"] if args.flat_ratio else ["--epochs", "1"]
    return [*argv, "--width", "2", *epochs, "--batch_size", "64", "--seed", "13 17", "--data_path", "data"]


def call(script, argv):
    """What `python <script> ...` does, in this process."""
    module = load(script)
    cli.run(module.main, module.parse_args(argv))


def calls_of(script, folder, argv=()):
    """The arguments of each call of python in a shell script, by a python that only writes them down."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "ruff", "torchrun"):
        # In one write: scripts may call it side by side.
        (folder / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\0" "$@" "" >>"$CALLS"\n')
        (folder / "bin" / name).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = os.environ | {
        "CALLS": str(calls),
        "VENV": os.path.relpath(folder, ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    if script.startswith("scripts/experiments/"):  # which write some files themselves
        shutil.rmtree(folder / "places", ignore_errors=True)
        places = ("RUNS", "MEASUREMENTS", "RESULTS", "DATA_PATH")
        environment |= {name: str(folder / "places" / name) for name in places}
    done = subprocess.run(["bash", script, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [record.split("\0") for record in calls.read_text().split("\0\0") if record]
    return [words for words in found if not words[0].startswith("-")]  # not `python -m pip`


def with_sourced(path):
    """The text of a shell script and of those that it sources."""
    text = path.read_text()
    sourced = re.findall(r'^source "\$\(dirname .*?\)/([\w./]+)"', text, re.MULTILINE)
    return text + "".join(with_sourced(path.parent / name) for name in sourced)


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return tmp_path_factory.mktemp("stub")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, stub):
    """A folder as a reader has it after the quickstart, at a tiny size: data sets, runs and measurements."""
    folder = tmp_path_factory.mktemp("clone")
    files.write_cifar(folder / "data" / "cifar10", "cifar10", images=10)
    files.write_cifar(folder / "data" / "cifar100", "cifar100", images=40)
    files.write_fashion_mnist(folder / "data" / "fashion-mnist")
    files.write_tiny_imagenet(folder / "data" / "tiny-imagenet-200", per_class=8)
    shutil.copytree(ROOT / "results", folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script, *argv in calls_of("scripts/quickstart.sh", stub):
            call(script, tiny(script, argv))
        for command in COMMANDS:
            for word, after in itertools.pairwise(shlex.split(command)):
                run = Path(after)
                if word == "--resume" and run.parts[0] == "runs" and not run.exists():
                    shutil.copytree(QUICKSTART, run)
    return folder


@pytest.fixture
def inside(clone, monkeypatch):
    monkeypatch.chdir(clone)
    return clone


def test_the_documents_have_commands():
    """The tests below would pass if nothing were found."""
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh", "python main.py"):
        assert command in COMMANDS
    assert sum(command.startswith("python measure_") for command in COMMANDS) >= 3
    assert any(name == "README.md" and "from sam import SAM" in text for name, _, text in SNIPPETS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:80])
def test_commands(command, inside, stub):
    """Its script is there and takes its arguments; where that is cheap it runs."""
    variables, script, argv = split(command)
    path = ROOT / script
    assert path.is_file()
    if path.suffix == ".sh":
        text = with_sourced(path)
        assert all(f"${{{name}:-" in text for name in variables)
        subprocess.run(["bash", "-n", path], check=True)
        for words in calls_of(script, stub, argv) if script in RECORDED else []:
            load(words[0]).parse_args(words[1:])
        return
    if argv == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            load(script).parse_args(argv)
        return
    load(script).parse_args(argv)
    simulates = argv[:1] == ["theory"] and "--from" not in argv
    if script in TINY and not command.startswith("torchrun") and not simulates:
        call(script, tiny(script, argv))


@pytest.mark.parametrize("script", RECORDED)
def test_shell_scripts_call_python_with_options_that_it_has(script, inside, stub):
    calls = calls_of(script, stub)
    assert calls
    for name, *argv in calls:
        load(name).parse_args(argv)


@pytest.mark.parametrize(("document", "language", "code"), SNIPPETS)
def test_snippets(document, language, code):
    """Python as printed, and examples with their output."""
    torch.manual_seed(0)
    if language == "python":
        exec(compile(code, document, "exec"), {})
        return
    output = []
    example = doctest.DocTestParser().get_doctest(code, {}, document, document, 0)
    assert not doctest.DocTestRunner().run(example, out=output.append).failed, "".join(output)


def options_of(script, monkeypatch):
    """The options of a script, by name."""
    parsers = []

    def keep(parser, *args):
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", keep)
        with pytest.raises(SystemExit):
            load(script).parse_args([])
    return parsers[0]._option_string_actions


def test_options(monkeypatch):
    """Every option that the documents name is one of some script, and so is the value that stands beside it."""
    scripts = [str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]]
    actions = {}
    for script in scripts:
        if "def parse_args(" in (ROOT / script).read_text():
            for name, action in options_of(script, monkeypatch).items():
                actions.setdefault(name, []).append(action)
    for name, action in get_args_parser()._option_string_actions.items():  # torchrun's
        actions.setdefault(name, []).append(action)
    for document, language, text in CODES:
        if language or not (text.startswith("--") or text.split()[0].endswith(".py")):
            continue  # the options of commands are parsed above
        for name in re.findall(r"(?<!\S)--[a-z][\w-]*", text):
            assert "--" + name[2:].replace("-", "_") in actions, f"{document}: {text}"
        alone = re.fullmatch(r"(--[a-z]\w*) (\S+)", text)
        if alone:
            allowed = [getattr(action, "among", action.choices) for action in actions[alone[1]]]
            fits = [a is None or set(alone[2].split(",")) <= set(map(str, a)) for a in allowed]
            assert any(fits), f"{document}: {text}"


PLACE = re.compile(
    r"(?<![\w/.<>-])(?:(?:models|utils|scripts|tests|docs)/(?:[\w./*-]|\{[\w,]+\})*(?![\w<])"
    r"|[\w-]+\.(?:py|md|ipynb|toml|cff))"
)


def test_places():
    """Files and folders of the repository that the documents name, and their links."""
    named = 0
    for document, language, text in CODES:
        for place in PLACE.findall(text) if language in ("", "text") else []:
            for word in expand(place.rstrip(".")):
                assert glob.glob(str(ROOT / word)), f"{document}: {word}"
                named += 1
    assert named > 20
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_of_a_run(inside):
    """The README's listing of a run names files that a run has."""
    listings = [text for name, _, text in CODES if name == "README.md" and text.startswith("runs/")]
    listing = next(text for text in listings if "args.json" in text)
    names = {path.name for path in (inside / QUICKSTART).rglob("*")}
    for line in listing.splitlines()[1:]:
        assert line.split()[0].rstrip("/") in names, line
