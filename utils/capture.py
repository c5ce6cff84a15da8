"""Forward-backward passes as CUDA graphs.

A pass of a ResNet-18 is a few hundred kernels. On a fast GPU the host takes longer to launch them, one by one, than the
device to compute them. A graph holds the kernels of a whole pass and is launched at once. It is of one batch size, so
that the two parts of a batch, which vary in size, need one graph for each size.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils import first_line

CAPTURE_AT = (
    3  # the use of a batch size at which it is captured: that takes as long as some passes, and sizes can be rare
)


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Where all graphs are captured: the allocator keeps freed memory for the stream that it was taken on."""
    return torch.cuda.Stream()


def record(work: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """What `work` launches on the current GPU, as a graph; nothing of it is computed. Returns what computes it.

    Unlike torch.cuda.graph it keeps the allocator's memory and collects no garbage, which would take longer than the
    capture itself.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay


class CapturedPasses:
    """The training passes of one network on a GPU; of each batch size that comes up often a graph is made.

    With the same kernels in both forms, a pass has the same bits whether its graph is there yet or not. The graphs of
    all networks of this process share the memory of their activations, since none of it outlives a pass.

    Args:
        model: a network whose work depends on its weights and on the shape of the images alone: one of `models.MODELS`.
            Its weights stay where they are in memory.
        most: images of the largest batch.
    """

    _pool: tuple[int, int] | None = None
    _first: Callable[[], None] | None = None  # a graph that is not dropped: with its last graph a pool is gone

    def __init__(self, model: nn.Module, most: int):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.most = most
        self.uses: Counter[tuple[int, bool]] = Counter()
        self.replays: dict[tuple[int, bool], Callable[[], None]] = {}
        self.failed = False
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
            frozen: part of what names the graph, besides B.

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
        if key not in self.replays and not self.failed and self.uses[key] >= CAPTURE_AT:
            try:
                self.replays[key] = record(work, CapturedPasses._pool)
            except RuntimeError as error:  # memory ran out, or a kernel that cannot be captured
                self.failed = True
                self.replays.clear()
                CapturedPasses._first = None  # so that the memory can be had where no other network uses the pool
                print(f"note: training without CUDA graphs, which is slower ({first_line(error)})", file=sys.stderr)
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
        """The memory that all graphs read and write."""
        self.images = images.new_empty((self.most, *images.shape[1:])).to(memory_format=torch.channels_last)
        self.labels = torch.zeros(self.most, dtype=torch.int64, device=images.device)
        self.gradients = [torch.zeros_like(p) for p in self.params]
        self.loss, self.correct = images.new_zeros(()), images.new_zeros((), dtype=torch.int64)
        if CapturedPasses._pool is None and images.device.type == "cuda":
            CapturedPasses._pool = torch.cuda.graph_pool_handle()
            CapturedPasses._first = record(lambda: self.loss.zero_(), CapturedPasses._pool)
