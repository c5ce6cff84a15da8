"""A small part of what scripts/faults.sh does."""

import re
import subprocess
import sys

from tests.test_ensemble import ROOT


def test_runs_survive_faults():
    command = [sys.executable, "-m", "tests.faults.harness", "--faults", "20", "--saves", "2", "--seed", "11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 kills while a net of width 64 was saved: 0 lost" in done.stdout
    for kind in ("equal", "other"):
        assert int(re.search(rf"killed after best, {kind} +(\d+)", done.stdout).group(1)) >= 1
    assert int(re.search(r"all +(\d+) +0 results lost or wrong", done.stdout).group(1)) >= 20
