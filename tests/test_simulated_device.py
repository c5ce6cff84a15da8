"""The paths of an accelerator, run on a simulated one: the same numbers as on the CPU, and no waiting within an epoch.

torch counts its devices at the first backward pass, so that these tests need a process of their own, which the last
test starts.
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import backend_registration

import main
import measure_diversity
import measure_sharpness
import utils.distributed
import utils.landscape
import utils.predictions
from models import create_model
from sam import SAM
from scripts import benchmark
from tests.small import NETWORK
from tests.test_ensemble import results
from utils.data import ImageSet, Preprocessing
from utils.fisher import per_sample_fisher
from utils.hessian import top_eigenpairs
from utils.processes import Progress
from utils.run import Stopped
from utils.training import sharpbalance_step

simulated = pytest.mark.simulated
if os.environ.get("SIMULATED_DEVICE"):
    from tests import simulated_device as sim
METHODS = {
    "plain": [],
    "ASAM, averages": ["--sam", "--sam_adaptive", "--average_from", "1"],
    "released": ["--sam", "--flat_ratio", "0.4", "--average_from", "1"],
    "paper, bf16": ["--sam", "--flat_ratio", "0.4", "--partition", "paper", "--amp", "bf16"],
    "random": ["--sam", "--flat_ratio", "0.4", "--partition", "random", "--match_size"],
    "same": ["--sam", "--bn_perturbed", "freeze", "--flat_ratio", "0.4", "--partition", "same"],
}


def split_of(folder):
    """Few of the digits: the options of their split."""
    np.save(folder / "train.npy", np.arange(48))
    np.save(folder / "val.npy", np.arange(48, 70))
    return ["--train_idx_path", folder / "train.npy", "--val_idx_path", folder / "val.npy"]


@pytest.fixture
def on(monkeypatch):
    """Call this with a device: the scripts compute there."""

    def choose(device):
        for module in (utils.distributed, utils.predictions, utils.landscape):
            monkeypatch.setattr(module, "start_device", lambda name, threads: torch.device(device))

    return choose


def train(folder, flags):
    tiny = ["--model", NETWORK, "--epochs", 2, "--initial_epochs", 1, "--batch_size", 16, "--seed", "13 17"]
    main.main(main.parse_args([str(word) for word in [*tiny, *flags, "--save_path", folder]]))
    return folder


@simulated
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_that_of_the_cpu(method, on, tmp_path, monkeypatch):
    """The files are the same to the last byte, and within an epoch the host reads nothing."""
    flags, steps, advance = [*METHODS[method], *split_of(tmp_path)], 0, Progress.advance

    def stop_once(progress, passes):
        nonlocal steps
        advance(progress, passes)
        sim.reads.append("step")
        steps += 1
        if steps == 8:
            signal.raise_signal(signal.SIGTERM)

    on("cpu")
    wanted = results(train(tmp_path / "cpu", flags))
    on("sim")
    sim.reads.clear()
    monkeypatch.setattr(Progress, "advance", stop_once)
    with pytest.raises(Stopped):
        train(tmp_path / "sim", flags)
    assert (tmp_path / "sim" / "seed_13" / "checkpoint_partial.pth.tar").exists()
    assert results(train(tmp_path / "sim", flags)) == wanted
    in_a_row = [len(list(group)) for name, group in itertools.groupby(sim.reads) if name == "step"]
    assert in_a_row == [3, 3, 2, 1, 3]  # two members, two epochs of three steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(folder / "run", [*METHODS["released"], *split_of(folder), "--device", "cpu"])


MODES = "APGD_worst,APGD_average,hessian_t,hessian_e,NTK"  # all but fisher, which takes no --params
SHARPNESS = ["--mode", MODES, "--eval_batch_size", 5, "--batch_num", 1, "--n_iters", 8, "--n_draws", 4]
SHARPNESS += ["--hessian_samples", 12, "--probes", 2, "--top_k", 1, "--ntk_samples", 4, "--params", "linear|bn1"]
MEASUREMENTS = {
    "sharpness": (measure_sharpness, SHARPNESS),
    "apgd": (measure_sharpness, [*SHARPNESS, "--mode", "APGD_worst", "--maximiser", "apgd"]),
    "hutch++": (measure_sharpness, [*SHARPNESS, "--mode", "hessian_t", "--trace_method", "hutch++", "--probes", 6]),
    "fisher": (measure_sharpness, ["--mode", "fisher"]),
    "diversity": (measure_diversity, ["--mode", "all"]),
}


@simulated
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_are_those_of_the_cpu(name, run, on, tmp_path):
    script, words = MEASUREMENTS[name]
    saved, found = run if script is measure_diversity else run / "seed_13", []
    for device in ("cpu", "sim"):
        on(device)
        save = tmp_path / device
        script.main(script.parse_args([str(word) for word in [*words, "--resume", saved, "--save", save]]))
        (file,) = save.glob("*.json")
        found.append(json.loads(file.read_text().replace(f'"device": "{device}"', '"device": "x"'))["result"])
    wanted, got = found
    if name == "hutch++":  # on a device its vectors are copied, and lie otherwise in memory
        wanted, got = pytest.approx(wanted["hessian_t"]["mean"], rel=1e-5), got["hessian_t"]["mean"]
    assert got == wanted


@simulated
def test_the_landscape_is_that_of_the_cpu(run, on, tmp_path, monkeypatch):
    for name, steps in (("ALONG", [-1.0, 1.0]), ("TOP", [-0.02, 0.02]), ("BETWEEN", [0.0, 0.5]), ("IMAGES", 12)):
        monkeypatch.setattr(utils.landscape, name, steps)
    monkeypatch.setattr(utils.landscape, "top_eigenpairs", functools.partial(top_eigenpairs, tolerance=0.3))
    found = []
    for device in ("cpu", "sim"):
        on(device)
        utils.landscape.compute_landscape([run], tmp_path / f"{device}.json")
        text = (tmp_path / f"{device}.json").read_text()
        assert f'"device": "{device}"' in text
        found.append(text.replace(f'"device": "{device}"', '"device": "x"'))
    assert found[0] == found[1]


@simulated
@pytest.mark.parametrize("model", ["vit_t", "wrn-40-2", "vmap"])
def test_scores_and_a_step_of_other_networks(model):
    """vmap: a network with a layer that has no formula."""
    found = []
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        if model == "vmap":
            network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
        else:
            network = create_model(model, 5, 8, 16)
        images, labels = torch.randn(6, 3, 16, 16).to(device), torch.arange(6).remainder(5).to(device)
        network.to(device, memory_format=torch.channels_last).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores, optimizer = per_sample_fisher(network, images, labels).cpu(), SAM(network.parameters(), lr=0.1)
        step = sharpbalance_step(network.train(), optimizer, images, labels, torch.arange(6) < 2)
        found.append([scores, *(t.cpu() for t in step), *(t.cpu() for t in network.state_dict().values())])
    # Attention is other operations where it is not fused, and so is GroupNorm's gradient in older versions of torch.
    exact = {"rtol": 0, "atol": 0} if model == "wrn-40-2" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(*found, **exact)


@simulated
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("bad", ["at w", "at w + eps"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_that_is_skipped_is_that_of_the_cpu(value, bad, base):
    """There it is taken, and taken back without waiting: weights, momentum and counts are the same, bit for bit."""
    found = []
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
        images, labels = torch.randn(6, 4).to(device), (torch.arange(6) % 3).to(device)
        optimizer = SAM(network.parameters(), base, rho=0.5, lr=0.01, momentum=0.9)
        seen = []
        for step in range(5):
            for name in ("at w", "at w + eps"):
                nn.functional.cross_entropy(network(images), labels).backward()
                poison = torch.full((), value if name == bad and step in (0, 2, 3) else 0.0)
                sim.reads.clear()
                network[2].bias.grad[1] += poison  # also before there is any state
                (optimizer.first_step if name == "at w" else optimizer.second_step)(zero_grad=True)
                assert sim.reads == []
                seen += [p.detach().cpu().clone() for p in network.parameters()]
            if step:  # before it the CPU has no state, and the device has one of zeros
                seen += [s[k].cpu().clone() for s in optimizer.state.values() for k in sorted(s) if k != "step"]
            seen.append(optimizer.skipped.cpu())
        assert [t.tolist() for t in seen if t.dtype == torch.int64] == [[1, 1], [1, 0], [2, 1], [3, 2], [3, 0]]
        found.append(seen)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@simulated
@pytest.mark.parametrize("form", [{"padding": 4}, {"size": 24, "random_scale": True}])
def test_memory_mapped_images(form, tmp_path):
    """The batches of the CPU, and nothing to wait for within an epoch."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8))
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows, labels = random.permutation(40)[:30], random.integers(0, 10, 30)
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), flip=True, **form)
    here, there = (ImageSet(stored, labels, preprocessing, device, rows) for device in ("cpu", "sim"))
    there._waiting = 2
    sim.reads.clear()
    batches = list(there.epoch(13, 0, 8))
    assert sim.reads == []
    for one, two in zip(here.epoch(13, 0, 8), batches, strict=True):
        torch.testing.assert_close(one, tuple(tensor.cpu() for tensor in two), rtol=0, atol=0)
    assert here.digest() == there.digest()
    torch.testing.assert_close(here.batch(rows[:3] % 30)[0], there.batch(rows[:3] % 30)[0].cpu(), rtol=0, atol=0)


@simulated
def test_the_benchmark_runs_there(monkeypatch):
    synthetic = benchmark.synthetic
    monkeypatch.setattr(benchmark, "synthetic", lambda images: synthetic(max(images // 64, 2)))
    cases = [
        lambda: benchmark.fisher(2, 4),
        lambda: benchmark.step(0.5, 2, 4),
        lambda: benchmark.epoch(2),
        lambda: benchmark.worst_case("tight", "l2", 2, 1, 2),
        lambda: benchmark.hessian(4, 4),
        lambda: benchmark.prediction(512),
    ]
    for case in cases:
        with torch.device("sim"):
            functions = case()
        for function in functions.values():
            function()


@simulated
def test_the_device_refuses_and_counts():
    """What a test here would not see, if the simulation let it pass."""
    x = torch.arange(4.0).to("sim")
    assert (x.device.type, (2 * x).sum().cpu().item(), torch.zeros(2, device="sim").device.type) == ("sim", 12, "sim")
    with pytest.raises(RuntimeError, match="expected all tensors on sim:0, got one of"):
        x + torch.ones(4)
    for read in (
        lambda: x.sum().item(),
        lambda: bool(x[0] > 0),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.cpu(),
        lambda: torch.empty(4).copy_(x),
        lambda: torch.equal(x, x),
    ):
        sim.reads.clear()
        read()
        assert sim.reads
    sim.reads.clear()
    x.add_(torch.tensor(1.0)).mul(2).argmax()
    x[torch.tensor([0, 1]).to("sim")]
    assert sim.reads == []


def test_in_a_process_of_its_own():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device in Python")
    # A GPU's streams and the simulated device would get in each other's way.
    more = {"SIMULATED_DEVICE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["-m", "pytest", "-m", "simulated", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run([sys.executable, *words], env=os.environ | more, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
