"""The Hessian of the mean loss over fixed images: products with vectors, trace, and largest eigenvalues.

All images count once and equally: L = (1/N) sum over all batches of the summed cross-entropy, in eval mode. Nothing of
the size parameters x parameters is formed, and a product holds the graph of one batch at a time.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils import InputError

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, matrix products and convolutions keep all 24 bits of float32.

    By default recent GPUs convolve in TF32, of 11 bits, in which small differences of losses and gradients are lost.
    """
    backends = torch.backends
    # Those of cudnn together: torch cannot read its older switch for both where they differ.
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    switches += [backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@contextmanager
def _supported() -> Iterator[None]:
    """Say in one line where torch lacks the second derivative of a network's layer, as of hard sigmoids."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"derivative for aten::(\w+) is not implemented", str(error))
        if not found:
            raise
        way_out = "measure this network without the Hessian's modes"
        raise InputError(f"the Hessian: torch has no second derivative of {found[1]}; {way_out}") from error


class HessianOperator:
    """H v for the Hessian H of the mean cross-entropy over `batches`, in the parameters whose names match.

    Args:
        model: in eval mode throughout.
        batches: (images, labels), an iterable that can be read again, with the same batches.
        params: a regular expression that is searched in the parameters' names; None for all trainable parameters.

    Attributes:
        size: number of parameters P.
        samples: number of images N.

    Raises:
        ValueError: if the model is in train mode, if no parameter matches, or if there are no images.
    """

    def __init__(self, model: nn.Module, batches: Batches, params: str | None = None):
        refuse_train_mode(model, "the Hessian")
        self.model, self.batches = model, batches
        self.parameters = matching_parameters(model, params)
        self.size = sum(p.numel() for p in self.parameters)
        self.samples = sum(len(labels) for _, labels in batches)
        if not self.samples:
            raise ValueError("batches: no images given")

    @full_float32()
    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H v for one vector [P], or for the columns of [P, K], which share each batch's graph."""
        parts = [self.as_parameters(column) for column in torch.atleast_2d(vectors.t())]
        sums = [[torch.zeros_like(p) for p in self.parameters] for _ in parts]
        for images, labels in self.batches:
            # Of the kernels of attention, only that of single operations has a second derivative.
            with _supported(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _quick_layers(self.model):
                loss = F.cross_entropy(self.model(images), labels, reduction="sum") / self.samples
                gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
                # A gradient that does not depend on the weights (of a linear model's bias, say) has no graph.
                graded = [g for g in gradients if g.requires_grad]
                for i, part in enumerate(parts):
                    directions = [v for g, v in zip(gradients, part, strict=True) if g.requires_grad]
                    more = i + 1 < len(parts)  # the last product releases the graph
                    products = torch.autograd.grad(graded, self.parameters, directions, more, materialize_grads=True)
                    torch._foreach_add_(sums[i], [product.detach() for product in products])
            del loss, gradients, graded, products
        return torch.stack([torch.cat([p.flatten() for p in one]) for one in sums], dim=1).view_as(vectors)

    def as_parameters(self, vector: Tensor) -> list[Tensor]:
        """A vector [P] cut into the shapes of the parameters."""
        first = self.parameters[0]
        # The type first: a device may lack that of the vector.
        pieces = vector.to(first.dtype).to(first.device).split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]


# PyTorch differentiates its backward passes by general formulas that pass over memory many times. In a ResNet the two
# layers below took most of a product's time; written out, their second derivatives are only the convolutions required.


class _Conv2d(torch.autograd.Function):
    """A convolution; `options` as aten::convolution_backward takes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.biased = options, bias is not None
        return torch.ops.aten.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return *_Conv2dBackward.apply(g, *ctx.saved_tensors, ctx.biased, ctx.options), None


class _Conv2dBackward(torch.autograd.Function):
    """Of g = dL/dy: dL/dx, dL/dweight and dL/dbias, the convolution being linear in each of x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, biased: bool, options: tuple) -> tuple:
        ctx.save_for_backward(g, x, weight)
        ctx.options = options
        return _conv2d_backward(g, x, weight, biased, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, u_weight: Tensor, u_bias: Tensor | None) -> tuple:
        """The gradient of <u, dL/dx> + <u_weight, dL/dweight> + <u_bias, dL/dbias>."""
        g, x, weight = ctx.saved_tensors
        to_g = torch.ops.aten.convolution(u, weight, u_bias, *ctx.options)
        to_g += torch.ops.aten.convolution(x, u_weight, None, *ctx.options)
        to_x, to_weight, _ = _conv2d_backward(g, u, u_weight, False, ctx.options)
        return to_g, to_x, to_weight, None, None


def _conv2d_backward(g: Tensor, x: Tensor, weight: Tensor, biased: bool, options: tuple) -> tuple:
    return torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *options, [True, True, biased])


class _BatchNorm(torch.autograd.Function):
    """y = weight r (x - mean) + bias with r = 1 / sqrt(var + eps): batch normalisation by fixed statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return *_BatchNormBackward.apply(g, *ctx.saved_tensors), None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """Of g = dL/dy: dL/dx = weight r g, dL/dweight = sum r (x - mean) g and dL/dbias = sum g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, weight, mean, r)
        return _scale_and_sums(g, x, weight * r, mean, r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, u_weight: Tensor, u_bias: Tensor) -> tuple:
        """The gradient of <u, dL/dx> + <u_weight, dL/dweight> + <u_bias, dL/dbias>."""
        g, x, weight, mean, r = ctx.saved_tensors
        factor = r * u_weight
        # torch.nn.functional's refuses eps = 0 in torch 2.10.
        fixed = weight * r, u_bias - mean * factor, torch.zeros_like(r), torch.ones_like(r), False, 0.0, 0.0, True
        to_g = torch.batch_norm(u, *fixed)
        to_g.addcmul_(x, factor.view(-1, *[1] * (x.dim() - 2)))
        to_x, to_weight, _ = _scale_and_sums(g, u, factor, torch.zeros_like(r), r)
        return to_g, to_x, to_weight, None, None


def _scale_and_sums(g: Tensor, x: Tensor, factor: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor g, sum r (x - mean) g and sum g, channel by channel, in one pass."""
    # The statistics of eval mode, as the CPU reads them and as a GPU does, and eps.
    fixed = mean, r.square().reciprocal(), mean, r, False, 0.0
    return torch.ops.aten.native_batch_norm_backward(g, x, factor / r, *fixed, [True, True, True])


def _quick(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The layer's forward pass in eval mode with a quick second derivative; None for layers without one here."""
    # A subclass may compute something else, so that the type has to be exactly the known one; so may a layer that was
    # given a forward of its own.
    if "forward" in vars(layer):
        return None
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        options = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        return lambda x: _Conv2d.apply(x, layer.weight, layer.bias, options)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if type(layer) in norms and layer.affine and layer.running_mean is not None:
        return lambda x: _BatchNorm.apply(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps)
    return None


@contextmanager
def _quick_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's layers take their quick second derivatives."""
    found = {layer: forward for layer in model.modules() if (forward := _quick(layer))}
    try:
        for layer, forward in found.items():
            layer.forward = forward
        yield
    finally:
        for layer in found:
            del layer.forward


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU, converted there: Apple's devices (MPS) have no float64."""
    return torch.from_numpy(tensor.detach().cpu().numpy().astype(np.float64))


def refuse_train_mode(model: nn.Module, what: str) -> None:
    """Raise ValueError if a module is in train mode, where batch statistics and dropout belong to the function.

    So they do, in every mode, of a BatchNorm without running statistics.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(f"{what} is measured in eval mode: call model.eval() first")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in model.modules()):
        raise ValueError(f"{what} is that of one sample, and a BatchNorm without running statistics mixes samples")


def matching_parameters(model: nn.Module, params: str | None) -> list[nn.Parameter]:
    """The trainable parameters in whose names a regular expression is found; all of them for None.

    Raises:
        ValueError: if there are none, or if it is no regular expression.
    """
    try:
        pattern = re.compile(params or "")
    except re.error as error:
        raise ValueError(f"params: '{params}' is not a regular expression ({error})") from error
    found = [p for name, p in model.named_parameters() if p.requires_grad and pattern.search(name)]
    if not found:
        raise ValueError(f"params: no trainable parameter matches '{params}'")
    return found


def hessian_trace(
    model: nn.Module,
    batches: Batches,
    probes: int = 30,
    method: str = "hutchinson",
    params: str | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Trace of the Hessian of the mean cross-entropy, with its standard error.

    hutchinson: the mean of v'Hv over `probes` vectors of independent signs; unbiased, and its standard error is that of
    the mean. hutch++: a third of the products finds a basis Q of the range of H, a third its exact share
    tr(Q'HQ), and a third estimates the rest with probes orthogonal to Q; for spectra with a few large eigenvalues it is
    much more exact at the same cost. Nothing is divided by the number of parameters, and nothing stops early.

    Args:
        model, batches, params: as for `HessianOperator`.
        probes: products with H, 2 or more (hutch++: 6 or more).
        method: hutchinson | hutch++.
        generator: of the probes; by default one of seed 0.

    Returns:
        trace, standard_error (of the trace), probes (products used), samples.

    Source: Hutchinson, Commun. Stat. 1990; Meyer et al., "Hutch++", SOSA 2021.
    """
    operator = HessianOperator(model, batches, params)
    minimum = {"hutchinson": 2, "hutch++": 6}
    if method not in minimum:
        raise ValueError(f"method: expected one of {', '.join(minimum)}, got '{method}'")
    if probes < minimum[method]:
        raise ValueError(f"probes: expected {minimum[method]} or more for {method}, got {probes}")
    generator = generator or torch.Generator().manual_seed(0)

    def signs(count: int) -> Tensor:
        return (2 * torch.randint(0, 2, (operator.size, count), generator=generator) - 1).to(torch.float32)

    def curvature(vector: Tensor) -> float:
        return to_float64(operator @ vector).dot(vector).item()

    exact, remaining, basis = 0.0, probes, None
    if method == "hutch++":
        third = min(probes // 3, operator.size)
        sketch = torch.stack([to_float64(operator @ column) for column in signs(third).T], dim=1)
        basis = torch.linalg.qr(sketch).Q
        exact, remaining = sum(map(curvature, basis.T)), probes - 2 * third
    values = []
    for _ in range(remaining):
        probe = to_float64(signs(1)[:, 0])
        if basis is not None:
            probe -= basis @ (basis.T @ probe)
        values.append(curvature(probe))
    trace, error = exact + float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"trace": trace, "standard_error": error, "probes": probes, "samples": operator.samples}


def top_eigenvalues(model: nn.Module, batches: Batches, k: int = 1, params: str | None = None) -> Tensor:
    """The k algebraically largest eigenvalues of the Hessian, largest first, float64 [k]. See `top_eigenpairs`."""
    return top_eigenpairs(model, batches, k, params)[0]


def top_eigenpairs(
    model: nn.Module, batches: Batches, k: int = 1, params: str | None = None, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """The k algebraically largest eigenvalues of the Hessian with vectors and residuals.

    By ARPACK's implicitly restarted Lanczos iteration with full reorthogonalisation, from a fixed start.

    Args:
        model, batches, params: as for `HessianOperator`.
        k: how many, less than the number of parameters.
        tolerance: relative accuracy of the eigenvalues at which the iteration stops.

    Returns:
        Values float64 [k], largest first; unit vectors float64 [P, k]; residuals ||H v - lambda v||_2, float64 [k]. All
        are nan where a product with H overflows. Where H is 0 (a loss that does not depend on the weights, or that is 0
        to the last bit) so are values and residuals, and any unit vectors are eigenvectors.
    """
    operator = HessianOperator(model, batches, params)
    if not 0 < k < operator.size:
        raise ValueError(f"k: expected 1 to {operator.size - 1}, got {k}")

    def product(vector: np.ndarray) -> np.ndarray:
        found = to_float64(operator @ torch.from_numpy(np.ascontiguousarray(vector.reshape(-1)))).numpy()
        if not np.isfinite(found).all():
            raise FloatingPointError
        return found

    linear = LinearOperator((operator.size, operator.size), matvec=product, dtype=np.float64)
    start = np.random.RandomState(0).standard_normal(operator.size)
    try:
        values, vectors = eigsh(linear, k=k, which="LA", tol=tolerance, v0=start)
    except FloatingPointError:
        return tuple(torch.full(shape, math.nan, dtype=torch.float64) for shape in ((k,), (operator.size, k), (k,)))
    except ArpackError:
        if product(start).any():
            raise
        # ARPACK refuses an H whose product with a random vector is 0.
        values = torch.zeros(k, dtype=torch.float64)
        return values, torch.eye(operator.size, k, dtype=torch.float64), values.clone()
    order = np.argsort(values)[::-1]
    values, vectors = values[order].copy(), vectors[:, order].copy()
    residuals = [np.linalg.norm(product(v) - value * v) for value, v in zip(values, vectors.T, strict=True)]
    return torch.from_numpy(values), torch.from_numpy(vectors), torch.tensor(residuals, dtype=torch.float64)
