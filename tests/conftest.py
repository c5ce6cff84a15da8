"""One CPU thread for all tests: sums of floats depend on their number, and runs of subprocesses are compared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """A test may have used `--threads`, which changes the process."""
    torch.set_num_threads(1)
