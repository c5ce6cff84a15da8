"""What a GPU is asked to do, and what it makes of it. Tests marked gpu need one; scripts/gpu.sh runs them."""

import json
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model
from sam import SAM
from scripts import gpu
from tests import reference
from tests.test_ensemble import SHARPBALANCE, run
from utils import capture, cli
from utils.capture import CapturedPasses
from utils.checkpoint import load_checkpoint
from utils.data import ImageSet, Preprocessing
from utils.fisher import ntk_gram, per_sample_fisher
from utils.hessian import full_float32, hessian_trace, top_eigenvalues
from utils.landscape import mean_loss
from utils.processes import Progress
from utils.run import Stopped
from utils.sharpness import average_sharpness, worst_case_sharpness
from utils.training import sharpbalance_step, train_epoch

DEVICE = "cuda"
RESNET = [*SHARPBALANCE, "--model", "resnet18", "--width", "8", "--lr", "0.01"]
MEASURES = {
    "scores": lambda model, batches: per_sample_fisher(model, *batches[0]).sum().item(),
    "APGD_worst": lambda model, batches: worst_case_sharpness(model, batches, 0.1, n_iters=3)["loss"],
    "APGD_average": lambda model, batches: average_sharpness(model, batches, 0.1, n_draws=4)["loss"],
    "hessian_t": lambda model, batches: hessian_trace(model, batches, 2)["trace"],
    "hessian_e": lambda model, batches: top_eigenvalues(model, batches, 1)[0].item(),
    "NTK": lambda model, batches: ntk_gram(model, batches[0][0]).trace().item(),
    "landscape": mean_loss,
}


def network(device="cpu", width=4):
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(create_model("resnet18", 5, width, 16)).eval()
    return model.to(device, memory_format=torch.channels_last)


def batches_of(device="cpu", size=8):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 16, 16).to(device), torch.randint(0, 5, (size,)).to(device))]


@pytest.mark.parametrize("name", MEASURES)
def test_measures_take_all_bits_of_float32(name):
    """A GPU's convolutions use TF32 by default; afterwards they do so again."""
    seen, model = set(), network(width=2)
    places = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    model.layer1[0].register_forward_pre_hook(lambda *_: seen.add(tuple(place.fp32_precision for place in places)))
    MEASURES[name](model, batches_of(size=2))
    assert seen == {("ieee", "ieee")} != {tuple(before)}
    assert [place.fp32_precision for place in places] == before


class Launches(TorchDispatchMode):
    """Counts operations that compute something, each of which is one or more launches on a GPU."""

    VIEWS = ("view", "permute", "transpose", "slice", "detach", "expand", "as_strided", "select", "split", "squeeze")
    VIEWS += ("alias", "unfold", "aten.t.", "empty")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(view in str(function) for view in self.VIEWS)
        return function(*args, **(kwargs or {}))


def test_launches_of_scores():
    """At most eight times those of a pass; most are for the nine offsets of a kernel."""
    model = create_model("resnet18", 100, 64).to("meta").eval()
    images, labels = torch.empty(128, 3, 32, 32, device="meta"), torch.zeros(128, dtype=torch.int64, device="meta")
    images = images.to(memory_format=torch.channels_last)
    with Launches() as a_pass:
        F.cross_entropy(model(images), labels).backward()
    with Launches() as scores:
        per_sample_fisher(model, images, labels)
    assert a_pass.count > 100
    assert scores.count < 8 * a_pass.count


def test_the_script_on_the_cpu(tmp_path, monkeypatch):
    """Its runs at a tiny size, up to what needs a GPU."""
    few = {name: gpu.METHODS[name] for name in ("averaged weights", "SharpBalance (released), bf16")}
    monkeypatch.setattr(gpu, "METHODS", few)
    words = ["--device", "cpu", "--images", "40", "--width", "2", "--save", str(tmp_path / "new" / "gpu.json")]
    gpu.main(gpu.parse_args(words))
    content = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert content["images"]["train"] == 36
    assert set(content["runs"]) == set(few)
    for row in content["runs"].values():
        assert row["images_per_second"] > 0
        assert [len(losses) for losses in row["train_loss"]] == [2, 2]
    assert content["runs"]["SharpBalance (released), bf16"]["passes_per_image"] == 2
    assert content["speeds"]["scores_per_second"] > 0


def test_the_script_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        cli.run(gpu.main, gpu.parse_args([]))
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert "no GPU was found" in lines[0]


def needs_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@needs_a_gpu
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_the_cpu(name):
    """Within 1 %: sums in another order, and searches that follow the last bits."""
    wanted, got = (MEASURES[name](network(device), batches_of(device)) for device in ("cpu", DEVICE))
    assert got == pytest.approx(wanted, rel=0.01)


@needs_a_gpu
@pytest.mark.parametrize("model", ["resnet18", "wrn-40-2", "vit_t"])
def test_scores_are_those_of_the_slow_twin(model):
    torch.manual_seed(0)
    net, ((images, labels),) = create_model(model, 5, 8, 16).eval().to(DEVICE), batches_of(DEVICE)
    with full_float32():
        wanted = reference.fisher_by_samples(net, images, labels)
    torch.testing.assert_close(per_sample_fisher(net, images, labels), wanted.to(images), rtol=1e-3, atol=1e-6)


def weights_of(path):
    state = load_checkpoint(path)["state_dict"]
    return torch.cat([state[name].flatten() for name in state if name.endswith(("weight", "bias"))])


@needs_a_gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_resuming(amp, tmp_path, monkeypatch):
    """Bit for bit: cuDNN is asked for kernels that add in the same order at each call."""
    flags = [*RESNET, "--amp", amp, "--device", DEVICE]
    whole, steps, advance = run(tmp_path / "whole", flags), 0, Progress.advance

    def stop_once(progress, passes):
        nonlocal steps
        advance(progress, passes)
        steps += 1
        if steps == 32:  # in the third of four epochs of 7 steps, after the split
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", stop_once)
    with pytest.raises(Stopped):
        run(tmp_path / "resumed", flags)
    run(tmp_path / "resumed", flags)
    for file in ("checkpoint.pth.tar", "model_averaged.pth.tar"):
        wanted, got = (weights_of(folder / "seed_17" / file) for folder in (whole, tmp_path / "resumed"))
        assert torch.equal(got, wanted), (file, (got - wanted).norm() / wanted.norm())


@needs_a_gpu
def test_processes_that_share_the_gpu(tmp_path):
    """Two members in two processes are, bit for bit, those of one process."""
    folder = run(tmp_path / "one", [*RESNET, "--device", DEVICE])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py"]
    words += [*RESNET, "--device", DEVICE, "--save_path", str(tmp_path / "two")]
    subprocess.run(words, cwd=gpu.ROOT, check=True)
    for seed in (13, 17):
        wanted, got = (weights_of(one / f"seed_{seed}" / "checkpoint.pth.tar") for one in (folder, tmp_path / "two"))
        assert torch.equal(got, wanted), (seed, (got - wanted).norm() / wanted.norm())


def trained(captured, steps, amp="none", bn_perturbed="update"):
    """A network after some steps on the same images, its BatchNorm's statistics among what is returned, and losses."""
    torch.backends.cudnn.deterministic = True  # as the scripts set it
    kind = torch.float64 if amp == "float64" else torch.float32
    model, ((images, labels),) = network(DEVICE, width=8).train().to(kind), batches_of(DEVICE, 32)
    optimizer, images = SAM(model.parameters(), rho=0.1, lr=0.01, momentum=0.9), images.to(kind)
    passes, mask, losses = CapturedPasses(model, 32) if captured else None, torch.arange(32) < 12, []
    for _ in range(steps):
        options = {"amp": amp.replace("float64", "none"), "bn_perturbed": bn_perturbed, "captured": passes}
        losses.append(sharpbalance_step(model, optimizer, images, labels, mask, **options))
    if captured == "graphs" and steps:
        assert set(passes.replays) == {(20, False), (12, False), (12, bn_perturbed == "freeze")}
    state = [value.double().flatten() for value in model.state_dict().values()]
    return torch.cat(state), torch.tensor(losses, device=DEVICE)


@needs_a_gpu
@pytest.mark.parametrize("bn_perturbed", ["update", "freeze"])
@pytest.mark.parametrize("amp", ["none", "bf16", "float64"])
def test_captured_passes_are_those_of_single_kernels(amp, bn_perturbed, monkeypatch):
    options = 5, amp, bn_perturbed
    got, losses = trained("graphs", *options)
    monkeypatch.setattr(capture, "CAPTURE_AT", 100)
    single, single_losses = trained("kernels", *options)
    assert torch.equal(got, single)
    assert torch.equal(losses, single_losses)
    # What weighs the loss instead of its gradient differs by roundings, which grow with each step.
    with full_float32():
        got, losses = trained("kernels", *options)
        wanted, wanted_losses = trained(None, *options)
        start, _ = trained(None, 0, amp)
    close = {"float64": 1e-6, "none": 1e-3, "bf16": 0.05}[amp]
    assert (got - wanted).norm() < close * (wanted - start).norm()
    if amp != "none":  # their losses are compared in float64
        torch.testing.assert_close(losses, wanted_losses, rtol=close, atol=0)


@needs_a_gpu
@pytest.mark.parametrize("captures", [False, True])
def test_no_step_waits_for_the_device(captures):
    """An epoch of more steps has no more waits; the start and the end of an epoch do wait."""
    waits = []
    for images in (256, 1024):
        pixels = np.random.RandomState(0).randint(0, 256, (images, 16, 16, 3), dtype=np.uint8)
        data = ImageSet(pixels, np.arange(images) % 5, Preprocessing((0.5,) * 3, (0.2,) * 3, 2, True), DEVICE)
        model = network(DEVICE).train()
        optimizer, mask = SAM(model.parameters(), lr=0.01, momentum=0.9), torch.ones(images, dtype=torch.bool)
        captured = CapturedPasses(model, 64) if captures else None
        for epoch in range(2):  # the first one loads the kernels, and captures them
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    train_epoch(model, optimizer, data, mask, 0, epoch, 64, captured=captured)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in found))
    assert 0 < waits[0] == waits[1] < 10


@needs_a_gpu
def test_bf16_losses_are_near_those_of_float32(tmp_path):
    flags, losses = ["--width", "4", "--epochs", "2", "--lr", "0.01", "--seed", "13", "--device", DEVICE], []
    for amp in ("none", "bf16"):
        lines = (run(tmp_path / amp, [*flags, "--amp", amp]) / "seed_13" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in lines])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.1)
