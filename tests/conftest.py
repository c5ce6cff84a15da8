"""One CPU thread for all tests: sums of floats depend on their number, and runs of subprocesses are compared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it

import pytest
import torch

from utils import processes


def pytest_configure(config):
    """Runs are compared with what the CPU computes here: only the tests of a GPU (-m gpu) see one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.option.loadscopereorder = False  # of pytest-xdist, which begins with the files of most tests


def pytest_collection_modifyitems(items):
    """First the file that takes minutes, during which the other processes of pytest-xdist have work."""
    items.sort(key=lambda item: item.path.name != "test_distributed.py")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """A test may have used `--threads`, which changes the process; and what it watches is in this process alone."""
    torch.set_num_threads(1)
    monkeypatch.setattr(processes, "begin", lambda: None)
