"""Forward-backward passes as CUDA graphs.

A pass of a ResNet-18 is a few hundred kernels. On a fast GPU the host takes longer to launch them, one by one, than the
device to compute them. A graph holds the kernels of a whole pass and is launched at once. It is of one batch size, so
that the two parts of a batch, which vary in size, need one graph for each size.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils import first_line

# The use of a batch size at which it is captured, which takes as long as some passes.
CAPTURE_AT = 3


@functools.cache
def _shared() -> tuple[torch.cuda.Stream, tuple[int, int], torch.cuda.CUDAGraph]:
    """Stream and memory of all graphs: the allocator gives freed memory to the stream that it was taken on alone.

    With its last graph a pool would be gone, so there is one that is kept.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    return stream, pool, _capture(lambda: torch.zeros(1, device="cuda"), stream, pool)


def record(work: Callable[[], None]) -> Callable[[], None]:
    """What `work` launches on the current GPU, as a graph; nothing of it is computed. Returns what computes it."""
    torch.cuda.synchronize()
    return _capture(work, *_shared()[:2]).replay


def _capture(work: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """Unlike torch.cuda.graph it keeps the allocator's memory and collects no garbage, which would take longer."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that it failed is known, and why
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


class CapturedPasses:
    """The training passes of one network on a GPU; of each batch size that comes up often a graph is made.

    With the same kernels in both forms, a pass has the same bits whether its graph is there yet or not. The graphs of
    all networks of this process share the memory of their activations, since none of it outlives a pass; passes that
    have no graph have theirs besides. Where a capture fails, this process makes no graphs from there on.

    Args:
        model: a network whose work depends on its weights and on the shape of the images alone: one of `models.MODELS`.
            Its weights stay where they are in memory.
        most: images of the largest batch.
    """

    failed = False  # of the class: after a capture that failed torch may take no other

    def __init__(self, model: nn.Module, most: int):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.most = most
        self.uses: Counter[tuple[int, bool]] = Counter()
        self.replays: dict[tuple[int, bool], Callable[[], None]] = {}
        self.images: Tensor | None = None

    def __call__(
        self,
        loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor,
        weight: float,
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        """Add weight times the gradient of the loss to `.grad`.

        Args:
            loss_of: loss and logits of images and labels, always the same function for the same `frozen`.
            images, labels: float [B, C, H, W] and int64 [B].
            weight: of the gradient.
            frozen: whether BatchNorm's statistics stay as they are; passes of both kinds have graphs of their own.

        Returns:
            The loss and the number of correct predictions.
        """
        if self.images is None:
            self._allocate(images)
        key, inputs, targets = (len(images), frozen), self.images[: len(images)], self.labels[: len(images)]

        def work() -> None:
            loss, logits = loss_of(inputs, targets)
            torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, self.params))
            self.loss.copy_(loss.detach())
            self.correct.copy_((logits.argmax(1) == targets).sum())

        inputs.copy_(images)
        targets.copy_(labels)
        self.uses[key] += 1
        if key not in self.replays and self.uses[key] >= CAPTURE_AT and not self.failed:
            try:
                self.replays[key] = record(work)
            except RuntimeError as error:  # memory ran out, or a kernel that cannot be captured
                CapturedPasses.failed = True
                print(f"note: training without CUDA graphs, which is slower ({first_line(error)})", file=sys.stderr)
        if self.failed and self.replays:
            self.replays.clear()  # their memory may be what is missing
            _shared.cache_clear()
        self.replays.get(key, work)()
        # A copy, since the next pass writes over them.
        found = torch._foreach_mul(self.gradients, weight)
        known = [(p.grad, g) for p, g in zip(self.params, found, strict=True) if p.grad is not None]
        if known:
            torch._foreach_add_(*map(list, zip(*known, strict=True)))
        for parameter, gradient in zip(self.params, found, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
        return self.loss.clone(), self.correct.clone()

    def _allocate(self, images: Tensor) -> None:
        """The memory that all graphs of this network read and write."""
        like = {"dtype": images.dtype, "device": images.device, "memory_format": torch.channels_last}
        self.images = torch.empty((self.most, *images.shape[1:]), **like)
        self.labels = torch.zeros(self.most, dtype=torch.int64, device=images.device)
        self.gradients = [torch.zeros_like(p) for p in self.params]
        self.loss, self.correct = images.new_zeros(()), images.new_zeros((), dtype=torch.int64)
