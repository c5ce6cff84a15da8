"""Networks of torchvision, timm and a user's file, and weights to start from."""

import json
import random
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main
import measure_diversity
import measure_sharpness
import utils.fisher
from models import check_model, create_model, full_name
from models.external import try_external
from sam import SAM
from tests import reference
from tests.files import write_image_folder
from tests.test_ensemble import ROOT
from tests.test_main import call, refused
from utils import InputError, cli
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.data import ImageSet, Preprocessing
from utils.files import pinned, unpinned
from utils.fisher import per_sample_fisher
from utils.hessian import HessianOperator
from utils.start import start_from
from utils.training import predict, sharpbalance_step

TORCHVISION = "resnet18 vgg11 mobilenet_v2 mobilenet_v3_small efficientnet_b0 convnext_tiny densenet121 squeezenet1_1 "
TORCHVISION += "shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf swin_t swin_v2_t vit_b_16"
TIMM = "vit_tiny_patch16_224 resnet18d convnext_atto swin_tiny_patch4_window7_224 mixer_s32_224 efficientvit_b0 "
TIMM += "coat_tiny mobilenetv4_conv_small edgenext_xx_small poolformerv2_s12 xcit_nano_12_p16_224 repvgg_a0 "
TIMM += "ghostnet_100 fastvit_t8 mobilevit_xxs tinynet_e lcnet_050 regnetx_002 pvt_v2_b0 gernet_s res2net50_14w_8s"
ALL = [f"torchvision:{name}" for name in TORCHVISION.split()] + [f"timm:{name}" for name in TIMM.split()]
QUICK = {"torchvision:shufflenet_v2_x0_5", "torchvision:swin_t", "timm:lcnet_050", "timm:vit_tiny_patch16_224"}

NO_HESSIAN = ("mobilenet_v3", "ghostnet", "lcnet")  # hard sigmoids

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.drop(self.stem(x).mean((2, 3))))

def make(num_classes, in_channels=3):
    return Net(num_classes, in_channels)

def raises(num_classes):
    raise TypeError("no\\nway")

def number(num_classes):
    return 3

class Two(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes, 3)

    def forward(self, x):
        return super().forward(x), x

class TwoLater(Two):
    def forward(self, x):
        return Net.forward(self, x) if self.training else super().forward(x)

class Stored(Two):
    def forward(self, x):
        if self.training:
            return Net.forward(self, x)
        if not hasattr(self, "kept"):
            self.kept = self.head.weight * 2
        return self.stem(x).mean((2, 3)) @ self.kept.T

class InPlace(Two):
    def forward(self, x):
        return Net.forward(self, x.sub_(0.5))

class Reentrant(Two):
    def forward(self, x):
        from torch.utils.checkpoint import checkpoint
        return self.head(checkpoint(self.stem, x.requires_grad_(), use_reentrant=True).mean((2, 3)))

class Noisy(nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))

def ten(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))

def features(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def no_statistics(num_classes):
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(3072, num_classes))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def skip_without_timm(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ALL])
@pytest.mark.filterwarnings("ignore")
def test_a_step_and_the_scores_of_a_network(name, tmp_path):
    skip_without_timm(name)
    torch.manual_seed(0)
    model = create_model(name, 5, image_size=64)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 1, 4])
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    loss, _ = sharpbalance_step(model, optimizer, images, labels, torch.tensor([True, True, False, False]))
    assert loss.isfinite()
    assert optimizer.skipped.tolist() == [0, 0]
    assert sum(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) < len(before) / 2
    model.double().eval()
    scores = per_sample_fisher(model, images.double(), labels)
    exact = reference.fisher_by_samples(model, images.double(), labels)
    torch.testing.assert_close(scores, exact, rtol=1e-8, atol=0)
    model.float()
    # The checkpoint alone rebuilds it; features and a product with the Hessian are there.
    about = {"model": name, "num_classes": 5, "width": 64, "image_size": 64, "in_channels": 3}
    save_checkpoint(tmp_path / "x.pth", {"state_dict": model.state_dict(), "epoch": 1, "dataset": "x", **about})
    loaded, _ = load_model(tmp_path / "x.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    colours = ImageSet(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2, np.int64), Preprocessing((0.5,) * 3, (0.3,) * 3))
    logits, features = predict(loaded, colours, features=True)
    assert logits.shape == (2, 5)
    assert features.dim() == 2
    operator = HessianOperator(loaded, [(images[:2], labels[:2])])
    if name.rpartition(":")[2].startswith(NO_HESSIAN):
        with pytest.raises(InputError, match="no second derivative of hardsigmoid_backward"):
            operator @ torch.ones(operator.size, 1)
    elif "swin_v2" not in name:  # which normalises keys that are 0 where a window is padded: nan
        assert (operator @ torch.ones(operator.size, 1)).isfinite().all()


def test_scores_follow_the_layers_where_that_is_possible(monkeypatch):
    """Depthwise convolutions, windows of attention and layers used without a call: no sample alone after the trial."""
    monkeypatch.setattr(utils.fisher, "PROBES", 2)
    counted = []
    slow = utils.fisher._by_samples
    monkeypatch.setattr(utils.fisher, "_by_samples", lambda *a: (counted.append(len(a[1])), slow(*a))[1])
    torch.manual_seed(0)
    for name in ("torchvision:shufflenet_v2_x0_5", "torchvision:swin_t"):
        model = create_model(name, 5, image_size=32).eval()
        images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            per_sample_fisher(model, images, labels)
            per_sample_fisher(model, images, labels)
    assert counted == [2, 2]
    for network in (Table, Named, Aux):
        counted.clear()
        model = network().double().eval()
        images, labels = torch.randn(5, 4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 2])
        for n in (1, 5, 5):  # one image alone is no trial
            model.requires_grad_(True)
            scores = per_sample_fisher(model, images[:n], labels[:n])
            if network is Aux:
                model.aux.requires_grad_(False)
            expected = reference.fisher_by_samples(model, images[:n], labels[:n])
            torch.testing.assert_close(scores, expected, rtol=1e-10, atol=0)
        assert counted == [1, 2], network


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Linear(2, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.out(x * self.positions(torch.ones(4, 2, dtype=x.dtype)).mean(0))


class Table(nn.Module):
    """A layer within a layer that sees no images, but a table of its own, as positions in some attentions do."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Positions(), nn.Linear(6, 3)

    def forward(self, x):  # [B, T, D]
        return self.head(torch.tanh(self.inner(x.mean(1))))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return dict(zip("ab", self.linear(x).chunk(2, 1), strict=True))


class Scaled(nn.Module):
    """A layer with a weight of its own, whose output is no tensor."""

    def __init__(self):
        super().__init__()
        self.halves, self.factor = Halves(), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.halves(x * self.factor)


class Named(nn.Module):
    """The scores of `Scaled` are those of the layer around it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Joined(), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x.mean(1))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Scaled()

    def forward(self, x):
        return torch.cat(list(self.inner(x).values()), 1)


class Permuted(nn.Module):
    """A layer whose first dimension has the size of the batch, and is not the samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):  # [B, T, D]
        return self.head(torch.tanh(self.inner(x.flatten(0, 1).flip(0))).flip(0).view_as(x).mean(1))


class Attention(nn.Module):
    """torch's own attention uses its last layer without calling it."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Aux(nn.Module):
    """A head that is used in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.body(x)).mean(1)
        return self.head(x) + self.aux(x) if self.training else self.head(x)


@pytest.mark.parametrize("network", [Permuted, Attention, Aux])
@pytest.mark.filterwarnings("ignore")
def test_scores_of_layers_that_do_not_stand_alone(network):
    torch.manual_seed(0)
    model = network().double().eval()
    images, labels = torch.randn(5, 4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 2])
    if network is Aux:
        model.aux.requires_grad_(False)
        expected = reference.fisher_by_samples(model, images, labels)
        model.aux.requires_grad_(True)
    else:
        expected = reference.fisher_by_samples(model, images, labels)
    for n in (1, 5, 1):  # one image alone cannot show whether samples keep apart
        scores = per_sample_fisher(model, images[:n], labels[:n])
        torch.testing.assert_close(scores, expected[:n], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet19", 32, "expected one of resnet18, .*FILE.py:FACTORY, got 'resnet19'; nearest: resnet18"),
        ("mobilenet_v2", 32, "nearest: torchvision:mobilenet_v2"),
        ("torchvision:resnet19", 32, "torchvision has no classifier 'resnet19'; nearest: torchvision:resnet18"),
        ("torchvision:googlenet", 64, "returns a GoogLeNetOutputs in train mode, not one tensor of logits"),
        ("torchvision:inception_v3", 32, "cannot take 3 x 32 x 32 images"),
        ("torchvision:maxvit_t", 32, "could not be built: ValueError: Input size"),
        ("resnet50", 65, "at most 64 x 64 pixels, got 65; torchvision:resnet50 costs a fifteenth"),
        ("wrn-28-10", 224, "torchvision:wide_resnet50_2 costs far less"),
        ("net.py:raises", 32, "net.py:raises could not be built: TypeError: no$"),
        ("net.py:number", 32, "expected a torch.nn.Module, got int"),
        ("net.py:Two", 32, "returns a tuple in train mode, not one tensor of logits"),
        ("net.py:TwoLater", 32, "returns a tuple in eval mode, not one tensor of logits"),
        ("net.py:Stored", 32, "its gradient cannot be taken twice in eval mode"),
        ("net.py:InPlace", 32, "changes its input in place, but other passes see the same images; let it work on a c"),
        ("net.py:Reentrant", 32, "hides 4 of its weights from torch.autograd.grad; with torch.utils.checkpoint"),
        ("net.py:features", 32, r"expected float logits \\[2, 5\\], got torch.float32 \\[2, 4, 30, 30\\]"),
        ("net.py:lazy", 32, "has lazy layers"),
        ("net.py:no_statistics", 32, "BatchNorm without running statistics"),
        ("net.py:maek", 32, "has no function 'maek'; it has make"),
        ("other.py:make", 32, "other.py cannot be read .no such file."),
        ("net.py:make@0123456789abcdef", 32, "has changed since the network was trained"),
        ("bad.py:make", 32, "bad.py could not be executed: SyntaxError"),
        ("taken.py:make", 32, "taken.py imports 'models', which is a module of this program; rename .*models$"),
    ],
)
def test_networks_that_cannot_be(name, size, message, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "bad.py").write_text("def")
    (file.parent / "models").mkdir()
    (file.parent / "taken.py").write_text("from models.own import make")
    with pytest.raises(ValueError, match=message.replace("\\\\", "\\")) as caught:
        check_model(name, 5, image_size=size)
    assert "\n" not in str(caught.value)


def test_other_widths_and_channels():
    with pytest.raises(ValueError, match=r"width: expected 64 with torchvision:resnet18.*got 8"):
        check_model("torchvision:resnet18", 5, 8)
    state = torch.get_rng_state()
    try_external("torchvision:squeezenet1_1", 5, 32, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    grey = create_model("torchvision:resnet18", 5, in_channels=1)
    torch.manual_seed(3)
    colour = create_model("torchvision:resnet18", 5)
    assert torch.equal(grey.conv1.weight, colour.conv1.weight[:, :1])
    assert grey.fc.out_features == 5


def test_a_file_that_is_made_for_the_classes_of_a_folder(file, tmp_path, capsys):
    """It is tried with their number, before a long run."""
    place = write_image_folder(tmp_path / "x", dict.fromkeys("abc", 12))
    words = ["--data", "folder", "--data_path", place, "--image_size", "8", "--epochs", "1", "--seed", "1"]
    call([*words, "--model", f"{file}:ten", "--save_path", tmp_path / "run"])
    shutil.rmtree(place / "c")
    line = refused([*words, "--model", f"{file}:ten", "--save_path", tmp_path / "other"], capsys)
    assert "expected float logits [2, 2], got torch.float32 [2, 3]" in line


def test_averages_do_not_depend_on_what_was_drawn_before(file, tmp_path):
    """The statistics of BatchNorm behind a dropout: written anew, they are the same bytes."""
    words = ["--model", f"{file}:Noisy", "--epochs", "2", "--average_from", "1", "--seed", "1", "2", "--jobs", "1"]
    call([*words, "--save_path", tmp_path / "run"])
    found = {path: path.read_bytes() for path in (tmp_path / "run").glob("seed_*/*averag*")}
    assert len(found) == 2
    for path in found:
        path.unlink()
    call([*words, "--save_path", tmp_path / "run"])
    assert all(path.read_bytes() == content for path, content in found.items())


class Cosine(nn.Module):
    """A head that uses a layer without calling it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.linear.weight), self.linear.bias)


@pytest.mark.parametrize("change", ["weight_norm", "not called"])
def test_a_changed_network_of_this_repository_is_tried_too(change):
    """Its class is ours, its layers are not."""
    torch.manual_seed(0)
    model = create_model("resnet18", 5, 2).double()
    if change == "weight_norm":
        torch.nn.utils.weight_norm(model.linear)
    else:
        model.linear = Cosine(model.linear)
    model.eval()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = per_sample_fisher(model, images, labels)
    torch.testing.assert_close(found, reference.fisher_by_samples(model, images, labels), rtol=1e-8, atol=0)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm cannot be imported.*; install it by pip install timm"):
        check_model("timm:resnet18", 5)


@pytest.mark.parametrize(("name", "near"), [("resnet18dd", "timm:resnet18d"), ("hf-hub:a/b", ""), ("local-dir:/x", "")])
def test_timm_never_fetches(name, near):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"timm has no classifier '{name}'.*{near}"):
        check_model(f"timm:{name}", 5)


def test_a_tag_that_timm_does_not_know():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm:resnet18\.nothing: .*leave the tag out, weights are drawn anew"):
        check_model("timm:resnet18.nothing", 5)


RECIPE = ["--sam", "--rho", "0.05", "--flat_ratio", "0.5", "--optimizer", "adamw", "--label_smoothing", "0.1"]
RECIPE += ["--clip_norm", "1", "--warmup_epochs", "1", "--seed", "1", "2", "--batch_size", "200", "--threads", "1"]


def weights_of(run, name="checkpoint.pth.tar"):
    return [torch.load(run / f"seed_{s}" / name, weights_only=True)["state_dict"] for s in (1, 2)]


@pytest.mark.filterwarnings("ignore")
def test_a_file_trains_resumes_moves_and_is_measured(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "net.py:make", *RECIPE, "--epochs", "3", "--initial_epochs", "1"]
    call([*words, "--save_path", "whole"])
    kept = json.loads((tmp_path / "whole" / "args.json").read_text())["model"]
    assert kept == full_name(f"{file}:make")
    assert kept.startswith(f"{file}:make@")

    # Stopped after each epoch, with dropout, moments and the warm-up, it comes to the same bits.
    import utils.member

    epoch = utils.member.Member.train_epoch

    class StopError(Exception):
        pass

    def once(member):
        epoch(member)
        raise StopError

    monkeypatch.setattr(utils.member.Member, "train_epoch", once)
    for _ in range(6):
        with pytest.raises(StopError):
            call([*words, "--save_path", "parts"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    call([*words, "--save_path", "parts"])
    for a, b in zip(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))

    measures = measure_diversity.main, measure_diversity.parse_args
    measure = ["--resume", "whole", "--mode", "predict,CKA", "--split", "test", "--threads", "1"]
    cli.run(measures[0], measures[1](measure))
    sharp = "--resume whole --mode fisher,hessian_e --hessian_samples 50 --threads 1 --save sharp"
    cli.run(measure_sharpness.main, measure_sharpness.parse_args(sharp.split()))

    moved = tmp_path / "elsewhere" / "net.py"
    moved.parent.mkdir()
    shutil.move(file, moved)
    error = refused(["--resume", "whole"], capsys)
    assert f"{file} cannot be read" in error
    assert "give its new place by --model" in error
    call(["--resume", "whole", "--model", f"{moved}:make"])
    cli.run(measures[0], measures[1]([*measure, "--model", f"{moved}:make"]))
    moved.write_text(FILE + "# changed\n")
    assert "a run of other settings (--model" in refused(["--resume", "whole", "--model", f"{moved}:make"], capsys)
    shutil.copy(moved, file)
    assert "has changed since the network was trained" in refused(["--resume", "whole"], capsys)


def test_a_file_imports_what_lies_beside_it(file):
    """Where it is executed, and where its function is called; never afterwards."""
    for name in ("beside_one", "beside_two"):
        (file.parent / f"{name}.py").write_text("from torch import nn\n")
    late = "def make(n):\n    from beside_two import nn\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, n))\n"
    file.write_text("import beside_one\n" + late)
    before = list(sys.path)
    assert create_model(f"{file}:make", 5, image_size=8)[1].out_features == 5
    assert sys.path == before


@pytest.mark.filterwarnings("ignore")
def test_processes_of_their_own_train_a_file_to_the_same_bits(file, tmp_path):
    """Each member by a process that starts the command anew; only the one that starts them tries the network."""
    text = "def count(n, in_channels):\n    print('made', flush=True)\n    return make(n, in_channels)\n"
    file.write_text(FILE + text)
    words = ["--model", f"{file}:count", *RECIPE, "--epochs", "2", "--initial_epochs", "1", "--save_path"]
    call([*words, str(tmp_path / "one")])
    command = [sys.executable, "main.py", *words, str(tmp_path / "two"), "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "by 2 processes" in done.stdout
    assert done.stdout.count("made") == 3 + 2 + 4  # tried, as two members, and from the checkpoints of the summary
    for a, b in zip(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


SEEDS = """
import random
import numpy as np
import torch
from torch import nn

torch.manual_seed(0)
np.random.seed(0)
random.seed(0)
torch.set_num_threads(3)
TABLE = torch.randn(4)
"""
DRAWS = """
import random
import numpy as np
import torch
from torch import nn

TABLE = torch.tensor([torch.randn(()), np.random.randn(), random.random()])
"""
MAKE = """
def make(n, in_channels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, n))
    nn.init.constant_(model[1].bias, np.random.randn() + random.random())
    model.register_buffer("table", TABLE.clone())
    return model
"""


@pytest.mark.parametrize("text", [SEEDS, DRAWS])
def test_a_file_that_seeds_or_draws_where_it_is_executed(text, file, tmp_path):
    """Members start from weights of their own seeds, and the file from its own, whichever process executes it."""
    file.write_text(text + MAKE)
    words = ["--model", f"{file}:make", "--seed", "1", "2", "--epochs", "1", "--lr", "0", "--threads", "1"]
    call([*words, "--save_path", tmp_path / "one"])
    command = [sys.executable, "main.py", *words, "--save_path", tmp_path / "two", "--jobs", "2"]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "by 2 processes" in done.stdout
    one, two = weights_of(tmp_path / "one")
    assert torch.equal(one["table"], two["table"])
    for name in ("1.weight", "1.bias"):
        assert not torch.equal(one[name], two[name]), name
    for a, b in zip((one, two), weights_of(tmp_path / "two"), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_leaves_the_generators_alone(file):
    """And torch's threads; its function draws from torch's, as a member's start is drawn."""
    file.write_text(SEEDS + MAKE)
    torch.manual_seed(7)

    def states():
        return torch.get_num_threads(), random.getstate(), np.random.get_state()[1].tolist()

    before, drawn = states(), torch.get_rng_state()
    check_model(f"{file}:make", 5, image_size=8, seeds=[1, 2])
    assert states() == before
    assert torch.equal(torch.get_rng_state(), drawn)
    file.write_text(SEEDS + MAKE + "# anew")
    first = create_model(f"{file}:make", 5, image_size=8)
    assert states() == before
    torch.manual_seed(7)
    assert torch.equal(create_model(f"{file}:make", 5, image_size=8)[1].weight, first[1].weight)


STARTS = """
import torch
from torch import nn

def plain(n):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, n))

def seeds(n):
    torch.manual_seed(0)
    return plain(n)

def aside(n):
    with torch.random.fork_rng():
        return seeds(n)

ONE = plain(5)

def shared(n):
    return ONE

def late(n):
    import beside_seeds
    return plain(n)

def own(n):
    model = plain(n)
    torch.nn.init.normal_(model[1].bias, generator=torch.Generator().manual_seed(torch.Generator().seed()))
    return model

def zeros(n):
    model = plain(n)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.register_buffer("empty", torch.tensor([float("nan")]))
    return model
"""


@pytest.mark.parametrize("seeds", [(1, 2), (1,), ()])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("seeds", "starts from the same weights with seed 1 and with seed 2; .* or give .* by --init_from FILE"),
        ("aside", "starts from the same weights with seed 1 and with seed 2"),
        ("shared", "starts from the same weights with seed 1 and with seed 2"),
        ("late", "starts from other weights each time .*; let it draw .*, and import at the top of the file what"),
        ("own", "starts from other weights each time that it is made by one seed; let it draw from torch's generator"),
        ("plain", None),
        ("zeros", None),
    ],
)
def test_starts_that_are_not_of_the_seeds(factory, words, seeds, file, monkeypatch):
    (file.parent / "beside_seeds.py").write_text("import torch\ntorch.manual_seed(0)\n")
    monkeypatch.delitem(sys.modules, "beside_seeds", raising=False)
    file.write_text(STARTS)
    fine = words is None or not seeds or (len(seeds) == 1 and "the same" in words)
    if fine:
        check_model(f"{file}:{factory}", 5, image_size=8, seeds=seeds)
        return
    with pytest.raises(ValueError, match=words):
        check_model(f"{file}:{factory}", 5, image_size=8, seeds=seeds)


def test_equal_starts_in_a_run(file, tmp_path, capsys, monkeypatch):
    """Refused where a run begins, but not where the members' weights are given, or one member is alone."""
    file.write_text(STARTS.replace("192", "64"))
    words = ["--epochs", "1", "--lr", "0", "--threads", "1", "--model"]
    line = refused([*words, f"{file}:seeds", "--seed", "3", "4", "--save_path", tmp_path / "none"], capsys)
    assert f"error: --model: {file}:seeds@" in line
    assert "starts from the same weights with seed 3 and with seed 4; let it seed no generator" in line
    assert not (tmp_path / "none").exists()
    torch.save(create_model(f"{file}:plain", 10, image_size=8, in_channels=1).state_dict(), tmp_path / "w.pth")
    given = [*words, f"{file}:seeds", "--seed", "1", "2", "--init_from", tmp_path / "w.pth"]
    call([*given, "--save_path", tmp_path / "given"])
    one, two = weights_of(tmp_path / "given")
    assert torch.equal(one["1.weight"], two["1.weight"])
    call([*words, f"{file}:seeds", "--seed", "3", "--save_path", tmp_path / "alone"])
    # A run that has begun, by an earlier version, goes on: its checkpoints hold the weights.
    begun = [*words, f"{file}:seeds", "--seed", "3", "4", "--save_path", tmp_path / "begun"]
    with monkeypatch.context() as patch:
        patch.setattr(main, "seeds_drawn", lambda args: [])
        call(begun)
    call(begun)
    call(["--resume", tmp_path / "begun"])
    assert "starts from the same weights" in refused([*begun, "--overwrite"], capsys)


def test_a_checkpoint_does_not_name_what_is_executed_without_its_digest(file, tmp_path):
    model = create_model(f"{file}:make", 5, in_channels=1)
    known = {"model": f"{file}:make", "num_classes": 5, "width": 64, "image_size": 8, "in_channels": 1}
    content = {"state_dict": model.state_dict(), "epoch": 1, "dataset": "digits", **known}
    save_checkpoint(tmp_path / "x.pth", content)
    file.write_text(FILE + "raise SystemExit\n")
    with pytest.raises(InputError, match="expected the absolute path of a file and its digest"):
        load_model(tmp_path / "x.pth")


def start(model, source, classes):
    """What a member does."""
    path = unpinned(source)
    return start_from(model, load_checkpoint(path, names=model.state_dict())["state_dict"], classes, path)


def saved(tmp_path, state, name="weights.pth"):
    torch.save(state, tmp_path / name)
    return pinned(tmp_path / name)


def test_init_from_another_head(tmp_path):
    torch.manual_seed(0)
    source = reference.randomize_batch_norm(create_model("resnet18", 7, 4))
    state = {f"module.backbone.{name}": value for name, value in source.state_dict().items()}
    torch.manual_seed(1)
    model, drawn = create_model("resnet18", 5, 4), None
    drawn = model.linear.weight.detach().clone()
    text = start(model, saved(tmp_path, {"state_dict": state, "epoch": 3}), 5)
    assert "120 of 122 tensors loaded; drawn anew, of another size there: linear.weight [7, 32] for [5, 32]" in text
    for name, value in model.state_dict().items():
        if not name.startswith("linear"):
            assert torch.equal(value, source.state_dict()[name])
    assert torch.equal(model.linear.weight, drawn)


def test_init_from_a_network_whose_names_look_wrapped(tmp_path):
    """`encoder` holds most of torchvision's ViT, and is no wrapper there."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"conv_proj": nn.Linear(3, 4), "encoder": nn.Sequential(nn.Linear(4, 4)), "heads": nn.Linear(4, 2)}
    )
    source = {f"model.{k}": torch.randn_like(v) for k, v in model.state_dict().items()}
    assert "6 of 6 tensors loaded" in start(model, saved(tmp_path, source), 2)


def test_init_of_a_network_with_a_weight_that_is_one_number(tmp_path):
    """As of a learned temperature; one that the file lacks stays as it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    source = saved(tmp_path, model.state_dict())
    model.scale = nn.Parameter(torch.tensor(3.0))
    assert start(model, source, 2).endswith("4 of 5 tensors loaded; drawn anew, missing there: scale")
    assert model.scale == 3


def test_init_of_a_grey_network_from_colour_is_the_same_function(tmp_path):
    torch.manual_seed(0)
    colour = create_model("torchvision:squeezenet1_1", 5, image_size=32).eval()
    grey = create_model("torchvision:squeezenet1_1", 5, image_size=32, in_channels=1).eval()
    assert "52 of 52 tensors loaded" in start(grey, saved(tmp_path, colour.state_dict(), "x.pt"), 5)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_init_from_weights_that_do_not_fit(tmp_path):
    other = create_model("vit_t", 5, 4)
    with pytest.raises(InputError, match=r"weights.pth: 0 of the 122 tensors of this network are in it.*same network"):
        start(create_model("resnet18", 5, 4), saved(tmp_path, other.state_dict()), 5)
    wide = create_model("resnet18", 5, 8)
    with pytest.raises(InputError, match=r"of the 122 tensors of this network are in it, [\d,]+ of [\d,]+ weights"):
        start(create_model("resnet18", 5, 4), saved(tmp_path, wide.state_dict()), 5)


def test_init_from_in_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    source = saved(tmp_path, create_model("resnet18", 3, 2, 8, 1).state_dict())
    words = ["--width", "2", "--epochs", "1", "--seed", "1", "2", "--lr", "0", "--threads", "1", "--save_path", "run"]
    call([*words, "--init_from", "weights.pth"])
    lines = capsys.readouterr().err
    assert lines.count("--init_from") == 1
    assert "120 of 122 tensors loaded; drawn anew, of another size there: linear.weight [3, 16] for [10, 16]" in lines
    one, two = weights_of(tmp_path / "run")
    assert torch.equal(one["layer4.0.conv1.weight"], two["layer4.0.conv1.weight"])
    assert not torch.equal(one["linear.weight"], two["linear.weight"])
    assert json.loads((tmp_path / "run" / "args.json").read_text())["init_from"] == source
    assert "a run of other settings (--init_from" in refused(words, capsys)
    (tmp_path / "weights.pth").unlink()
    call(["--resume", "run"])  # every member has begun: the file has served
    shutil.rmtree(tmp_path / "run" / "seed_2")
    assert "weights.pth: cannot be read" in refused(["--resume", "run"], capsys)
    saved(tmp_path, create_model("resnet18", 3, 2, 8, 1).state_dict())
    assert "weights.pth: has changed since the run began with it" in refused(["--resume", "run"], capsys)
    assert "--init_from" in refused([*words[:-1], "other", "--init_from", "nothing.pth"], capsys)
    state = create_model("resnet18", 10, 2, 8, 1).state_dict()
    torch.save({"state_dict": state, "ema": dict(state)}, "two.pth")
    call([*words[:-1], "third", "--init_from", "two.pth"])
    assert "122 of 122 tensors loaded; also there, and not read: 'ema'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--warmup_epochs", "30"], "--warmup_epochs: expected less than --epochs 30, got 30"),
        (["--clip_norm", "0"], "--clip_norm: expected a number > 0, got '0'"),
        (["--label_smoothing", "2"], "--label_smoothing: expected a number from 0 to 1, got '2'"),
        (["--optimizer", "adam"], "--optimizer: expected one of sgd, adamw, got 'adam'"),
        (["--model", "torchvision:resnet18", "--width", "8"], "--width: expected 64 with torchvision:resnet18"),
    ],
)
def test_refused_settings(words, part, capsys):
    assert part in refused(words, capsys)
