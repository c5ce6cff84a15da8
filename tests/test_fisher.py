import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils.fisher
from models import MODELS, create_model
from tests import reference
from utils.fisher import ntk_gram, per_sample_fisher
from utils.hessian import hessian_trace, top_eigenpairs
from utils.sharpness import average_sharpness, worst_case_sharpness


def summed_logit_gradients(model, images, names):
    """One row a sample: the gradient of the sum of its logits, by one backward pass each."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(model(x[None]).sum(), parameters)]) for x in images]
    return torch.stack(rows)


def test_ntk_equals_a_loop(monkeypatch):
    model, images, _ = case(create_model("resnet18", 4, 2, 8), (3, 8, 8), 4, batch=7)
    names = {name for name, _ in model.named_parameters()}
    rows = summed_logit_gradients(model, images, names)
    torch.testing.assert_close(ntk_gram(model, images, None), rows @ rows.T, rtol=1e-10, atol=1e-10)
    rows = summed_logit_gradients(model, images, {name for name in names if name.endswith("weight")})
    # In blocks of three images, so that there are blocks off the diagonal and a last short one.
    monkeypatch.setattr(utils.fisher, "NTK_NUMBERS", 3 * rows.shape[1])
    torch.testing.assert_close(ntk_gram(model, images), rows @ rows.T, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="no trainable parameter matches 'nothing'"):
        ntk_gram(model, images, "nothing")
    with pytest.raises(ValueError, match="eval mode"):
        ntk_gram(model.train(), images)


def test_ntk_of_a_linear_model_in_closed_form():
    """K_ij = C (1 + <x_i, x_j>) for C outputs with bias."""
    model = nn.Linear(5, 3).double().eval()
    images = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(ntk_gram(model, images, None), 3 * (1 + images @ images.T), rtol=1e-12, atol=1e-12)


def test_the_mean_is_the_trace_of_the_empirical_fisher_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, images, labels = case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), 3, batch=9)
    data = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    parameters = list(model.parameters())
    theirs = curvlinops.EFLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    trace = (theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)).trace()
    torch.testing.assert_close(per_sample_fisher(model, images, labels).mean(), trace, rtol=1e-8, atol=0)


@pytest.fixture(autouse=True)
def _warn_anew():
    utils.fisher.WARNED_OF.clear()


def case(model, shape, classes, batch=6, seed=0):
    torch.manual_seed(seed)
    model = reference.randomize_batch_norm(model.double()).eval()
    return model, torch.randn(batch, *shape, dtype=torch.float64), torch.randint(0, classes, (batch,))


def assert_equal_to_loop(model, images, labels):
    scores = per_sample_fisher(model, images, labels)
    torch.testing.assert_close(scores, reference.fisher_by_samples(model, images, labels), rtol=1e-10, atol=0)
    return scores


@pytest.mark.parametrize("name", MODELS)
def test_every_model_equals_a_loop(name):
    torch.manual_seed(0)
    width = 2 if name.startswith("resnet") else 4
    assert_equal_to_loop(*case(create_model(name, 7, width, 8), (3, 8, 8), 7, batch=2))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn-40-2", "vit_t"])
def test_32x32_equals_a_loop_and_vmap(name):
    torch.manual_seed(0)
    model, images, labels = case(create_model(name, 7, 4, 32), (3, 32, 32), 7, batch=2)
    scores = assert_equal_to_loop(model, images, labels)
    torch.testing.assert_close(scores, reference.fisher_by_vmap(model, images, labels), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_t"])
def test_the_form_for_64(name):
    torch.manual_seed(0)
    assert_equal_to_loop(*case(create_model(name, 5, 2, 64, in_channels=1), (1, 64, 64), 5, batch=2))


def test_wide_layers_take_the_gram_form(monkeypatch):
    """Width 32 at 32x32 has stages in the direct form, in the pixels' Gram form and in the patches' Gram form."""
    called = []
    for name in ("_direct", "_gram"):
        function = getattr(utils.fisher, name)
        monkeypatch.setattr(utils.fisher, name, lambda *a, f=function, n=name: (called.append(n), f(*a))[1])
    torch.manual_seed(0)
    assert_equal_to_loop(*case(create_model("resnet18", 10, 32), (3, 32, 32), 10, batch=3))
    assert {"_direct", "_gram"} <= set(called)


@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": (1, 0), "stride": (1, 2), "dilation": (2, 1)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 4, "padding": "same", "dilation": 3},
        {"kernel_size": 2, "padding": "valid", "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 1, "stride": 3},
        {"kernel_size": 7, "stride": 1, "padding": 3, "out": 256},
    ],
)
@pytest.mark.parametrize("force", [None, "direct", "gram"])
def test_convolutions(options, channels, force, monkeypatch):
    if force == "direct":
        monkeypatch.setattr(utils.fisher, "MOVE_COST", 10**9)
    elif force == "gram":
        monkeypatch.setattr(utils.fisher, "MOVE_COST", -(10**9))
    monkeypatch.setattr(utils.fisher, "CHUNK_NUMBERS", 2000)
    options = dict(options)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, options.pop("out", 4), **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )
    net(torch.zeros(1, channels, 11, 9))
    assert_equal_to_loop(*case(net, (channels, 11, 9), 3, batch=5))


class Sequence(nn.Module):
    """Linear layers on [B, T, D] and [B, S, T, D], LayerNorm over one and two dimensions."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm((3, 5))
        self.head = nn.Linear(60, 3)

    def forward(self, x):
        x = self.norm1(torch.tanh(self.a(x)))
        x = self.b(x.view(len(x), 4, 3, -1))
        return self.head(self.norm2(x).flatten(1))


@pytest.mark.parametrize("width", [3, 300])  # direct and Gram form
def test_linear_and_layer_norm_on_sequences(width):
    torch.manual_seed(0)
    assert_equal_to_loop(*case(Sequence(width), (12, 6), 3))


def test_batch_norm_1d_with_and_without_length():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    assert_equal_to_loop(*case(net, (6,), 3))
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    assert_equal_to_loop(*case(net, (5, 6), 3))


def test_value_does_not_depend_on_the_batch():
    model, images, labels = case(create_model("resnet18", 5, 8, 8), (3, 8, 8), 5, batch=9)
    whole = per_sample_fisher(model, images, labels)
    order = torch.randperm(9)
    torch.testing.assert_close(per_sample_fisher(model, images[order], labels[order]), whole[order], rtol=1e-10, atol=0)
    parts = [per_sample_fisher(model, images[i : i + 2], labels[i : i + 2]) for i in range(0, 9, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=0)
    assert per_sample_fisher(model, images[:0], labels[:0]).shape == (0,)


def test_float32_and_channels_last():
    torch.manual_seed(0)
    model = create_model("resnet18", 10, 16).eval()
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    exact = per_sample_fisher(model.double(), images.double(), labels)
    model = model.float().to(memory_format=torch.channels_last)
    scores = per_sample_fisher(model, images.to(memory_format=torch.channels_last), labels)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=0)


def test_frozen_parameters_do_not_count():
    model, images, labels = case(create_model("resnet18", 5, 4, 8), (3, 8, 8), 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bn" not in name or "weight" in name)
    model.conv1.weight.requires_grad_(False)
    assert_equal_to_loop(model, images, labels)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        per_sample_fisher(model, images, labels)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.factor**2


def test_unknown_layers_fall_to_vmap_and_say_so_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), Unknown(), nn.PReLU(4), nn.Linear(4, 3))
    arguments = case(net, (6,), 3)
    with pytest.warns(UserWarning, match="chunked vmap") as caught:
        scores = [per_sample_fisher(*arguments) for _ in range(2)]
    assert torch.equal(*scores)
    torch.testing.assert_close(scores[0], reference.fisher_by_samples(*arguments), rtol=1e-10, atol=0)
    assert sorted(str(w.message).split()[1] for w in caught) == ["PReLU", "Unknown"]


def test_group_norm_equals_the_slow_form():
    """In groups of channels, with and without positions; no other way is taken."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.GroupNorm(3, 96), nn.Linear(96, 3)
    net = nn.Sequential(*layers)
    for layer in (net[1], net[4]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    arguments = case(net, (3, 6, 6), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = per_sample_fisher(*arguments)
    torch.testing.assert_close(scores, reference.fisher_by_samples(*arguments), rtol=1e-10, atol=0)


def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Doubled"):
        assert_equal_to_loop(*case(nn.Sequential(Doubled(6, 4), nn.Tanh(), nn.Linear(4, 3)), (6,), 3))


@pytest.mark.filterwarnings("ignore:.*Linear has no per-sample formula")
@pytest.mark.parametrize("place", [0, 1])
def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_its_type(place, monkeypatch):
    """Nor a container, whose layers are then used in another way than their types say: followed, and by its layers."""
    torch.manual_seed(0)
    model, images, labels = case(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))), (6,), 3)
    forward = model[place].forward
    model[place].forward = lambda x: forward(2 * x)
    counted, slow = [], utils.fisher._by_samples
    monkeypatch.setattr(utils.fisher, "_by_samples", lambda *a: (counted.append(len(a[1])), slow(*a))[1])
    scores = per_sample_fisher(model, images, labels)
    torch.testing.assert_close(scores, reference.fisher_by_samples(model, images, labels), rtol=1e-10, atol=0)
    assert counted == [min(utils.fisher.PROBES, len(images))]  # compared, and found to be the sum of its layers


class Twice(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if tied:
            self.b.weight = self.a.weight
        else:
            self.b = self.a

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("tied", [False, True])
def test_shared_parameters_and_layers_called_twice(tied):
    torch.manual_seed(0)
    model, images, labels = case(Twice(tied), (6,), 3)
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match="called twice|belongs to two"):
        scores = per_sample_fisher(model, images, labels)
    torch.testing.assert_close(scores, reference.fisher_by_samples(model, images, labels), rtol=1e-10, atol=0)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_an_input_changed_in_place_is_noticed():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = torch.tanh(self.a(x))
            out = self.b(x)
            x.mul_(2)
            return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_sample_fisher(*case(Careless(), (6,), 3))


def test_train_mode_is_refused():
    model, images, labels = case(create_model("resnet18", 5, 4, 8), (3, 8, 8), 5)
    model.bn1.train()
    with pytest.raises(ValueError, match=r"eval mode.*model\.eval"):
        per_sample_fisher(model, images, labels)


def test_nothing_is_left_behind():
    model, images, labels = case(create_model("resnet18", 5, 4, 8), (3, 8, 8), 5)
    model.linear.bias.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]

    def unchanged():
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())

    per_sample_fisher(model, images, labels)
    unchanged()
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        per_sample_fisher(model, images, labels + 100)
    unchanged()


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_memory_is_never_batch_times_parameters():
    torch.manual_seed(0)
    model = create_model("resnet18", 10, 64).eval()
    parameters = sum(p.numel() for p in model.parameters())
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    with LargestTensor() as seen:
        per_sample_fisher(model, images, labels)
    activation = 8 * 64 * 36 * 36
    assert seen.numbers <= max(utils.fisher.CHUNK_NUMBERS, activation) + 512 * 512 * 9
    assert seen.numbers < 8 * parameters / 10
    with LargestTensor() as seen:
        reference.fisher_by_vmap(model, images, labels)
    assert seen.numbers > 8 * 512 * 512 * 9 - 1  # the measure sees what the plain way holds


def test_equals_backpack():
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchL2Grad

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    model, images, labels = case(net, (3, 10, 10), 5, batch=7)
    scores = per_sample_fisher(model, images, labels)
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(BatchL2Grad()):
        loss(extended(images), labels).backward()
    theirs = sum(p.batch_l2 for p in extended.parameters())
    torch.testing.assert_close(scores, theirs, rtol=1e-10, atol=0)


SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
SWITCHES += (torch.backends.mkldnn.conv, torch.backends.cudnn.rnn)


@pytest.fixture
def precisions():
    def set_all(values):
        for switch, value in zip(SWITCHES, values, strict=True):
            switch.fp32_precision = value

    before = [switch.fp32_precision for switch in SWITCHES]
    yield set_all
    set_all(before)


class Watched(nn.Sequential):
    """Notes the precision of float32 products whenever it is called."""

    def forward(self, x):
        self.seen.add(tuple(switch.fp32_precision for switch in SWITCHES))
        return super().forward(x)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, x, y: per_sample_fisher(model, x, y),
        lambda model, x, y: ntk_gram(model, x),
        lambda model, x, y: hessian_trace(model, [(x, y)], probes=2),
        lambda model, x, y: top_eigenpairs(model, [(x, y)]),
        lambda model, x, y: worst_case_sharpness(model, [(x, y)], 0.1, n_iters=2),
        lambda model, x, y: average_sharpness(model, [(x, y)], 0.1, n_draws=4),
        lambda model, x, y: per_sample_fisher(model, x, y + 100),  # which fails
    ],
)
def test_what_is_measured_by_derivatives_has_full_precision(measure, precisions):
    """On recent GPUs TF32 is the default of convolutions; a user may have asked for less as well."""
    before = ("tf32", "tf32", "bf16", "bf16", "tf32")
    precisions(before)
    torch.manual_seed(0)
    model = Watched(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    model.seen = set()
    with suppress(IndexError, RuntimeError):
        measure(model, torch.randn(6, 4), torch.arange(6) % 3)
    assert model.seen == {("ieee",) * 5}
    assert tuple(switch.fp32_precision for switch in SWITCHES) == before
