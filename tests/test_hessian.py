import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError
from torch import nn
from torch.func import functional_call, hessian

import utils.hessian
from models import create_model
from utils.hessian import HessianOperator, hessian_trace, top_eigenpairs, top_eigenvalues


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.BatchNorm1d(10), nn.Linear(10, 4)).double().eval()


def batches(count=3, size=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size + i, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (size + i,), generator=generator),
        )
        for i in range(count)
    ]


def full_hessian(model, data, names=None):
    """The whole matrix by torch.func, of the mean loss over all samples."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    chosen = {n: p for n, p in parameters.items() if names is None or n in names}
    images, labels = (torch.cat(x) for x in zip(*data, strict=True))

    def loss(flat):
        pieces = flat.split([p.numel() for p in chosen.values()])
        moved = {n: piece.view(p.shape) for (n, p), piece in zip(chosen.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(model, parameters | moved, (images,)), labels)

    return hessian(loss)(torch.cat([p.flatten() for p in chosen.values()]))


def test_product_trace_and_eigenvalues_equal_the_full_matrix():
    model, data = net(), batches()
    H = full_hessian(model, data)
    operator = HessianOperator(model, data)
    assert operator.samples == sum(len(y) for _, y in data)
    vectors = torch.randn(operator.size, 3, dtype=torch.float64)
    torch.testing.assert_close(operator @ vectors, H @ vectors, rtol=0, atol=1e-10)
    torch.testing.assert_close(operator @ vectors[:, 0], H @ vectors[:, 0], rtol=0, atol=1e-10)
    values, pairs, residuals = top_eigenpairs(model, data, 5, tolerance=1e-10)
    expected = torch.linalg.eigvalsh(H).flip(0)
    torch.testing.assert_close(values, expected[:5], rtol=1e-7, atol=0)
    assert bool((residuals < 1e-6).all())
    torch.testing.assert_close(pairs.T @ pairs, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(top_eigenvalues(model, data, 2), expected[:2], rtol=1e-3, atol=0)
    # The algebraically largest, also where a negative one is larger in size.
    assert expected[0] > 0


def test_the_top_eigenvector_equals_that_of_the_full_matrix():
    model, data = net(), batches()
    values, vectors = torch.linalg.eigh(full_hessian(model, data))
    assert values[-1] > 1.05 * values[-2]  # or the vector would not be determined
    value, vector, _ = top_eigenpairs(model, data, tolerance=1e-12)
    torch.testing.assert_close(value[0], values[-1], rtol=1e-10, atol=0)
    sign = torch.sign(vector[:, 0] @ vectors[:, -1])
    torch.testing.assert_close(sign * vector[:, 0], vectors[:, -1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_standard_error_of_the_trace_covers(method):
    model, data = net(), batches(1, 12)
    exact = full_hessian(model, data).trace().item()
    z = []
    for seed in range(60):
        found = hessian_trace(model, data, 24, method, generator=torch.Generator().manual_seed(seed))
        z.append((found["trace"] - exact) / found["standard_error"])
    assert abs(np.mean(z)) < 4 * np.std(z) / math.sqrt(60)
    inside = np.mean(np.abs(z) < 2.5)
    assert inside > 0.85


def test_hutch_plus_plus_is_more_exact_for_a_few_large_eigenvalues():
    model = nn.Sequential(nn.Linear(24, 2)).double().eval()
    scale = 0.6 ** torch.arange(24, dtype=torch.float64)  # the spectrum falls as its square
    generator = torch.Generator().manual_seed(0)
    data = [(scale * torch.randn(40, 24, dtype=torch.float64, generator=generator), torch.arange(40) % 2)]
    exact = full_hessian(model, data).trace().item()
    spread = {}
    for method in ("hutchinson", "hutch++"):
        draws = [hessian_trace(model, data, 30, method, generator=torch.Generator().manual_seed(s)) for s in range(30)]
        spread[method] = np.sqrt(np.mean([(d["trace"] - exact) ** 2 for d in draws]))
    assert spread["hutch++"] < spread["hutchinson"] / 2
    # With as many products as the rank allows, it is exact.
    few = nn.Sequential(nn.Linear(6, 2)).double().eval()
    data = [(x, y % 2) for x, y in batches(1, 12)]
    found = hessian_trace(few, data, 42, "hutch++")
    assert found["trace"] == pytest.approx(full_hessian(few, data).trace().item(), rel=1e-8)


def silent():
    """A network whose loss does not depend on its first layer."""
    model = net()
    with torch.no_grad():
        model[3].weight.zero_()
    return model, batches(), "^0"


def saturated():
    """A loss that is 0 to the last bit, of float32: p (1 - p) = 0."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).eval()
    with torch.no_grad():
        model.weight.mul_(1e5)
        images = torch.randn(9, 6)
        return model, [(images, model(images).argmax(dim=1))], None


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("case", [silent, saturated])
def test_a_hessian_of_zeros_has_eigenvalues_of_zero(case, k):
    model, data, params = case()
    values, vectors, residuals = top_eigenpairs(model, data, k, params)
    assert values.tolist() == residuals.tolist() == [0.0] * k
    assert torch.equal(vectors.T @ vectors, torch.eye(k, dtype=torch.float64))
    assert top_eigenvalues(model, data, k, params).tolist() == [0.0] * k
    assert hessian_trace(model, data, params=params)["trace"] == 0


def test_another_failure_of_the_iteration_is_raised(monkeypatch):
    def fail(*args, **kwargs):
        raise ArpackError(-9999)

    monkeypatch.setattr(utils.hessian, "eigsh", fail)
    with pytest.raises(ArpackError):
        top_eigenpairs(net(), batches())


def test_logistic_regression_in_closed_form():
    """H = (1/N) sum_i p_i (1 - p_i) x_i x_i' for the difference of two logits."""

    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64))

        def forward(self, x):
            return torch.stack([torch.zeros(len(x), dtype=x.dtype), x @ self.w], dim=1)

    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, data = (
        Logistic().eval(),
        [(x[:8], torch.zeros(8, dtype=torch.int64)), (x[8:], torch.ones(12, dtype=torch.int64))],
    )
    p = torch.sigmoid(x @ model.w.detach())
    H = (x * (p * (1 - p))[:, None]).T @ x / 20
    torch.testing.assert_close(HessianOperator(model, data) @ torch.eye(3, dtype=torch.float64), H, rtol=0, atol=1e-12)
    torch.testing.assert_close(top_eigenvalues(model, data, 2), torch.linalg.eigvalsh(H).flip(0)[:2], rtol=1e-4, atol=0)


def test_a_part_of_the_parameters():
    model, data = net(), batches()
    H = full_hessian(model, data, names={"3.weight", "3.bias"})
    operator = HessianOperator(model, data, params="^3")
    torch.testing.assert_close(operator @ torch.eye(operator.size, dtype=torch.float64), H, rtol=0, atol=1e-10)


def test_equals_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, data = net(), batches()
    parameters = list(model.parameters())
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    vector = torch.randn(HessianOperator(model, data).size, dtype=torch.float64)
    ours = HessianOperator(model, data) @ vector
    torch.testing.assert_close(ours, torch.as_tensor(theirs @ vector), rtol=1e-8, atol=1e-10)


def test_a_residual_network_in_float32():
    torch.manual_seed(0)
    model = create_model("resnet18", 5, 2, 8).eval()
    data = [(torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,)))]
    exact = create_model("resnet18", 5, 2, 8).double().eval()
    exact.load_state_dict(model.state_dict())
    wide = [(x.double(), y) for x, y in data]
    a, b = top_eigenvalues(model, data, 3), top_eigenvalues(exact, wide, 3)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    ours, theirs = hessian_trace(model, data, 4), hessian_trace(exact, wide, 4)
    assert ours["trace"] == pytest.approx(theirs["trace"], rel=1e-3)


def test_second_derivatives_of_layers():
    """Those that are written out equal PyTorch's own, for all options, and nothing is left on the model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.BatchNorm2d(6, eps=0.3),
        nn.Tanh(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.Conv2d(5, 5, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Flatten(1, 2),
        nn.BatchNorm1d(20),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 3),
    )
    model = model.double()
    x, y = torch.randn(9, 4, 12, 6, dtype=torch.float64), torch.arange(9) % 3
    model(3 * x + 1)  # statistics that are not 0 and 1
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()
    for params in (None, "^0", "1.weight|3|9.bias"):
        operator = HessianOperator(model, [(x, y)], params)
        vectors = torch.randn(operator.size, 2, dtype=torch.float64)
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), operator.parameters, create_graph=True)
        for vector, ours in zip(vectors.T, (operator @ vectors).T, strict=True):
            theirs = torch.autograd.grad(
                gradients, operator.parameters, operator.as_parameters(vector), retain_graph=True
            )
            torch.testing.assert_close(ours, torch.cat([t.flatten() for t in theirs]), rtol=1e-9, atol=1e-11)
    assert not any("forward" in vars(module) for module in model.modules())
    one = HessianOperator(model, [(x, y), (x[:, :1], y)])
    with pytest.raises(RuntimeError, match="channels"):
        one @ torch.zeros(one.size)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_with_a_forward_of_their_own():
    """They are measured as they compute, and keep it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    convolution, norm = model[0].forward, model[1].forward
    own = {0: lambda x: convolution(x) ** 2, 1: lambda x: 3 * norm(x)}
    for i, forward in own.items():
        model[i].forward = forward
    model.eval()
    x, y = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.arange(6) % 3
    operator = HessianOperator(model, [(x, y)])
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), operator.parameters, create_graph=True)
    vector = torch.randn(operator.size, dtype=torch.float64)
    theirs = torch.autograd.grad(gradients, operator.parameters, operator.as_parameters(vector))
    ours = operator @ vector
    assert all(vars(model[i]).get("forward") is forward for i, forward in own.items())
    torch.testing.assert_close(ours, torch.cat([t.flatten() for t in theirs]), rtol=1e-9, atol=1e-11)


def test_a_transformer():
    """Attention's fused kernels have no second derivative: another one has to be taken."""
    torch.manual_seed(0)
    model = create_model("vit_t", 3, 1, 8, 1).double().eval()
    data = [(torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    operator = HessianOperator(model, data, "^blocks.0.attn")
    vector, other = torch.randn(2, operator.size, dtype=torch.float64)
    assert (operator @ vector).abs().max() > 0
    torch.testing.assert_close((operator @ vector) @ other, (operator @ other) @ vector)
    # Against the difference of gradients.
    step, gradients = 1e-7, []
    start = torch.nn.utils.parameters_to_vector(operator.parameters).detach()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * step * vector, operator.parameters)
        loss = F.cross_entropy(model(data[0][0]), data[0][1])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, operator.parameters)]))
    torch.nn.utils.vector_to_parameters(start, operator.parameters)
    expected = (gradients[0] - gradients[1]) / (2 * step)
    torch.testing.assert_close(operator @ vector, expected, rtol=1e-5, atol=1e-8 * expected.abs().max().item())


def test_memory_is_flat():
    """No graph outlives a product: the number of live tensors does not grow."""
    import gc

    model, data = net(), batches()
    operator = HessianOperator(model, data)

    def live():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    vector = torch.randn(operator.size, dtype=torch.float64)
    operator @ vector
    before = live()
    for _ in range(20):
        operator @ vector
    assert live() <= before + 2


def test_bad_arguments():
    model, data = net(), batches()
    with pytest.raises(ValueError, match="eval mode"):
        HessianOperator(net().train(), data)
    with pytest.raises(ValueError, match="no trainable parameter matches 'zzz'"):
        HessianOperator(model, data, "zzz")
    with pytest.raises(ValueError, match="no images"):
        HessianOperator(model, [])
    with pytest.raises(ValueError, match=r"k: expected 1 to \d+, got 0"):
        top_eigenvalues(model, data, 0)
    with pytest.raises(ValueError, match=r"probes: expected 2 or more for hutchinson, got 1"):
        hessian_trace(model, data, 1)
    with pytest.raises(ValueError, match=r"probes: expected 6 or more for hutch\+\+, got 5"):
        hessian_trace(model, data, 5, "hutch++")
    with pytest.raises(ValueError, match=r"method: .*, got 'xtrace'"):
        hessian_trace(model, data, 10, "xtrace")
