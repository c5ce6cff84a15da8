import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sam import SAM
from tests import reference


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(n=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def closure_of(model, optimizer, images, labels):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return closure


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_equal_the_slow_form(adaptive):
    fast, slow = net(), net()
    images, labels = batch()
    optimizer = SAM(fast.parameters(), rho=0.3, adaptive=adaptive, lr=0.1, momentum=0.9, weight_decay=1e-2)
    buffers = [None] * len(list(slow.parameters()))
    everything = torch.ones(len(images), dtype=torch.bool)
    for _ in range(5):
        loss = optimizer.step(closure_of(fast, optimizer, images, labels))
        expected = reference.sharpbalance_step(slow, buffers, images, labels, everything, 0.3, 0.1, 0.9, 1e-2, adaptive)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equals_pytorch_optimizer():
    other = pytest.importorskip("pytorch_optimizer")
    ours, theirs = net(), net()
    images, labels = batch()
    a = SAM(ours.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
    b = other.SAM(theirs.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
    for _ in range(4):
        a.step(closure_of(ours, a, images, labels))
        F.cross_entropy(theirs(images), labels).backward()
        b.first_step(zero_grad=True)
        F.cross_entropy(theirs(images), labels).backward()
        b.second_step(zero_grad=True)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)  # it takes the norm in float32


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation_of_a_quadratic(adaptive):
    """f(w) = w' A w / 2 at w: the perturbed point is known in closed form."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    optimizer = SAM([w], rho=0.1, adaptive=adaptive, lr=0.1)
    (w @ A @ w / 2).backward()
    start, g = w.detach().clone(), A @ w.detach()
    T = start.abs() if adaptive else torch.ones(3, dtype=torch.float64)
    optimizer.first_step()
    torch.testing.assert_close(w.detach(), start + 0.1 * T**2 * g / (T * g).norm(), rtol=0, atol=1e-12)
    # The constraint of the (adaptive) ball is active.
    assert ((w.detach() - start) / T).norm().item() == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base):
    a, b = net().float(), net().float()
    images, labels = batch()
    images = images.float()
    sam, plain = SAM(a.parameters(), base, rho=0, lr=0.05), base(b.parameters(), lr=0.05)
    for _ in range(4):
        sam.step(closure_of(a, sam, images, labels))
        closure_of(b, plain, images, labels)()
        plain.step()
    assert equal(weights(a), weights(b))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for name, value in sam.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(plain.state[q][name]))


def test_weights_come_back_bit_for_bit():
    model = net().float()
    images, labels = batch()
    optimizer = SAM(model.parameters(), rho=0.37, lr=0.0, momentum=0.0)
    before, storage = weights(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer, images.float(), labels))
    assert equal(before, weights(model))
    assert storage == [p.data_ptr() for p in model.parameters()]


def test_weights_come_back_when_the_second_pass_raises():
    model = net()
    images, labels = batch()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    before, calls = weights(model), []

    def closure():
        calls.append(weights(model))
        if len(calls) == 2:
            raise RuntimeError("second pass")
        return closure_of(model, optimizer, images, labels)()

    with pytest.raises(RuntimeError, match="second pass"):
        optimizer.step(closure)
    assert not equal(calls[0], calls[1])
    assert equal(before, weights(model))
    optimizer.step(closure_of(model, optimizer, images, labels))  # and it goes on


def test_frozen_and_unused_parameters_are_left_alone():
    model = net()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.randn(4).double())
    images, labels = batch()
    optimizer = SAM([*model.parameters(), unused], rho=0.5, lr=0.1)
    frozen, spare = model[0].bias.detach().clone(), unused.detach().clone()
    closure_of(model, optimizer, images, labels)()
    optimizer.first_step()
    assert torch.equal(model[0].bias, frozen)
    assert torch.equal(unused, spare)
    optimizer.second_step()
    assert torch.equal(model[0].bias, frozen)
    assert torch.equal(unused, spare)


def test_a_group_without_gradients_and_rho_by_group():
    model = net()
    images, labels = batch()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[2].parameters(), "rho": 0.2}]
    optimizer = SAM([*groups, {"params": [nn.Parameter(torch.ones(2).double())], "adaptive": True}], rho=0.1, lr=0.1)
    before = weights(model)
    closure_of(model, optimizer, images, labels)()
    optimizer.first_step()
    assert equal(before[:2], weights(model)[:2])
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(weights(model)[2], before[2] + 0.2 * model[2].weight.grad / norm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_of_zeros(adaptive):
    """It has no direction: the weights stay where they are, and nothing is divided by zero."""
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, adaptive=adaptive, lr=0.1)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.first_step()
    assert equal(before, weights(model))
    optimizer.second_step()
    assert equal(before, weights(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("bad", [(True, False), (False, True), (True, True)])
def test_a_gradient_that_is_not_finite(value, adaptive, base, bad):
    """The step is skipped: one entry is enough. 1e30 is finite, but its square is not."""
    kwargs = {"momentum": 0.9} if base is torch.optim.SGD else {}
    model, other = net().float(), net().float()
    optimizer = SAM(model.parameters(), base, rho=0.5, adaptive=adaptive, lr=0.1, weight_decay=0.1, **kwargs)
    expected = SAM(other.parameters(), base, rho=0.5, adaptive=adaptive, lr=0.1, weight_decay=0.1, **kwargs)
    images, labels = batch()
    for step in range(6):
        if step in (0, 3, 4):  # also before there is any state
            before = weights(model)
            for first, poisoned in zip((True, False), bad, strict=True):
                closure_of(model, optimizer, images.float(), labels)()
                if poisoned:
                    model[2].bias.grad[1] = value
                if first:
                    optimizer.first_step(zero_grad=True)
                    assert all(torch.isfinite(w).all() for w in weights(model))
                    assert equal(before, weights(model)) == poisoned
                else:
                    optimizer.second_step(zero_grad=True)
            assert equal(before, weights(model))
        else:
            optimizer.step(closure_of(model, optimizer, images.float(), labels))
            expected.step(closure_of(other, expected, images.float(), labels))
        assert optimizer.skipped.tolist() == [[1, 1], [1, 0], [1, 0], [2, 1], [3, 2], [3, 0]][step]
    assert equal(weights(model), weights(other))  # as if these steps had not been
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, found in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected.state[q][name]))


def test_a_skipped_step_of_parameters_that_first_step_did_not_see():
    """Those that only the second pass gives a gradient, as the normal part of a SharpBalance step does."""
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9)
    before = weights(model)
    model[0].weight.grad = torch.full_like(model[0].weight, float("inf"))
    optimizer.first_step(zero_grad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.second_step()
    assert equal(before, weights(model))
    closure_of(model, optimizer, *batch())()
    optimizer.first_step()
    optimizer.restore()
    assert equal(before, weights(model))


def test_wrong_order_of_calls():
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match="first_step: no parameter has a gradient"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step: the weights are not perturbed"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="expected a closure"):
        optimizer.step()
    closure_of(model, optimizer, *batch())()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="perturbed already"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="load_state_dict: the weights are perturbed"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("given", [torch.optim.SGD(net().parameters(), lr=0.1), "SGD", 0.1])
def test_an_optimizer_for_a_class(given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=rf"base_optimizer: expected the class .* got an object of {kind}"):
        SAM(net().parameters(), given, rho=0.05)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_rho_out_of_range(rho):
    with pytest.raises(ValueError, match="rho: "):
        SAM(net().parameters(), rho=rho, lr=0.1)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_dict_holds_the_momentum_and_resumes_bit_for_bit(base):
    kwargs = {"momentum": 0.9} if base is torch.optim.SGD else {}
    images, labels = batch()
    whole = net()
    optimizer = SAM(whole.parameters(), base, rho=0.2, lr=0.1, **kwargs)
    for _ in range(6):
        optimizer.step(closure_of(whole, optimizer, images, labels))
    first = net()
    optimizer = SAM(first.parameters(), base, rho=0.2, lr=0.1, **kwargs)
    for _ in range(3):
        optimizer.step(closure_of(first, optimizer, images, labels))
    saved = pickle.loads(pickle.dumps((first.state_dict(), optimizer.state_dict())))
    second = net(seed=5)
    second.load_state_dict(saved[0])
    optimizer = SAM(second.parameters(), base, rho=9.0, lr=9.0, **kwargs)
    optimizer.load_state_dict(saved[1])
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups[0]["rho"] == 0.2
    for _ in range(3):
        optimizer.step(closure_of(second, optimizer, images, labels))
    assert equal(weights(whole), weights(second))


def test_schedulers_act_on_the_base_optimizer_without_a_warning():
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    images, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            closure_of(model, optimizer, images, labels)()
            optimizer.first_step(zero_grad=True)
            closure_of(model, optimizer, images, labels)()
            optimizer.second_step(zero_grad=True)
            scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert all(p.grad is None for p in model.parameters())


def test_copies_keep_sharing():
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(model, optimizer, *batch()))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.state is other.base_optimizer.state
        assert other.param_groups is other.base_optimizer.param_groups
        assert len(other.state) == 4


def test_added_groups_get_all_defaults():
    model = net()
    optimizer = SAM(model[0].parameters(), rho=0.1, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": model[2].parameters(), "rho": 0.3})
    optimizer.step(closure_of(model, optimizer, *batch()))
    assert optimizer.base_optimizer.param_groups[1]["momentum"] == 0.9
    assert len(optimizer.state) == 4


def test_scaled_gradients():
    """With a GradScaler the steps are those without; one that overflows is skipped, and the scale falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu")
    images, labels = torch.randn(4, 16, 5).double(), torch.randint(0, 3, (4, 16))
    plain, scaled = (SAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9) for m in (model, other))

    def step(batch, target):
        scaler.scale(F.cross_entropy(other(batch), target)).backward()
        scaled.first_step(zero_grad=True)
        scaler.scale(F.cross_entropy(other(batch), target)).backward()
        scaler.unscale_(scaled)
        scaled.second_step(zero_grad=True)
        scaler.update()

    for batch, target in zip(images, labels, strict=True):
        F.cross_entropy(model(batch), target).backward()
        plain.first_step(zero_grad=True)
        F.cross_entropy(model(batch), target).backward()
        plain.second_step(zero_grad=True)
        step(batch, target)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    before, scale = [p.clone() for p in other.parameters()], scaler.get_scale()
    step(images[0] * float("inf"), labels[0])
    assert all(map(torch.equal, before, other.parameters()))
    assert scaler.get_scale() == scale / 2
