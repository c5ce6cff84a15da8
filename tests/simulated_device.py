"""An accelerator in Python: the device `sim`, whose tensors hold CPU tensors and compute there.

Importing this registers it with torch, for the whole process and before its first backward pass. What would fail or be
slow on a GPU shows: a CPU tensor of one or more dimensions among its own is refused, and what the host waits for is
listed in `reads`.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

# Their results, or the sizes of these, depend on values: the host has to wait for them.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
MIXES = {"copy_", "_to_copy"}  # from one device to the other
reads: list[str] = []


class Backend(_DummyBackendModule):
    """What `torch.sim` offers: autocast to bfloat16."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("sim", Backend())
DEVICE = torch.device("sim", 0)
CPU = torch.device("cpu")


class SimulatedTensor(Tensor):
    """A tensor on `sim`; `inner` is the CPU tensor that it holds."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, **form, device=DEVICE)
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, *args, **(kwargs or {}))


_foreach_supported_types.append(SimulatedTensor)  # so that optimizers go the way that they go on a GPU


def compute(function, *args, **kwargs):
    """Run an operation on the CPU tensors that its arguments hold."""
    name = function._schema.name.removeprefix("aten::")
    leaves, form = tree_flatten((args, kwargs))
    strangers = [leaf for leaf in leaves if type(leaf) is Tensor and leaf.dim()]
    if strangers and name not in MIXES:
        raise RuntimeError(f"{name}: expected all tensors on {DEVICE}, got one of {list(strangers[0].shape)} on cpu")
    held = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)}
    to_cpu = CPU in leaves or (name == "copy_" and type(args[0]) is Tensor)
    masks = name.startswith("index") and any(leaf.dtype == torch.bool for leaf in held.values() if leaf is not args[0])
    if name in WAITS or to_cpu or masks:
        reads.append(name)

    def unwrap(value):
        if isinstance(value, SimulatedTensor):
            return value.inner
        return CPU if isinstance(value, torch.device) else value

    def wrap(value):
        if not isinstance(value, Tensor) or to_cpu:
            return value
        return held[id(value)] if id(value) in held else SimulatedTensor(value)  # in place: the argument itself

    with torch.inference_mode(False):  # whose tensors could not be wrapped as views
        args, kwargs = tree_unflatten([unwrap(leaf) for leaf in leaves], form)
        return tree_map(wrap, function(*args, **kwargs))


def in_bfloat16(operation):
    """An operation as autocast runs it."""

    def call(*args, **kwargs):
        def cast(value):
            return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


_rest, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_rest.fallback(compute, "PrivateUse1")  # operations that make a tensor on the device from none
_rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_aten.impl("_to_copy", partial(compute, torch.ops.aten._to_copy.default), "PrivateUse1")  # of torch.tensor
for _name in ("conv2d", "linear", "matmul", "scaled_dot_product_attention"):
    _aten.impl(_name, in_bfloat16(getattr(torch.ops.aten, _name)), "AutocastPrivateUse1")
