"""Weights that a member starts from instead of those that it was drawn with."""

from pathlib import Path

from torch import Tensor, nn

from utils import InputError, some


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights that fit; with the versions of its layers, which some networks require beside them."""
    whole = model.state_dict()
    whole.update(state)
    model.load_state_dict(whole)


def start_from(model: nn.Module, state: dict[str, Tensor], num_classes: int, path: Path) -> str:
    """Fill a network, as far as they fit, with weights that were saved of this one or of one with another head.

    Tensors are matched by name. Those of another size (a head for other classes, positions of other images) stay as
    they were drawn, as does everything that the file lacks. The first convolution of a network for grey images takes
    the sum over the channels of one for colour, which is the same function of a grey image.

    Args:
        model: the network, freshly drawn, on the CPU.
        state: named tensors.
        num_classes: its number of logits.
        path: the file that they are of.

    Returns:
        A line that says what was loaded and what was not.

    Raises:
        InputError: naming the file, if less than half of the network's weights outside the head are in it.
    """
    own, state = model.state_dict(), dict(state)
    fitting, other_size = {}, {}
    for name in [name for name in own if name in state]:
        found, shape = state.pop(name), own[name].shape
        if found.dim() == 4 and found.shape != shape == (*found.shape[:1], 1, *found.shape[2:]):
            found = found.sum(dim=1, keepdim=True)
        if found.shape == shape and found.is_floating_point() == own[name].is_floating_point():
            fitting[name] = found
        else:
            other_size[name] = f"{name} {list(found.shape)} for {list(shape)}"
    weights = dict(model.named_parameters())
    body = sum(p.numel() for name, p in weights.items() if name in fitting or p.shape[:1] != (num_classes,))
    loaded = sum(p.numel() for name, p in weights.items() if name in fitting)
    if 2 * loaded < body or not loaded:
        what = f"{len(fitting)} of the {len(own)} tensors of this network are in it, {loaded:,} of {body:,} weights"
        others = some(list(state)) or "none"
        raise InputError(f"--init_from {path}: {what}; others in it: {others}; give weights of the same network")
    load_state(model, fitting)
    missing = [name for name in own if name not in fitting and name not in other_size]
    text = f"{path}: {len(fitting)} of {len(own)} tensors loaded"
    others = list(other_size.values())
    for what, names in (("drawn anew, of another size there", others), ("drawn anew, missing there", missing)):
        text += f"; {what}: {some(names, 6)}" if names else ""
    return text + (f"; not in this network: {some(list(state), 6)}" if state else "")
