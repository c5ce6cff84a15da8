"""The benchmark's table, verdicts and file; its numbers are nobody's promise."""

import json
import os

import pytest
import torch

from models import create_model
from sam import SAM
from scripts import benchmark, passes, pipeline
from utils import RunError
from utils.training import sharpbalance_step


def call(*argv):
    benchmark.main(benchmark.parse_args([str(word) for word in argv]))


def test_table_verdict_and_file(tmp_path, monkeypatch, capsys):
    common = ["--repeats", 3, "--threads", 1, "--save", tmp_path, "--check"]
    case = benchmark.CASES["theory"][0]
    monkeypatch.setitem(benchmark.CASES, "theory", (case, {"explicit, 2 %": 1e9}))
    call("--only", "theory", *common)
    assert "theory     explicit" in capsys.readouterr().out
    # A ratio above its target; what an earlier call found stays.
    case = benchmark.CASES["partition"][0]
    monkeypatch.setitem(benchmark.CASES, "partition", (case, {"np.partition": 1e-9}))
    with pytest.raises(SystemExit, match="1"):
        call("--only", "partition", *common)
    assert capsys.readouterr().out.count("MISSED") == 1
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(content) == {"theory", "partition"}
    for found in content.values():
        assert all(len(seconds) == 3 for seconds in found["seconds"].values())
        assert found["environment"]["threads"] == 1
        assert found["peak_memory_mib"] > 100
    # Memory is a verdict of its own.
    monkeypatch.setitem(benchmark.CASES, "partition", (case, {"np.partition": None}))
    monkeypatch.setitem(benchmark.MAX_MEMORY, "partition", 1)
    with pytest.raises(SystemExit, match="1"):
        call("--only", "partition", *common)
    assert capsys.readouterr().out.count("MISSED") == 1


def test_scaling(capsys):
    call("--scaling", "--only", "partition by M", "theory", "--repeats", 3, "--threads", 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines[1:3]] == ["partition by M", "theory"]
    assert "n = 3, threads: 1," in lines[3]
    with pytest.raises(SystemExit, match="2"):
        call("--scaling", "--only", "fisher16")
    assert "--only: expected some of training by N" in capsys.readouterr().err


def test_names_in_the_help_and_in_errors_can_be_told_apart(monkeypatch, capsys):
    """One of them holds a comma, and one is a case and a part."""
    monkeypatch.setenv("COLUMNS", "10000")  # no name is broken at its hyphen
    with pytest.raises(SystemExit, match="0"):
        benchmark.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"of the cases {'; '.join(benchmark.CASES)}; with --scaling of the parts" in text
    assert text.count(" theory;") == 1
    assert text.count("; theory --repeats") == 1
    assert "SharpBalance, SAM and late SharpBalance against" in text
    assert list(pipeline.ARMS)[:3] == ["sharpbalance", "sam", "late"]
    for words in (["--only", "x"], ["--scaling", "--only", "x"]):
        with pytest.raises(SystemExit, match="2"):
            benchmark.parse_args(words)
    assert "; step, half SAM; " in capsys.readouterr().err
    assert benchmark.parse_args(["--scaling", "--only", "step, half SAM"]).only == ["step, half SAM"]


def test_options_of_whole_commands_alone(capsys):
    benchmark.parse_args(["--arms", "sam", "--busy", "--quick"])
    assert capsys.readouterr().err == "note: --arms, --busy: no effect without --pipeline\n"
    benchmark.parse_args(["--pipeline", "width8", "--arms", "sam"])
    assert capsys.readouterr().err == ""


def test_on_a_gpu_there_are_fewer_cases(capsys):
    only = benchmark.parse_args(["--device", "cuda"]).only
    assert "step30" in only
    assert not set(only) & set(benchmark.CPU_ONLY)
    for words, problem in (
        (["--only", "theory"], "--only: expected some of fisher64"),
        (["--scaling"], "--scaling: measured on the CPU, got --device cuda"),
    ):
        with pytest.raises(SystemExit, match="2"):
            benchmark.parse_args(["--device", "cuda", *words])
        assert problem in capsys.readouterr().err


def test_whole_commands_by_turns(tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline.SETTINGS, "digits", (None, 2, "--data digits --width 4 --batch_size 64 --seed 12 14"))
    for arms, busy in ((["first_version_shared"], False), (["passes"], True)):
        pipeline.run("digits", arms, 1, busy, tmp_path, tmp_path / "saved")
    content = json.loads((tmp_path / "saved/pipeline.json").read_text())["digits"]
    assert [set(found) for found in content["rounds"]] == [{"first_version_shared"}, {"passes", "passes, busy"}]
    words = ["member", "x", "--epochs", "5", "--seed", "12", "14", "--member", "14"]
    args = pipeline.parse_args(words)
    assert (args.seed, args.member, args.initial_epochs) == ([12, 14], 14, 2)
    for found in content["rounds"]:
        assert all(seconds > 0 and 50 < mib < 20_000 for seconds, mib in found.values())
    # What another commit or machine made is replaced.
    (tmp_path / "saved/pipeline.json").write_text(json.dumps({"digits": content | {"environment": {}}}))
    assert pipeline.run("digits", [], 1, False, tmp_path, tmp_path / "saved")["rounds"] == [{}]
    monkeypatch.setitem(pipeline.ARMS, "passes", ("no_such", ""))
    with pytest.raises(RunError, match=r"no_such.*ended with status"):
        pipeline.run("digits", ["passes"], 1, False, tmp_path, tmp_path / "saved")


def test_table_of_whole_commands():
    rounds = [
        {"sharpbalance": [s, 900], "first_version": [10, 800], "sharpbalance, busy": [4 * s, 950]} for s in (5, 6, 7)
    ]
    lines = pipeline.table("width8", rounds)
    assert any("sharpbalance  " in line and "6.0 s" in line and "900 MiB   3" in line for line in lines)
    assert any("sharpbalance / first_version" in line and "0.60" in line and line.endswith("0.60 ok") for line in lines)
    assert any(line.startswith("sharpbalance, busy / sharpbalance") and line.endswith("2.20 MISSED") for line in lines)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_plain_step_is_that_of_the_method(share):
    images, labels = torch.randn(10, 1, 8, 8, dtype=torch.float64), torch.arange(10)
    mask, models = torch.arange(10) < 10 * share, []
    for step in (pipeline.plain_step, sharpbalance_step):
        torch.manual_seed(0)
        model = create_model("resnet18", 10, 2, image_size=8, in_channels=1).double()
        optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, weight_decay=5e-4)
        step(model, optimizer, images, labels, mask)
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_where_a_pass_goes(monkeypatch, capsys):
    """All forms, the compiled one left out where it cannot be compiled; shares that add up."""
    monkeypatch.setattr(passes, "SIDE", 64)
    monkeypatch.setattr(passes, "EVALUATED", (4, 8))

    class Refused(torch.nn.Module):
        def forward(self, images):
            raise torch._dynamo.exc.BackendCompilerFailed(Refused, RuntimeError("no compiler"), None)

    cores, seen, run = os.sched_getaffinity(0), set(), passes.forward_backward
    monkeypatch.setattr(passes, "forward_backward", lambda *rest: seen.add(len(os.sched_getaffinity(0))) or run(*rest))
    for compiler, compiled in ((lambda model: Refused(), False), (lambda model: model, True)):
        monkeypatch.setattr(torch, "compile", compiler)
        threads = "2" if compiled else "1"
        passes.main(passes.parse_args(["--width", "2", "--batch_size", "4", "--threads", threads, "--repeats", "3"]))
        assert seen == ({len(cores), 1} if compiled else {len(cores)})
        assert os.sched_getaffinity(0) == cores
        text = capsys.readouterr().out
        assert ("compiled: left out (BackendCompilerFailed)" in text) != compiled
        assert ("(compiled in " in text) == compiled
        _, operators, forms = text.split("\n\n")
        found = [int(line.split()[-2]) for line in operators.splitlines()[1:]]
        assert len(found) == 7
        assert sum(found) == pytest.approx(100, abs=4)
        names = ["as in training", "colour", "default memory format", "scores", "evaluation, 4 at once"]
        names += ["evaluation, 8 at once"] + ["compiled", "threads on one core"] * compiled
        assert [line[:24].strip() for line in forms.splitlines()[1:-1]] == names
        assert forms.splitlines()[1].split()[-1] == "1.00"
