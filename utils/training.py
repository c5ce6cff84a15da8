"""Training and evaluating one network: the SharpBalance step, an epoch of it, and the logits of an image set."""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import evaluating
from sam import SAM
from utils import RunError, out_of_memory
from utils.capture import CapturedPasses
from utils.data import ImageSet

PREDICTION_BATCH = 512
MAX_SKIPPED = 20  # steps in a row whose gradients are not finite, at the end of an epoch
Result = TypeVar("Result")


def sharpbalance_step(
    model: nn.Module,
    optimizer: SAM,
    images: Tensor,
    labels: Tensor,
    sam_mask: Tensor,
    bn_perturbed: str = "update",
    amp: str = "none",
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    record: list[Tensor] | None = None,
    captured: CapturedPasses | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step in which some samples of the batch are trained with SAM and the others without it.

    Of B samples, a are normal and b have SAM, a + b = B. With L_n and L_s the mean cross-entropy of each part:

        g   = grad L_s(w)                                  the ascent gradient: the normal part does not enter it
        eps = rho g / (||g||_2 + 1e-12)                    over all parameters (`optimizer` may be adaptive)
        w  <- base optimizer's step with (a/B) grad L_n(w) + (b/B) grad L_s(w + eps)

    b = 0 is the base optimizer's step, a = 0 is SAM's. A step with b > 0 is skipped where g or the sum is not finite.
    Both SAM passes see the same augmented images, and random layers (dropout) draw the same in both, so that the loss
    that eps raises is the one whose gradient is taken there. Weight decay is in the step only. Each forward pass is in
    train mode, normalises with the statistics of its own part, and updates the running statistics of BatchNorm, as in
    the authors' release; with bn_perturbed="freeze" the pass at w + eps normalises in the same way but updates nothing.
    Where a part is one sample and a BatchNorm would see one value a channel, that sample joins the other part.

    Args:
        model: the network, in train mode.
        optimizer: a `sam.SAM`.
        images: float [B, C, H, W].
        labels: int64 [B].
        sam_mask: bool [B], True = trained with SAM. Pass it on the CPU, even on a GPU: the step then waits for nothing.
        bn_perturbed: update | freeze.
        amp: none | bf16, the autocast of the forward passes.
        label_smoothing: of L_n and L_s, in all passes; share of the uniform distribution in the target.
        clip_norm: the l2 norm to which the sum is scaled down before the base optimizer's step; g is never clipped.
        record: gets [||g||, ||eps||, cos(g, grad L_s(w + eps))], on the device; b = 0: [||grad L_n||, nan, nan].
        captured: makes the passes, on a GPU; model, bn_perturbed, amp and label_smoothing must always be the same then.

    Returns:
        Detached tensors: the mean loss of the batch and the number of correct predictions, both at w.

    Source: arXiv 2407.12996, section 4, and engine.py of the authors' release. If a pass raises, the weights are at w.
    """
    normal, sam = _parts_of(model, images, sam_mask)
    share_normal, share_sam = len(normal) / len(images), len(sam) / len(images)
    loss, correct = images.new_zeros(()), images.new_zeros(())
    optimizer.zero_grad()
    add_gradient = functools.partial(_add_gradient, model, captured, amp, label_smoothing)
    if share_normal:  # weights at w; the gradients become (a/B) grad L_n(w)
        normal_loss, normal_correct = add_gradient((_part(images, normal), _part(labels, normal)), share_normal)
        loss += share_normal * normal_loss
        correct += normal_correct
    if not share_sam:
        _record_norm(optimizer, record)
        _clip(optimizer, clip_norm)
        optimizer.base_optimizer.step()
        return loss, correct

    normal_grads = [(p, p.grad) for p in _params(optimizer)]
    optimizer.zero_grad()  # releases the gradients, which the list still holds
    sam_part = _part(images, sam), _part(labels, sam)
    random = random_state(images.device)
    sam_loss, sam_correct = add_gradient(sam_part, 1.0)  # still at w
    loss += share_sam * sam_loss
    correct += sam_correct
    try:
        optimizer.first_step()  # from w to w + eps
        finish = _next_gradients(optimizer, normal_grads, record)
        set_random_state(random, images.device)
        add_gradient(sam_part, share_sam, bn_perturbed == "freeze")
        finish()
        _clip(optimizer, clip_norm)
        optimizer.second_step()  # back to w, then the base optimizer's step with the sum
    finally:
        optimizer.restore()
    return loss, correct


def _add_gradient(
    model: nn.Module,
    captured: CapturedPasses | None,
    amp: str,
    label_smoothing: float,
    part: tuple[Tensor, Tensor],
    weight: float,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add weight times the gradient of a part's mean loss to `.grad`; returns that loss, and the number correct."""

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with _frozen_statistics(model) if frozen else nullcontext():
            return _loss(model, images, labels, amp, label_smoothing)

    if captured is not None:
        return captured(forward, *part, weight, frozen)
    loss, logits = forward(*part)
    (weight * loss).backward()
    return loss.detach(), (logits.argmax(1) == part[1]).sum()


@torch.no_grad()
def _record_norm(optimizer: SAM, record: list[Tensor] | None) -> None:
    """Record a step without SAM."""
    if record is not None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in _params(optimizer) if p.grad is not None])
        record.append(torch.stack([norm, *torch.full_like(norm, float("nan")).expand(2)]))


def _next_gradients(
    optimizer: SAM, normal_grads: list[tuple[Tensor, Tensor | None]], record: list[Tensor] | None
) -> Callable[[], None]:
    """Release the ascent gradient, and have the gradient at w + eps added to that of the normal part.

    Returns:
        What is to be called after the pass at w + eps. With a `record` that pass has its gradient to itself, and this
        adds the normal part's: the sum is the same, bit for bit.
    """
    ascent = [p.grad for p in _params(optimizer)]
    for parameter, gradient in normal_grads:
        parameter.grad = None if record is not None else gradient  # backward adds to it

    @torch.no_grad()
    def finish() -> None:
        params = _params(optimizer)
        pairs = [(g, p.grad) for g, p in zip(ascent, params, strict=True) if g is not None and p.grad is not None]
        g, h = (list(grads) for grads in zip(*pairs, strict=True))
        norms = [torch.nn.utils.get_total_norm(grads) for grads in ([one for one in ascent if one is not None], h)]
        product = torch.stack([one.sum() for one in torch._foreach_mul(g, h)]).sum()
        record.append(torch.stack([norms[0], optimizer.perturbation_norm(), product / (norms[0] * norms[1])]))
        for parameter, gradient in normal_grads:
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad.add_(gradient)

    if record is None:
        ascent.clear()
        return lambda: None
    return finish


def _params(optimizer: SAM) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _parts_of(model: nn.Module, images: Tensor, sam_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the normal and of the SAM part of a batch."""
    normal, sam = (~sam_mask).nonzero().squeeze(1), sam_mask.nonzero().squeeze(1)
    if 1 in (len(normal), len(sam)) and len(images) > 1 and _one_value_per_channel(model, images[:1]):
        everything = torch.arange(len(images))
        return (everything[:0], everything) if len(normal) == 1 else (everything, everything[:0])
    return normal, sam


def _loss(model: nn.Module, images: Tensor, labels: Tensor, amp: str, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and detached logits."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp == "bf16"):
        logits = model(images)
    logits = logits.to(images.dtype)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing), logits.detach()


@torch.no_grad()
def _clip(optimizer: SAM, clip_norm: float | None) -> None:
    """Scale the gradients to an l2 norm of at most `clip_norm`, without waiting for the device.

    Where their norm is not finite they become so too, so that the step is skipped as it is without clipping.
    """
    if clip_norm is None:
        return
    grads = [p.grad for p in _params(optimizer) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, norm))


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of torch's generators that layers on this device draw from: the CPU's, and the device's own."""
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Go back to what `random_state` returned; on another kind of device, to the CPU's part of it."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    elif state[1] is not None and device.type == "mps":
        torch.mps.set_rng_state(state[1])


def _part(tensor: Tensor, index: Tensor) -> Tensor:
    """The samples of one part; a part that is the whole batch is not copied."""
    return tensor if len(index) == len(tensor) else tensor[index.to(tensor.device, non_blocking=True)]


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with its batch, as in train mode, and leaves its running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@torch.no_grad()
def _one_value_per_channel(model: nn.Module, image: Tensor) -> bool:
    """Whether some BatchNorm of the model sees one value a channel for this batch of one image."""
    seen = []
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append(args[0].numel() // args[0].shape[1])) for m in layers
    ]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return 1 in seen


def train_epoch(
    model: nn.Module,
    optimizer: SAM,
    data: ImageSet,
    sam_mask: Tensor,
    seed: int,
    epoch: int,
    batch_size: int,
    after_step: Callable[[int, Callable[[], dict]], None] = lambda passes, position: None,
    position: dict | None = None,
    **step: Any,
) -> tuple[float, float]:
    """Train one epoch on augmented images, or the rest of one.

    Args:
        model, optimizer, step: as for `sharpbalance_step`.
        data: the training part.
        sam_mask: bool [N] on the CPU, which samples are trained with SAM.
        seed, epoch: order and augmentation are a pure function of them.
        batch_size: samples a step.
        after_step: called after each step with the number of forward-backward passes of one image that it made, and
            with a function that returns the position in the epoch: all that its rest depends on, besides the model and
            the optimizer. Calling that function waits for the device.
        position: what that function returned; None is the beginning.

    Returns:
        Mean loss and accuracy (0 to 1) over the epoch, each sample at the weights of its own step; sums over samples,
        divided once, so that batches of different size count right. A line on stderr says how many steps were skipped.

    Raises:
        RunError: if the last `MAX_SKIPPED` steps were all skipped.
    """
    # So that layers that draw from the global generator, as dropout does, depend on member and epoch alone as well.
    torch.manual_seed((seed << 20) + epoch)
    model.train()
    loss_sum = torch.zeros((), dtype=torch.float64 if data.device.type != "mps" else torch.float32, device=data.device)
    correct_sum, steps = loss_sum.clone(), 0
    optimizer.skipped[0] = 0
    if position is not None:
        steps = position["steps"]
        loss_sum += position["loss_sum"]
        correct_sum += position["correct_sum"]
        optimizer.skipped = torch.tensor(position.get("skipped", (0, 0)))
        set_random_state((position["rng"], position["rng_cuda"]), data.device)

    def here() -> dict:
        rng, rng_device = random_state(data.device)
        return {
            "steps": steps,
            "loss_sum": loss_sum.item(),
            "correct_sum": correct_sum.item(),
            "skipped": optimizer.skipped.cpu().tolist(),
            "rng": rng,
            "rng_cuda": rng_device,
        }

    for index, images, labels in data.epoch(seed, epoch, batch_size, done=steps):
        mask = sam_mask[index]
        loss, correct = sharpbalance_step(model, optimizer, images, labels, mask, **step)
        loss_sum += loss * len(index)
        correct_sum += correct
        steps += 1
        after_step(len(index) + int(mask.sum()), here)
    # The only read of the device in an epoch.
    sums = torch.stack([loss_sum, correct_sum, *optimizer.skipped.to(loss_sum)])
    loss, correct, skipped, in_a_row = sums.cpu().tolist()
    if skipped:
        where = f"member with seed {seed}, epoch {epoch}: {skipped:.0f} of {steps} steps were skipped"
        where += ", since their gradients are not finite"
        if in_a_row >= MAX_SKIPPED and math.isfinite(loss):  # a loss that is not finite ends the run in any case
            way_out = "start anew with a smaller --lr or --rho and another --save_path"
            raise RunError(f"{where}, the last {in_a_row:.0f} in a row; {way_out}")
        print(f"warning: {where}", file=sys.stderr)
    return loss / len(data), correct / len(data)


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: ImageSet,
    features: bool = False,
    progress: Callable[[int], object] = lambda images: None,
    at_once: int = 128,
) -> tuple[Tensor, Tensor | None]:
    """One pass over all images in order, without augmentation, in eval mode.

    Args:
        model: the network, on the device of the images; its mode is as before afterwards.
        images: what to predict.
        features: whether to return the inputs of the last linear layer, too; of a network that ends in a convolution,
            that one's, as means over positions.
        progress: called with the number of images after each batch.
        at_once: the most images in one pass; fewer where memory is short.

    Returns:
        Logits float32 [N, C], and features float32 [N, D] or None, on the CPU.
    """
    inputs: list[Tensor] = []
    hooks = []

    def keep(layer: nn.Module, args: tuple) -> None:
        inputs[:] = args  # over those of the layer before: the last in the pass need not be the last in the model

    if features:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]

    def outputs(batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = model(batch).float()
        progress(len(batch))
        if not features:
            return logits, None
        found = inputs.pop().float()
        return logits, found.mean(dim=(2, 3)) if found.dim() == 4 else found.flatten(1)

    try:
        with evaluating(model):
            logits, found = zip(*in_parts(outputs, images, PREDICTION_BATCH, at_once), strict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(logits).cpu(), torch.cat(found).cpu() if features else None


def in_parts(
    function: Callable[[Tensor, Tensor], Result], images: ImageSet, batch_size: int, at_once: int
) -> Iterator[Result]:
    """function(images, labels) of all images in order, of at most `at_once` in one call.

    Batches of `batch_size` are cut into equal parts, since of a few images alone kernels may form sums in another order
    than of many. No more than one part is in memory. Where memory runs out, parts are half as large from there on.

    Raises:
        RuntimeError, MemoryError: if the memory is too small for a single image.
    """
    for start in range(0, len(images), batch_size):
        parts = [range(start, min(start + batch_size, len(images)))]
        while parts:
            part = parts.pop(0)
            count = -(-len(part) // at_once)
            if count > 1:
                size, longer = divmod(len(part), count)
                ends = [part.start + i * size + min(i, longer) for i in range(count + 1)]
                parts[:0] = itertools.starmap(range, itertools.pairwise(ends))
                continue
            try:
                result = [function(*images.part(part.start, part.stop))]
            except (MemoryError, RuntimeError) as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                result = []
            # After the handler: while there is an error, its frames hold the memory.
            if result:
                yield result[0]
            else:
                at_once = len(part) // 2
                parts.insert(0, part)


def learning_rate(lr: float, schedule: str, epoch: int, epochs: int, warmup: int = 0) -> float:
    """The learning rate of an epoch (counted from 0) of `epochs`: a pure function, so that resuming needs no state.

    step: lr, times 0.1 from epochs/2 on, times 0.1 again from 3 epochs/4 on. cosine: lr (1 + cos(pi epoch/epochs)) / 2.
    In the first `warmup` epochs it rises linearly, lr (epoch + 1) / (warmup + 1); the cosine begins after them.
    """
    if epoch < warmup:
        return lr * (epoch + 1) / (warmup + 1)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
    return lr * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))
