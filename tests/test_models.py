import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import MODELS, create_model
from models.resnet import Pointwise

NAMES = {
    "resnet": r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|shortcut\.[01])|linear)\.\w+",
    "resnet_tiny": r"(conv1\.[01]|conv[2-5]_x\.\d+\.(residual_function\.[013467]|shortcut(\.[01])?)|fc)\.\w+",
    "wrn": r"(conv1|block[123]\.layer\.\d+\.(bn[12]|conv[12]|convShortcut)|bn1|fc)\.\w+",
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (("resnet18", 10), 11_173_962),
        (("resnet34", 10), 21_282_122),
        (("resnet50", 10), 23_520_842),
        (("resnet101", 10), 42_512_970),
        (("resnet152", 10), 58_156_618),
        (("resnet18", 200, 64, 64), 11_272_456),
        (("wrn-40-2", 10), 2_243_546),
        (("wrn-28-10", 10), 36_479_194),
        (("vit_t", 100), 5_380_132),
    ],
)
def test_published_sizes(arguments, parameters):
    with torch.device("meta"):
        assert count(create_model(*arguments)) == parameters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (32, 3), (64, 3)])
def test_builds_trains_a_step_saves_and_loads(name, size, channels, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, 5, 4, size, channels)
    images, labels = torch.randn(2, channels, size, size), torch.tensor([0, 3])
    before = [p.detach().clone() for p in model.parameters()]
    logits = model(images)
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # BatchNorm of two images has enormous gradients
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = create_model(name, 5, 4, size, channels)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.eval()(images), model.eval()(images))


def test_pointwise_equals_a_strided_convolution():
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    layer = Pointwise(4, 6, 2).double()
    ours, plain = layer(x), F.conv2d(x, layer.weight, stride=2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(plain)
    inputs = (x, layer.weight)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_strided_1x1_convolution():
    """It corrupts memory on a CPU (see `Pointwise`)."""
    for name in MODELS:
        for size in (32, 64):
            for layer in create_model(name, 10, 4, size).modules():
                assert type(layer) is not nn.Conv2d or layer.kernel_size != (1, 1) or layer.stride == (1, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [32, 64])
def test_names_are_those_of_the_authors(name, size):
    if name == "vit_t":
        pytest.skip("the authors' release holds no ViT")
    form = "wrn" if name.startswith("wrn") else "resnet" if size == 32 else "resnet_tiny"
    with torch.device("meta"):
        state = create_model(name, 10, 4, size).state_dict()
    assert all(re.fullmatch(NAMES[form], key) for key in state)
    if form == "resnet_tiny":
        scales = [key for key in state if key.endswith("shortcut.weight")]
        assert scales
        assert all(state[key].shape[1:] == (1, 1) for key in scales)


def test_the_tiny_form_starts_as_the_authors():
    torch.manual_seed(0)
    model = create_model("resnet18", 200, 64, 64)
    assert torch.equal(model.conv2_x[0].shortcut.weight, torch.ones(64, 1, 1))
    weight = model.conv4_x[1].residual_function[0].weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_width_scales_every_layer():
    for name in MODELS:
        wide, narrow = create_model(name, 10, 32), create_model(name, 10, 16)
        last = list(wide.parameters())[-2], list(narrow.parameters())[-2]
        assert last[0].shape[1] == 2 * last[1].shape[1]
    assert nn.Conv2d is type(wide.patch_embed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", 10), "model: expected one of resnet18.* got 'resnet19'"),
        (("resnet18", 1), "num_classes: .* got 1"),
        (("resnet18", 10, 0), "width: .* got 0"),
        (("resnet18", 10, 64, 7), "image_size: .* got 7"),
        (("wrn-40-2", 10, 6), "width: expected a multiple of 4.* got 6"),
        (("vit_t", 10, 64, 28), "image_size: expected a multiple of 8.* got 28"),
        (("resnet18", 10, 64, 32, 0), "in_channels: .* got 0"),
    ],
)
def test_impossible_networks(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments)
