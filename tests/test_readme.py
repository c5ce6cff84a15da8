"""The documents and the code agree: commands, options, paths and snippets; what is cheap runs, at a tiny size."""

import doctest
import glob
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from models import create_model, is_external
from sam import SAM
from scripts import benchmark, experiment, pipeline
from scripts.export import NEEDED
from tests import files
from utils import cli
from utils.datasets import load_data
from utils.results import read_ensemble
from utils.training import sharpbalance_step

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "INSTALL.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md"), *ROOT.glob("results/*/INTER*.md")])
LINKED = [*DOCUMENTS, *ROOT.glob("CHANGELOG.md")]
README = (ROOT / "README.md").read_text()
LAYOUT = README.partition("## Layout\n\n```\n")[2].partition("```")[0]
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
    "scripts/make_corrupted.py": ["--corruptions", "contrast", "--to", "elsewhere"],  # see `tiny`
    "scripts/summarize.py": [],
    "scripts/plot.py": [],  # but `theory` simulated anew, which tests/test_notebook.py does
    "scripts/benchmark.py": ["--repeats", "3", "--only"],  # see `tiny`
    "scripts/report.py": [],
    "scripts/predict.py": [],
}
# Shell scripts that only call python, with what they are called with here: it is seen how they call it.
RECORDED = {str(path.relative_to(ROOT)): [] for path in sorted(ROOT.glob("scripts/[emt]*/*.sh"))}
RECORDED |= {"scripts/quickstart.sh": []}
QUICKSTART = "runs/quickstart/sharpbalance"
SMALL_QUICKSTART = ["--width", "2", "--epochs", "2", "--initial_epochs", "1", "--batch_size", "64", "--seeds", "13 17"]
SMALL_QUICKSTART += ["--measure_flags", "--bootstrap 20"]
SMALL_QUICKSTART += ["--sharpness_flags", "--mode APGD_worst --norms l2 --batch_num 2 --n_iters 2"]
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
    if {"--networks", "--pipeline"} & set(argv):
        argv = []  # they take half a minute and more
    if script == "scripts/benchmark.py":
        return [*argv, *TINY[script], "partition by N" if "--scaling" in argv else "partition"]
    if "--init_from" in argv:  # of a network of another width than the tiny one
        argv = [*argv[: argv.index("--init_from")], *argv[argv.index("--init_from") + 2 :]]
    place = [] if "folder" in argv else ["--data_path", "data"]
    if script == "scripts/make_corrupted.py":
        return [*argv, *TINY[script], *place]
    if script != "main.py":
        return [*argv, *TINY.get(script, [])]
    args = load(script).parse_args(argv)
    if "--resume" in argv:
        return argv
    if "folder" in argv:  # the fixture has put another run where it goes
        place = ["--save_path", f"runs/of_{args.data_path}"]
    epochs = ["--epochs", "2", "--initial_epochs", "1"] if args.flat_ratio else ["--epochs", "1"]
    width = [] if is_external(args.model) else ["--width", "2"]
    return [*argv, *width, *epochs, "--warmup_epochs", "0", "--batch_size", "64", "--seed", "13 17", *place]


def parse(script, argv):
    """The arguments of a script; of an experiment also those that it hands to main.py."""
    args = load(script).parse_args(argv)
    if script == "scripts/experiment.py":
        load("main.py").parse_args([*args.train, "--data", args.data])
    return args


def call(script, argv):
    """What `python <script> ...` does, in this process."""
    module = load(script)
    cli.run(module.main, module.parse_args(argv))


def calls_of(script, folder, argv=()):
    """The arguments of each call of python in a shell script, by a python that only writes them down."""
    argv = argv or RECORDED[script]
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "ruff", "torchrun"):
        # In one write: scripts may call it side by side.
        (folder / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\0" "$@" "" >>"$CALLS"\n')
        (folder / "bin" / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")  # a script may call no python
    environment = os.environ | {
        "CALLS": str(calls),
        "VENV": os.path.relpath(folder, ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", script, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [record.split("\0") for record in calls.read_text().split("\0\0") if record]
    return [words for words in found if not words[0].startswith("-")]  # not `python -m pip`


def with_sourced(path):
    """The text of a shell script and of those that it sources."""
    text = path.read_text()
    sourced = re.findall(r'^source "\$\(dirname .*?\)/([\w./]+)"', text, re.MULTILINE)
    return text + "".join(with_sourced(path.parent / name) for name in sourced)


def variables_of(path):
    """The environment variables that a shell script reads, itself or through scripts/experiment.py."""
    text = with_sourced(path)
    names = set(re.findall(r"\$\{([A-Z_]+):-", text))
    return names | ({name.upper() for name in experiment.ENVIRONMENT} if "scripts/experiment.py" in text else set())


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
    for name in ("pictures", "clipart", "first", "second"):
        files.write_image_folder(folder / name, {"ape": 12, "bee": 12, "cat": 12}, size=30)
    shutil.copytree(ROOT / "results", folder / "results")
    made = "from models import create_model\n\n\ndef make(num_classes):\n"
    (folder / "figures").mkdir()
    Image.linear_gradient("L").save(folder / "figures/ramp.png")
    for i, image in enumerate(load_data("digits").test.pixels(slice(3)).numpy()):
        Image.fromarray(image[:, :, 0]).save(folder / f"figures/digit_{i}.png")
    (folder / "net.py").write_text(f"{made}    return create_model('resnet18', num_classes, 2, in_channels=1)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            experiment, "run_script", lambda words, log=None, jobs=1: call(str(words[0]), list(map(str, words[1:])))
        )
        for script, *argv in calls_of("scripts/quickstart.sh", stub):
            call(script, [*argv, *SMALL_QUICKSTART])
        for command in COMMANDS:
            for word, after in itertools.pairwise(shlex.split(command)):
                run = Path(after)
                if word == "--resume" and run.parts[0] == "runs" and not run.exists():
                    shutil.copytree(QUICKSTART, run)
                if word == "--init_from":
                    run.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(QUICKSTART, "seed_13", "checkpoint.pth.tar"), run)
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
        assert set(variables) <= variables_of(path)
        subprocess.run(["bash", "-n", path], check=True)
        for words in calls_of(script, stub, argv) if script in RECORDED else []:
            parse(words[0], words[1:])
        return
    if argv == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            load(script).parse_args(argv)
        return
    if any(word.startswith("timm:") for word in argv):
        pytest.importorskip("timm")
    if "--tensorboard" in argv:
        pytest.importorskip("tensorboard")
    parse(script, argv)
    simulates = argv[:1] == ["theory"] and "--from" not in argv
    if script in TINY and not command.startswith("torchrun") and not simulates:
        call(script, tiny(script, argv))


@pytest.mark.parametrize("script", RECORDED)
def test_shell_scripts_call_python_with_options_that_it_has(script, inside, stub):
    calls = calls_of(script, stub)
    assert calls
    for name, *argv in calls:
        parse(name, argv)


def test_help_of_the_study_begins_no_setting(stub):
    assert calls_of("scripts/experiments/study.sh", stub, ["--help"]) == []


@pytest.mark.parametrize(("document", "language", "code"), SNIPPETS)
def test_snippets(document, language, code, inside):
    """Python as printed, and examples with their output."""
    torch.manual_seed(0)
    for name in re.findall(r'"(ensemble\.(?:onnx|pt2))"', code):
        for library in NEEDED[Path(name).suffix]:
            pytest.importorskip(library)
        if not Path(name).exists():
            call("scripts/export.py", ["--resume", QUICKSTART, "--to", name])
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
        patch.setattr(cli.Parser, "parse_known_args", keep)
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


YOURS = ("FILE.py", "net.py", "NEW/net.py")  # that a reader has
PLACE = re.compile(
    r"(?<![\w/.<>-])(?:(?:models|utils|scripts|tests|docs)/(?:[\w./*-]|\{[\w,]+\})*(?![\w<])"
    r"|[\w-]+\.(?:py|md|ipynb|toml|cff))"
)


def test_places():
    """Files and folders of the repository that the documents name, and their links."""
    named = 0
    for document, language, text in CODES:
        for place in PLACE.findall(text) if language in ("", "text") and text != LAYOUT else []:
            for word in expand(place.rstrip(".")) if place not in YOURS else ():
                assert glob.glob(str(ROOT / word)), f"{document}: {word}"
                named += 1
    assert named > 20
    for document in LINKED:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("folder", [QUICKSTART, QUICKSTART.replace("runs", "measurements")])
def test_listings_of_folders(folder, inside):
    """The documents' listings of a run and of its measurements name files that these have."""
    listings = [text for _, _, text in CODES if text.startswith(f"{folder.split('/')[0]}/") and "\n    " in text]
    assert len(listings) == 1
    names = {path.name for path in (inside / folder).rglob("*")} | {"seed_27"}
    for line in listings[0].splitlines()[1:]:
        assert line.split()[0].rstrip("/") in names, line


def test_the_readme_is_short_and_comes_to_the_point():
    """At most 1,900 words, as wc counts them, and the three lines of the step within the first 450."""
    assert len(README.split()) <= 1900
    first = " ".join(README.split()[:450])
    for line in (
        "g = grad L_s(w)",
        "eps = rho g / ||g||",
        "w <- SGD step with (a/B) grad L_n(w) + (b/B) grad L_s(w + eps)",
    ):
        assert line in first


def test_layout():
    """Its tree names files that exist, each in the folder under which it is indented."""
    folder, found = ROOT, []
    for line in LAYOUT.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        folder = folder if line.startswith("  ") else ROOT
        found += [folder / name for name in names]
        if len(names) == 1 and names[0].endswith("/") and folder == ROOT:
            folder = ROOT / names[0]
    assert [str(path) for path in found if not path.exists()] == []
    assert len(found) > 40


def test_the_step_of_the_readme():
    """It is `sharpbalance_step`, but for the rounding."""
    code = next(text for _, language, text in SNIPPETS if language == "python" and text.startswith("def step("))
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    images, labels, sam = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6), torch.arange(6) < 4
    weights = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = create_model("resnet18", 10, 2).double()
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(2):
            if ours:
                sharpbalance_step(model, optimizer, images, labels, sam)
            else:
                found["step"](model, optimizer, torch.nn.functional.cross_entropy, images, labels, sam)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    # The README's share of SAM samples is a float32.
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in create_model("resnet18", 10, 2).double().parameters()])
    assert (weights[0] - start).abs().max() > 1e-2


METHODS = {
    "deep ensemble": "deep_ensemble",
    "SAM on random samples": "random",
    "ensemble of averages (EoA)": "eoa",
    "SharpBalance (released)": "sharpbalance",
    "SharpBalance (paper)": "sharpbalance_paper",
    "SharpBalance (released) after a plain start": "plain_start",
    "SharpBalance (released), late": "late_sharpbalance",
}
# By the head of a column: the value, its factor and digits.
VALUES = {
    "member": ("member", 100, 1),
    "ensemble": ("ensemble", 100, 1),
    "ensemble, corrupted": ("corrupted_ensemble", 100, 1),
    "NLL, calibrated": ("nll_calibrated", 1, 3),
    "disagreement": ("disagreement", 100, 1),
    "sharpness": ("sharpness", 1, 2),
}


@pytest.mark.parametrize(
    ("document", "which", "folder", "rows"),
    [
        ("README.md", 0, "study/noise_0.2_images_1000", 4),
        ("results/fashion_mnist/INTERPRETATION.md", 0, "fashion_mnist/noisy_labels", 8),
        ("results/fashion_mnist/INTERPRETATION.md", 1, "study/noise_0.4_images_1000", 9),
        ("results/fashion_mnist/INTERPRETATION.md", 2, "study/noise_0_images_1000", 6),
        ("results/fashion_mnist/INTERPRETATION.md", 3, "study/noise_0.2_images_4000", 6),
        ("results/fashion_mnist/INTERPRETATION.md", 4, "study/noise_0_images_4000", 6),
    ],
)
def test_tables_of_results_are_those_of_the_result_files(document, which, folder, rows):
    """Each row: mean ± standard deviation over five ensembles."""
    folder = ROOT / "results" / folder
    rho = json.loads((folder / "plan.json").read_text())["chosen"]["rho"]
    tables = re.findall(r"^\| \| member \|.*?\n\n", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert len(tables) == (1 if document == "README.md" else 5)
    table = tables[which]
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    assert len(lines) == rows
    for label, *cells in lines:
        name, _, value = label.removesuffix(" (chosen on validation)").partition(", rho ")
        chosen = name == "SAM" and value == f"{rho:g}" and folder.name[-5:] != "_4000"  # which has them from 1,000
        assert label.endswith("(chosen on validation)") == chosen
        method = f"sam_{value or f'{rho:g}'}" if name == "SAM" else METHODS[name]
        places = [p for p in folder.glob(f"measurements/{method}_*") if p.name[len(method) + 1 :].isdigit()]
        values = [read_ensemble(place).values for place in places]
        assert len(values) == 5
        for head, cell in zip(header[1:], cells, strict=True):
            key, factor, digits = VALUES[head]
            numbers = [factor * one[key] for one in values]
            assert cell == f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}", label


def test_table_of_speed_is_that_of_the_result_file():
    """What the program prints of these times."""
    content = json.loads((ROOT / "results" / "benchmark.json").read_text())
    text = (ROOT / "docs" / "SPEED.md").read_text()
    for name in benchmark.CASES:
        for line, _ in benchmark.rows_of(name, content[name]):
            assert line.rstrip() in text
    for setting, found in json.loads((ROOT / "results" / "pipeline.json").read_text()).items():
        for line in pipeline.table(setting, found["rounds"]):
            assert line.rstrip() in text
