"""The benchmark's table, verdicts and file; its numbers are nobody's promise."""

import json

import pytest

from scripts import benchmark


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
    assert "n = 3, 1 threads" in lines[3]
    with pytest.raises(SystemExit, match="2"):
        call("--scaling", "--only", "fisher16")
    assert "--only: expected some of training by N" in capsys.readouterr().err


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
