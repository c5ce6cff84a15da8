import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils.training
from models import create_model, evaluating
from sam import SAM
from tests import reference
from utils import RunError
from utils.data import ImageSet, Preprocessing
from utils.training import learning_rate, predict, sharpbalance_step, train_epoch

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}


def resnet(dtype=torch.float64, size=16, seed=0):
    torch.manual_seed(seed)
    return create_model("resnet18", 5, 4, size).to(dtype)


def batches(count, size=16, n=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
        yield images, torch.randint(0, 5, (n,), generator=generator), torch.rand(n, generator=generator) < 0.5


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_mixed_steps_equal_the_slow_form(dtype, tolerance, adaptive):
    # In float32 a ReLU that flips ends the comparison: there the steps are small and few.
    hyper, steps = (HYPER | {"lr": 1e-3}, 2) if dtype == torch.float32 else (HYPER, 8)
    fast, slow = resnet(dtype), resnet(dtype)
    optimizer = SAM(fast.parameters(), rho=0.1, adaptive=adaptive, **hyper)
    buffers = [None] * len(list(slow.parameters()))
    for images, labels, mask in batches(steps, dtype=dtype):
        loss, correct = sharpbalance_step(fast, optimizer, images, labels, mask)
        expected = reference.sharpbalance_step(slow, buffers, images, labels, mask, 0.1, *hyper.values(), adaptive)
        assert loss.item() == pytest.approx(expected, abs=tolerance)
        assert not loss.requires_grad
        assert 0 <= correct.item() <= len(images)
    for name, value in fast.state_dict().items():  # weights and running statistics
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=0, atol=tolerance, msg=name)
    assert fast.bn1.num_batches_tracked == 3 * steps  # three forward passes a step


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("smoothing", "clip_norm"), [(0.1, None), (0.0, 0.5), (0.2, 0.5)])
def test_recipes_equal_the_slow_form(share, smoothing, clip_norm):
    """AdamW gets the sum; smoothing is in all passes; the sum is clipped, the ascent is not; dropout is the same."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(216, 5)]
    fast = nn.Sequential(*layers).double()
    slow = copy.deepcopy(fast)
    optimizer = SAM(fast.parameters(), torch.optim.AdamW, rho=0.3, lr=1e-2, weight_decay=0.05)
    moments = [None] * len(list(slow.parameters()))
    for step, (images, labels, _) in enumerate(batches(4, 8), start=1):
        mask = torch.arange(12) < 12 * share
        torch.manual_seed(step)
        options = {"label_smoothing": smoothing, "clip_norm": clip_norm}
        loss, _ = sharpbalance_step(fast, optimizer, images, labels, mask, **options)
        torch.manual_seed(step)
        gradient, expected = reference.summed_gradient(slow, images, labels, mask, 0.3, False, smoothing, clip_norm)
        reference.adamw_step(list(slow.parameters()), gradient, moments, step, 1e-2, 0.05)
        assert loss.item() == pytest.approx(expected, abs=1e-10)
    for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_no_sam_sample_equals_sgd_bit_for_bit():
    ours, plain = resnet(torch.float32), resnet(torch.float32)
    optimizer, sgd = SAM(ours.parameters(), rho=0.1, **HYPER), torch.optim.SGD(plain.parameters(), **HYPER)
    for images, labels, mask in batches(4, dtype=torch.float32):
        loss, _ = sharpbalance_step(ours, optimizer, images, labels, torch.zeros_like(mask))
        sgd.zero_grad()
        expected = F.cross_entropy(plain(images), labels)
        expected.backward()
        sgd.step()
        assert loss == expected
    assert states_equal(ours, plain)


def sam_by_hand(model, optimizer, images, labels):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(images), labels).backward()
    optimizer.second_step(zero_grad=True)
    return loss


def test_no_normal_sample_equals_sam_bit_for_bit():
    ours, plain = resnet(torch.float32), resnet(torch.float32)
    a, b = SAM(ours.parameters(), rho=0.1, **HYPER), SAM(plain.parameters(), rho=0.1, **HYPER)
    for images, labels, mask in batches(4, dtype=torch.float32):
        loss, _ = sharpbalance_step(ours, a, images, labels, torch.ones_like(mask))
        assert loss == sam_by_hand(plain, b, images, labels)
    assert states_equal(ours, plain)


def test_rho_zero_equals_sgd_on_the_same_parts_bit_for_bit():
    """SGD whose gradient is gathered over the two parts, which is what BatchNorm's statistics of a part come to."""
    ours, plain = resnet(torch.float32), resnet(torch.float32)
    optimizer, sgd = SAM(ours.parameters(), rho=0, **HYPER), torch.optim.SGD(plain.parameters(), **HYPER)
    for images, labels, mask in batches(4, dtype=torch.float32):
        sharpbalance_step(ours, optimizer, images, labels, mask, bn_perturbed="freeze")
        sgd.zero_grad()
        for part in (~mask, mask):
            share = part.sum().item() / len(mask)
            (share * F.cross_entropy(plain(images[part]), labels[part])).backward()
        sgd.step()
    assert states_equal(ours, plain)


def test_rho_zero_without_batch_norm_equals_sgd():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    plain = copy.deepcopy(ours)
    optimizer, sgd = SAM(ours.parameters(), rho=0, **HYPER), torch.optim.SGD(plain.parameters(), **HYPER)
    for images, labels, mask in batches(4):
        sharpbalance_step(ours, optimizer, images, labels, mask)
        sgd.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        sgd.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_the_normal_part_does_not_enter_the_perturbation():
    """Where the weights are during the second pass depends on the SAM part alone."""
    seen = []
    for change in (0.0, 5.0):
        model = resnet()
        optimizer = SAM(model.parameters(), rho=0.1, lr=0.0)
        images, labels, mask = next(batches(1))
        images[~mask] += change
        handle = model.register_forward_hook(lambda m, a, o: seen.append(m.linear.weight.detach().clone()))
        sharpbalance_step(model, optimizer, images, labels, mask)
        handle.remove()
    assert torch.equal(seen[0], seen[1])  # both first passes at w
    assert not torch.equal(seen[1], seen[2])  # the third at w + eps
    assert torch.equal(seen[2], seen[5])


def test_frozen_statistics_in_the_perturbed_pass():
    images, labels, mask = next(batches(1))
    updated, frozen, expected = resnet(), resnet(), resnet()
    for model, rule in ((updated, "update"), (frozen, "freeze")):
        sharpbalance_step(model, SAM(model.parameters(), rho=0.1, **HYPER), images, labels, mask, rule)
    expected(images[~mask])
    expected(images[mask])
    assert torch.equal(frozen.bn1.running_var, expected.bn1.running_var)
    assert frozen.bn1.num_batches_tracked == 2
    assert updated.bn1.num_batches_tracked == 3
    # The arithmetic of the step is the same.
    assert all(torch.equal(p, q) for p, q in zip(updated.parameters(), frozen.parameters(), strict=True))
    assert all(m.track_running_stats for m in frozen.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("alone_has_sam", [True, False])
@pytest.mark.parametrize("size", [8, 16])
def test_a_part_of_one_sample(alone_has_sam, size):
    """At 8x8 the last stage is 1x1 and a part of one sample joins the other; at 16x16 it stays alone."""
    fast, slow = resnet(size=size), resnet(size=size)
    images, labels, mask = next(batches(1, size=size))
    mask[:] = not alone_has_sam
    mask[3] = alone_has_sam
    sharpbalance_step(fast, SAM(fast.parameters(), rho=0.1, **HYPER), images, labels, mask)
    if size == 8:
        mask = torch.full_like(mask, not alone_has_sam)
    buffers = [None] * len(list(slow.parameters()))
    reference.sharpbalance_step(slow, buffers, images, labels, mask, 0.1, *HYPER.values())
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=0, atol=1e-12, msg=name)
    assert all(m.training for m in fast.modules())


def test_weights_are_at_w_when_the_perturbed_pass_raises():
    model = resnet()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
    images, labels, mask = next(batches(1))
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third pass")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="third pass"):
        sharpbalance_step(model, optimizer, images, labels, mask)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_gradient_that_is_not_finite(call):
    """Of the normal part, of the SAM part at w or at w + eps: the step is skipped."""
    model = resnet()
    optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
    steps, calls = list(batches(2)), []
    sharpbalance_step(model, optimizer, *steps[0])
    before = [p.detach().clone() for p in model.parameters()]
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]

    def hook(gradient):
        calls.append(1)
        return gradient / 0 if len(calls) == call + 1 else gradient

    handle = model.layer3[0].conv1.weight.register_hook(hook)
    sharpbalance_step(model, optimizer, *steps[1])
    assert len(calls) == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], q) for p, q in zip(model.parameters(), momentum, strict=True)
    )
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    handle.remove()
    sharpbalance_step(model, optimizer, *steps[1])
    assert not torch.equal(model.linear.weight, before[-2])


def test_skipped_steps_count_over_a_break(capsys):
    """An epoch that resumes within says how many steps were skipped in all of it."""
    data, mask = small_set(), torch.ones(37, dtype=torch.bool)
    for stop in (False, True):
        model, calls, where = resnet(torch.float32), [], []
        optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
        model.linear.bias.register_hook(lambda g, c=calls: c.append(1) or (g / 0 if len(c) in (3, 9) else g))
        more = {"after_step": lambda passes, here, w=where: w.append(here()) if len(w) < 3 else None}
        if stop:

            def after_step(passes, here, w=where):
                w.append(here())
                if len(w) == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train_epoch(model, optimizer, data, mask, 13, 0, 8, after_step=after_step)
            more = {"position": where[-1]}
            optimizer.load_state_dict(optimizer.state_dict())
        train_epoch(model, optimizer, data, mask, 13, 0, 8, **more)
        line = capsys.readouterr().err
        assert line.startswith("warning: member with seed 13, epoch 0: 2 of 5 steps were skipped")
        assert line.count("\n") == 1
    train_epoch(model, optimizer, data, mask, 13, 1, 8)
    del where[-1]["skipped"]  # as files of older versions have it
    train_epoch(model, optimizer, data, mask, 13, 0, 8, position=where[-1])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("skipped", "ends"), [((2, 3, 4), True), ((3, 4), False), ((0, 1, 2), False), ((1, 2, 4), False)]
)
def test_an_epoch_ends_the_run_where_its_last_steps_were_all_skipped(skipped, ends, monkeypatch, capsys):
    """The last `MAX_SKIPPED`, here 3 of 5, in a row up to the end."""
    monkeypatch.setattr(utils.training, "MAX_SKIPPED", 3)
    model, calls = resnet(torch.float32), []
    optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
    model.linear.bias.register_hook(lambda g: calls.append(1) or (g / 0 if (len(calls) - 1) // 2 in skipped else g))
    words = (
        f"member with seed 13, epoch 0: {len(skipped)} of 5 steps were skipped, since their gradients are not finite"
    )
    with pytest.raises(RunError, match=f"{words}, the last 3 in a row; ") if ends else contextlib.nullcontext():
        train_epoch(model, optimizer, small_set(), torch.ones(37, dtype=torch.bool), 13, 0, 8)
    assert capsys.readouterr().err == ("" if ends else f"warning: {words}\n")
    # Where the loss itself is not finite, that is what is said, by the caller.
    model.linear.bias.data.fill_(torch.nan)
    assert np.isnan(train_epoch(model, optimizer, small_set(), torch.ones(37, dtype=torch.bool), 13, 1, 8)[0])


def test_a_frozen_parameter_stays():
    model = resnet()
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
    for images, labels, mask in batches(2):
        sharpbalance_step(model, optimizer, images, labels, mask)
    assert torch.equal(model.conv1.weight, before)


def test_bf16():
    images, labels, mask = next(batches(1, dtype=torch.float32))
    losses = []
    for amp in ("none", "bf16"):
        model = resnet(torch.float32)
        optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
        losses.append(sharpbalance_step(model, optimizer, images, labels, mask, amp=amp)[0])
    exact, loss = losses
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert loss.item() != exact.item()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def small_set(n=37, seed=0):
    random = np.random.default_rng(seed)
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, padding=2, flip=True)
    return ImageSet(random.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), random.integers(0, 5, n), preprocessing)


def test_evaluation_changes_nothing():
    data, states = small_set(), []
    mask = torch.arange(37) % 3 > 0
    for evaluate in (False, True):
        model = resnet(torch.float32)
        optimizer = SAM(model.parameters(), rho=0.1, **HYPER)
        for epoch in range(3):
            train_epoch(model, optimizer, data, mask, 13, epoch, 8)
            if evaluate:
                before = copy.deepcopy(model)
                predict(model, data)
                assert states_equal(model, before)
                assert all(m.training for m in model.modules())
                torch.rand(5)
        states.append(model)
    assert states_equal(*states)


def test_train_epoch_averages_over_samples():
    """With a learning rate of 0 and BatchNorm out of the way, the epoch's loss is the loss of its images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5))
    data, passes = small_set(), []
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.0)
    mask = torch.arange(37) % 2 == 0
    loss, accuracy = train_epoch(model, optimizer, data, mask, 13, 4, 8, after_step=lambda p, _: passes.append(p))
    images, labels = (torch.cat(x) for x in zip(*((x, y) for _, x, y in data.epoch(13, 4, 8)), strict=True))
    logits = model(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert sum(passes) == 37 + 19


def test_predict_and_evaluating(monkeypatch):
    model, data = resnet(torch.float32), small_set()
    model.layer1.eval()
    monkeypatch.setattr(utils.training, "PREDICTION_BATCH", 7)
    logits, features = predict(model, data, features=True)
    assert logits.shape == (37, 5)
    torch.testing.assert_close(features @ model.linear.weight.detach().T + model.linear.bias.detach(), logits.clone())
    assert predict(model, data)[1] is None
    assert not model.layer1.training
    assert model.layer2.training
    with evaluating(model):
        expected = torch.cat([model(images) for images, _ in data.in_order(37)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_learning_rates():
    step = [learning_rate(0.1, "step", e, 200) for e in (0, 99, 100, 149, 150, 199)]
    assert step == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert [learning_rate(1.0, "step", e, 3) for e in range(3)] == pytest.approx([1, 1, 0.1])
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20)
    for epoch in range(20):
        assert learning_rate(0.1, "cosine", epoch, 20) == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        cosine.step()


def test_warm_up():
    """Linear to the whole rate after the warm-up; the steps stay where they are, the cosine takes the rest."""
    rates = [learning_rate(0.9, "step", epoch, 10, warmup=2) for epoch in range(10)]
    assert rates == pytest.approx([0.3, 0.6, 0.9, 0.9, 0.9, 0.09, 0.09, 0.09, 0.009, 0.009])
    rest = [learning_rate(0.9, "cosine", epoch, 8) for epoch in range(8)]
    assert [learning_rate(0.9, "cosine", epoch, 10, 2) for epoch in range(10)] == pytest.approx([0.3, 0.6, *rest])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_clipping_does_not_hide_what_is_not_finite(value):
    """A norm that overflows is not finite either: without clipping that step is skipped as well."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    images = torch.full((4, 3, 2, 2), value)
    mask = torch.ones(4, dtype=torch.bool)
    sharpbalance_step(model.train(), optimizer, images, torch.zeros(4, dtype=torch.int64), mask, clip_norm=1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped.tolist() == [1, 1]
    for p in model.parameters():  # finite numbers, whose norm is not
        p.grad = torch.full_like(p, 1e30)
    utils.training._clip(optimizer, 1.0)
    assert not any(p.grad.isfinite().any() for p in model.parameters())
