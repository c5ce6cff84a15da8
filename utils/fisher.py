"""Per-sample squared gradient norms: the sharpness score that SharpBalance ranks training samples by.

The trace of the empirical Fisher information of one sample (x, y) is the squared norm of its loss gradient over all
trainable parameters, ||grad_theta CE(f(x), y)||^2. One forward and one backward pass give it for a whole batch: a hook
on every layer turns the layer's input and the gradient of its output into the layer's squared norms and lets both go,
so that neither a weight gradient of the batch nor anything of size batch x parameters is ever formed.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from models.resnet import Pointwise
from models.resnet_tiny import Scale
from models.vit import Tokens
from utils import out_of_memory
from utils.hessian import full_float32, matching_parameters, refuse_train_mode, to_float64

CHUNK_NUMBERS = 2**21  # in a layer's working set (8 MiB in float32): the samples of a batch are taken in groups
NARROW = 8  # convolutions with fewer input channels have all their kernel offsets in one product
NTK_NUMBERS = 2**27  # in one of the two blocks of gradients of the NTK's Gram matrix (512 MiB in float32)
VMAP_CHUNK = 16  # samples at a time for layers without a formula of their own
VMAP_NUMBERS = 2**25  # in their gradients (128 MiB in float32)
PROBES, TOLERANCE = 3, 1e-4  # images by which a network that is not of this repository is tried
MOVE_COST = 10  # moving a number through memory takes about as long as so many multiply-adds of a matrix product

WEIGHTS = {"weight", "bias"}

WARNED_OF: set[str] = set()
Terms = Iterator[Tensor]
Units = dict[str, tuple[str, ...]]  # the names of a module's parameters within it, by the name of the module
# Of networks that were tried: their trainable parameters then, and their units or why they have none.
UNITS: MutableMapping[nn.Module, tuple[set[int], Units | str]] = weakref.WeakKeyDictionary()


class _NeedsWholeModelError(Exception):
    """The norms of the model's layers do not add up, as where it shares a parameter."""


@full_float32()
def per_sample_fisher(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Squared norm of each sample's loss gradient: s_i = ||grad_theta CE(f(x_i), y_i)||_2^2.

    It is the trace of the *empirical* Fisher of one sample (true label, not a drawn one), of the unreduced
    cross-entropy, over all parameters with `requires_grad`. The value of a sample does not depend on its batch.

    Args:
        model: a network in eval mode throughout: in train mode BatchNorm mixes the samples of a batch, and a
            gradient of one sample does not exist.
        images: [B, ...], not augmented.
        labels: int64 [B].

    Returns:
        [B], in the dtype and on the device of the images.

    Layers: Conv2d (any stride, padding, dilation, groups), Linear (also on sequences), BatchNorm1d/2d, LayerNorm,
    GroupNorm and the models' own Scale and Tokens have formulas. Any other layer with parameters is differentiated
    sample by sample with chunked vmap. Where the model shares a parameter, calls a layer twice, or otherwise is not the
    sum of its layers, each sample has a backward pass of its own. A warning says so once. For a network that is not of
    this repository, that is found out at its first call, where the sum over its layers is compared with backward passes
    of `PROBES` samples. Weights, `requires_grad` and `.grad` are as before afterwards.

    The labels are as they stand, without label smoothing, whatever the network is trained with.

    Source: the authors' score (arXiv 2407.12996); for the layer norms Goodfellow, arXiv 1510.01799, and Rochette et
    al., arXiv 1912.06015.

    Raises:
        ValueError: if any module of the model is in train mode, or if it has no trainable parameter.
    """
    refuse_train_mode(model, "the Fisher score of a sample")
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("per_sample_fisher: the model has no parameter with requires_grad")
    if not len(images):
        return images.new_zeros(0)
    try:
        return _by_layers(model, images, labels, trainable, _units(model, images, labels, trainable))
    except _NeedsWholeModelError as reason:
        if reason.args:
            _warn_once(str(reason), "the samples are differentiated one by one, exact, at the cost of batches of one")
    return _by_samples(model, images, labels)


@full_float32()
def ntk_gram(model: nn.Module, images: Tensor, params: str | None = r"weight$") -> Tensor:
    """Inner products of the gradients of the summed logits: K_ij = <grad sum_c f_c(x_i), grad sum_c f_c(x_j)>.

    The Gram matrix of the empirical neural tangent kernel of the summed logits, by default in the authors' parameters.
    Gradients are formed for a few images at a time, so that two blocks of them take 1 GiB, and anew for each pair of
    blocks.

    Args:
        model: in eval mode throughout.
        images: [N, ...].
        params: a regular expression that is searched in the parameters' names; None for all trainable ones.

    Returns:
        float64 [N, N] on the CPU.

    Raises:
        ValueError: in train mode, or if no parameter matches.
    """
    refuse_train_mode(model, "the NTK")
    parameters = matching_parameters(model, params)
    size = sum(p.numel() for p in parameters)
    step = max(1, NTK_NUMBERS // size)
    blocks = [slice(start, start + step) for start in range(0, len(images), step)]

    def gradients(block: Tensor) -> Tensor:
        rows = images.new_empty(len(block), size)
        for row, image in zip(rows, block, strict=True):
            with torch.enable_grad():
                found = torch.autograd.grad(model(image[None]).sum(), parameters, materialize_grads=True)
            torch.cat([g.flatten() for g in found], out=row)
        return rows

    gram = torch.zeros(len(images), len(images), dtype=torch.float64)
    for i, rows in enumerate(blocks):
        mine = gradients(images[rows])
        for columns in blocks[: i + 1]:
            other = mine if columns == rows else gradients(images[columns])
            product = to_float64(mine @ other.T)
            gram[rows, columns], gram[columns, rows] = product, product.T
    return gram


def _units(model: nn.Module, images: Tensor, labels: Tensor, trainable: set[int]) -> Units:
    """The parts of the model whose squared norms add up to those of the whole, with the parameters of each.

    For the networks of this repository every layer with parameters is one. Of another network it is found out, once,
    by following one image, and `_by_layers` is compared with the samples one by one for a few images. A layer that is
    used without being called, more than once, or in another way than input to output leaves its parameters to the
    module around it.

    Raises:
        _NeedsWholeModelError: if the model cannot be divided so.
    """
    owners = {
        name: tuple(n for n, p in module.named_parameters(recurse=False) if id(p) in trainable)
        for name, module in model.named_modules()
    }
    owners = {name: names for name, names in owners.items() if names}
    if sum(map(len, owners.values())) > len(trainable):
        raise _NeedsWholeModelError("a parameter belongs to two layers")
    # Of this repository, and as it was made: without a layer of somebody else, a layer that was given a forward of its
    # own, or weights under other names.
    kinds = {name: type(module) for name, module in model.named_modules()}
    ours = all(kind.__module__.startswith(("models.", "torch.nn.modules.")) for kind in kinds.values())
    ours = ours and not any("forward" in vars(module) for module in model.modules())
    if ours and all(kinds[n] in FORMULAS and (kinds[n] is Tokens or {*own} <= WEIGHTS) for n, own in owners.items()):
        return owners
    if model not in UNITS or UNITS[model][0] != trainable:
        if len(images) == 1:
            raise _NeedsWholeModelError  # cannot show whether samples keep apart
        UNITS[model] = set(trainable), _try_units(model, owners, images[:PROBES], labels[:PROBES], trainable)
    found = UNITS[model][1]
    if isinstance(found, str):
        raise _NeedsWholeModelError(found)
    return found


def _try_units(model: nn.Module, owners: Units, images: Tensor, labels: Tensor, trainable: set[int]) -> Units | str:
    """The units of a network of others, compared with backward passes of a few samples, or why there are none."""
    units = _follow(model, owners, images[:2], labels[:2])
    if isinstance(units, str):
        return units
    exact = _by_samples(model, images, labels)
    try:
        error = (_by_layers(model, images, labels, trainable, units) - exact).abs()
    except _NeedsWholeModelError as reason:
        return str(reason)
    if (error <= TOLERANCE * exact).all():
        return units
    return f"the layers of {type(model).__name__} do not add up to it"


def _follow(model: nn.Module, owners: Units, images: Tensor, labels: Tensor) -> Units | str:
    """The units of a network, found by passing one image and then two through it, or why there are none."""
    calls: dict[nn.Module, list[int]] = {module: [] for module in model.modules()}  # rows of input and output

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        tensors = [args[0] if args else None, _single(output)]
        calls[module] += [len(t) if isinstance(t, Tensor) and t.dim() else 0 for t in tensors]

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in calls]
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images[:1]), labels[:1])
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    # Called once with one image, and with two once more, on twice as many rows.
    whole = {m for m, rows in calls.items() if len(rows) == 4 and all(rows) and rows[2:] == [2 * n for n in rows[:2]]}
    named = {f"{name}.{n}" if name else n: (name, n) for name, names in owners.items() for n in names}
    gradients = torch.autograd.grad(loss, [model.get_parameter(full) for full in named], allow_unused=True)
    units: dict[str, list[str]] = {}
    for (full, (owner, _)), gradient in zip(named.items(), gradients, strict=True):
        if gradient is None:  # a head for training only, for instance
            continue
        place = owner
        while place and model.get_submodule(place) not in whole:
            place = place.rpartition(".")[0]
        if not place and owner:
            module = model.get_submodule(owner)
            how = "is called twice in one forward pass" if len(calls[module]) > 4 else "is not called with the samples"
            return f"{type(module).__name__} {how}"
        units.setdefault(place, []).append(full.removeprefix(f"{place}.") if place else full)
    return {place: tuple(names) for place, names in units.items()}


def _single(output: Any) -> Tensor | None:
    """The output of a layer, or the only tensor in it, as of an attention that also returns no weights."""
    found = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else []
    tensors = [value for value in found if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() else None


def _by_layers(model: nn.Module, images: Tensor, labels: Tensor, trainable: set[int], units: Units) -> Tensor:
    scores = images.new_zeros(len(images))
    called: set[nn.Module] = set()
    names = {model.get_submodule(place): own for place, own in units.items()}
    listening = True

    def take_input(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not listening:
            return None
        if module in called:
            raise _NeedsWholeModelError(f"{type(module).__name__} is called twice in one forward pass")
        called.add(module)
        out = _single(output)
        if out is None or len(out) % len(images) or len(args[0]) % len(images):
            raise _NeedsWholeModelError(f"{type(module).__name__} does not take the samples of a batch in their order")
        first = not out.requires_grad
        if first:
            # Nothing before this layer asks for a gradient: backward ends here. The copy may be changed in place.
            out = out.detach().requires_grad_().clone()
        leaves, form = tree_flatten((args, kwargs))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]

        def add_norms(output_grad: Tensor) -> None:
            nonlocal listening
            if [leaf._version for leaf in leaves if isinstance(leaf, Tensor)] != versions:
                reason = f"the input of {type(module).__name__} was changed in place after its use"
                raise _NeedsWholeModelError(reason)
            listening = False
            with torch.no_grad():
                scores.add_(_unit_norms(module, names[module], leaves, form, output_grad, len(images)))
            listening = True

        out.register_hook(add_norms)
        if not first:
            return None
        return out if isinstance(output, Tensor) else tuple(out if isinstance(v, Tensor) else v for v in output)

    parameters = [parameter for parameter in model.parameters() if id(parameter) in trainable]
    handles = [module.register_forward_hook(take_input, with_kwargs=True) for module in names]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            loss = F.cross_entropy(model(images.detach()), labels, reduction="sum")
            if len(called) < len(names):
                raise _NeedsWholeModelError("a layer is used without being called")
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
    return scores


def _by_samples(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One backward pass a sample: whatever the network does, and never more than one gradient in memory."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scores = images.new_zeros(len(images))
    for i in range(len(images)):
        with torch.enable_grad():
            loss = F.cross_entropy(model(images[i : i + 1].detach()), labels[i : i + 1])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        # Not by norms, which lose the third digit of a hundred million numbers in float32.
        scores[i] = torch.stack([g.square().sum() for g in found if g is not None]).sum()
    return scores


def _unit_norms(
    module: nn.Module, names: tuple[str, ...], leaves: list, form: Any, output_grad: Tensor, batch: int
) -> Tensor:
    """Squared norms [B] of the per-sample gradients of the parameters of one unit.

    Args:
        module: the unit, and the `names` of its parameters in it.
        leaves, form: the arguments that it was called with, as `tree_flatten` gives them. Where it sees k rows for each
            sample, as windows of an image, their first dimension is B k.
        output_grad: the gradient of its output.
        batch: B.
    """
    # A subclass may compute something else, so that the type has to be exactly the known one; so may a layer that was
    # given a forward of its own.
    formula = None if "forward" in vars(module) else FORMULAS.get(type(module))
    folded = len(leaves[0]) > batch or len(output_grad) > batch
    if formula and len(leaves) == 1 and getattr(module, "padding_mode", "zeros") == "zeros":
        if not folded:
            return sum(formula(module, leaves[0], output_grad, set(names)))
        if type(module) in (nn.Linear, nn.LayerNorm):  # to which further dimensions are positions
            x, g = (tensor.reshape(batch, -1, *tensor.shape[1:]) for tensor in (leaves[0], output_grad))
            return sum(formula(module, x, g, set(names)))
    if not formula:
        _warn_once(f"{type(module).__name__} has no per-sample formula here")
    own = {name: module.get_parameter(name).detach() for name in names}
    rows = len(leaves[0])
    mine = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows]

    def squared_norm(arguments: tuple[Tensor, ...], cotangent: Tensor) -> Tensor:
        replaced = dict(zip(mine, arguments, strict=True))
        args, kwargs = tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], form)
        _, backward = vjp(lambda own: _single(functional_call(module, own, args, kwargs)), own)
        return sum(g.square().sum() for g in backward(cotangent)[0].values())

    samples = tuple(leaves[i].reshape(batch, -1, *leaves[i].shape[1:]) for i in mine)
    chunk = max(1, min(VMAP_CHUNK, VMAP_NUMBERS // sum(p.numel() for p in own.values())))
    try:
        cotangents = output_grad.reshape(batch, -1, *output_grad.shape[1:])
        return vmap(squared_norm, chunk_size=chunk)(samples, cotangents)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise _NeedsWholeModelError(f"{type(module).__name__} cannot be differentiated by vmap") from error


def _chunk_numbers(tensor: Tensor) -> int:
    """A CPU's cache holds few numbers; elsewhere each operation costs a launch, so that there are fewer of them."""
    return CHUNK_NUMBERS if tensor.device.type == "cpu" else 8 * CHUNK_NUMBERS


def _direct(left: Tensor, right: Tensor) -> Tensor:
    """||sum_t left_t right_t'||_F^2 for left [B, T, P] and right [B, T, D], by the P x D matrices themselves."""
    step = max(1, _chunk_numbers(left) // (left.shape[2] * right.shape[2]))
    chunks = zip(left.split(step), right.split(step), strict=True)
    return torch.cat([torch.bmm(a.mT, b).square().sum((1, 2)) for a, b in chunks])


def _gram(x: Tensor) -> Tensor:
    """Inner products of the rows, [B, T, D] -> [B, T, T]."""
    return torch.bmm(x, x.mT)


# A formula yields the squared norms [B] of the gradients of those of the layer's parameters that are in `wants`, given
# the layer's input x and the gradient g of its output. A generator, because the terms are added in this order.


def _linear(module: nn.Linear, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Weight gradient sum_t g_t x_t', bias gradient sum_t g_t; t runs over all dimensions between first and last."""
    x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    positions, rows, columns = g.shape[1], g.shape[2], x.shape[2]
    if "weight" in wants:
        by_gram = positions * (rows + columns + 3 * MOVE_COST) < rows * columns
        yield (_gram(x) * _gram(g)).sum((1, 2)) if by_gram else _direct(g, x)
    if "bias" in wants:
        yield g.sum(1).square().sum(1)


def _conv2d(module: nn.Conv2d, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Weight gradient at kernel offset o: sum_t g_t x_{s t + o}', t over output positions, s the stride."""
    x, g = x.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1)
    if "bias" in wants:
        yield g.sum((1, 2)).square().sum(1)
    if "weight" in wants:
        # Groups are convolutions of their own: [B, H, W, G C] -> [B G, H, W, C].
        x, g = (t.unflatten(3, (module.groups, -1)).movedim(3, 1).flatten(0, 1) for t in (x, g))
        step = max(1, _chunk_numbers(x) // (x[0].numel() + g[0].numel()))
        norms = [_conv2d_weight(module, *chunks) for chunks in zip(x.split(step), g.split(step), strict=True)]
        yield torch.cat(norms).view(-1, module.groups).sum(1)


def _zero_padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros on the left, on the right, above and below."""
    sides = []
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if module.padding == "valid" else [module.padding[axis]] * 2
    return tuple(sides)


def _conv2d_weight(module: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """One group: x [B, H, W, C] and g [B, H', W', P], channels last."""
    (kernel_h, kernel_w), (stride_h, stride_w) = module.kernel_size, module.stride
    dilation_h, dilation_w = module.dilation
    left, right, top, bottom = _zero_padding(module)
    (batch, out_h, out_w, rows), columns = g.shape, x.shape[3]
    in_h, in_w = x.shape[1] + top + bottom, x.shape[2] + left + right
    pixels, positions = in_h * in_w, out_h * out_w
    offsets = [(i * dilation_h, j * dilation_w) for i in range(kernel_h) for j in range(kernel_w)]

    def seen(i: int, j: int) -> tuple[slice, slice]:
        """The rows and columns of the input that kernel offset (i, j) sees."""
        rows = slice(i, i + stride_h * (out_h - 1) + 1, stride_h)
        return rows, slice(j, j + stride_w * (out_w - 1) + 1, stride_w)

    # The multiply-adds of the two forms, for one sample. The Gram matrix of the patches is a sum over the offsets,
    # either of pieces of the Gram matrix of all pixels or of products made for each offset.
    from_pixels = pixels**2 <= len(offsets) * positions**2
    gram = (pixels**2 if from_pixels else len(offsets) * positions**2) * columns
    gram += positions**2 * (rows + 3 * MOVE_COST * len(offsets))
    direct = len(offsets) * positions * rows * columns
    flat = columns >= NARROW and stride_h == stride_w == 1 and direct <= gram
    x = F.pad(x, (0, 0, left, right, top, bottom + flat))
    if gram < direct:
        if from_pixels:
            pixel_gram = _gram(x.reshape(batch, pixels, columns)).view(batch, in_h, in_w, in_h, in_w)
            pieces = (pixel_gram[(slice(None), *seen(i, j), *seen(i, j))] for i, j in offsets)
        else:
            patches = (x[(slice(None), *seen(i, j))].reshape(batch, positions, columns) for i, j in offsets)
            pieces = (_gram(patch).view(batch, out_h, out_w, out_h, out_w) for patch in patches)
        patch_gram = next(pieces).clone()
        for piece in pieces:
            patch_gram += piece
        g_gram = _gram(g.reshape(batch, positions, rows))
        return (patch_gram.view(batch, positions, positions) * g_gram).sum((1, 2))

    if flat:
        # With g padded to the row length of the input, what an offset sees is a slice of the flat input.
        x, g = x.reshape(batch, -1, columns), F.pad(g, (0, 0, 0, in_w - out_w))
        patches = [x[:, i * in_w + j : (i + out_h) * in_w + j] for i, j in offsets]
    else:
        patches = [x[(slice(None), *seen(i, j))].reshape(batch, positions, columns) for i, j in offsets]
        if columns < NARROW:
            patches = [torch.cat(patches, dim=2)]
    g = g.reshape(batch, -1, rows)
    return sum(_direct(g, patch) for patch in patches)


def _batch_norm(module: nn.BatchNorm2d, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Scale gradient sum_t g_t (x_t - mean) / std, shift gradient sum_t g_t, for each channel; running statistics."""
    x, g = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), g.flatten(2) if g.dim() > 2 else g.unsqueeze(2)
    g_sum = g.sum(2)
    if "bias" in wants:
        yield g_sum.square().sum(1)
    if "weight" in wants:
        products = torch.linalg.vecdot(g, x, dim=2) - module.running_mean * g_sum
        yield (products.square() / (module.running_var + module.eps)).sum(1)


def _layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Scale gradient sum_t g_t * normalised x_t, shift gradient sum_t g_t, over the dimensions not normalised."""
    first = x.dim() - len(module.normalized_shape)
    if "bias" in wants:
        yield _sum_to(g, first).square().sum(1)
    if "weight" in wants:
        normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        yield _sum_to(g * normalised, first).square().sum(1)


def _group_norm(module: nn.GroupNorm, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Scale gradient sum_t g_t * normalised x_t, shift gradient sum_t g_t, for each channel, over its positions."""
    if "bias" in wants:
        yield g.flatten(1).view(*g.shape[:2], -1).sum(2).square().sum(1)
    if "weight" in wants:
        products = g * F.group_norm(x, module.num_groups, eps=module.eps)
        yield products.flatten(1).view(*g.shape[:2], -1).sum(2).square().sum(1)


def _sum_to(g: Tensor, first: int) -> Tensor:
    """[B, ..., rest] -> [B, size of rest]: sum over dimensions 1 to first - 1."""
    return g.flatten(first).flatten(1, -2).sum(1) if g.dim() > first > 1 else g.flatten(1)


def _scale(module: Scale, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """Gradient of a channel's factor: sum_t g_t x_t."""
    yield torch.linalg.vecdot(g.flatten(2), x.flatten(2), dim=2).square().sum(1)


def _tokens(module: Tokens, x: Tensor, g: Tensor, wants: set[str]) -> Terms:
    """The positions' gradient is g itself, the class token's its first row."""
    if "pos_embed" in wants:
        yield g.square().sum((1, 2))
    if "cls_token" in wants:
        yield g[:, 0].square().sum(1)


FORMULAS: dict[type, Callable[[Any, Tensor, Tensor, set[str]], Terms]] = {
    nn.Conv2d: _conv2d,
    Pointwise: _conv2d,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    Scale: _scale,
    Tokens: _tokens,
}


def _warn_once(reason: str, instead: str = "chunked vmap takes over, exact but slower") -> None:
    if reason not in WARNED_OF:
        WARNED_OF.add(reason)
        warnings.warn(f"per_sample_fisher: {reason}; {instead}", stacklevel=4)
