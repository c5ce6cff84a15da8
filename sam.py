"""Sharpness-aware minimization (SAM), around any torch optimizer. This file imports torch only and can be used alone.

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for images, labels in batches:
        loss_function(model(images), labels).backward()
        optimizer.first_step(zero_grad=True)   # weights: w + eps
        loss_function(model(images), labels).backward()
        optimizer.second_step(zero_grad=True)  # weights: w, then one step of SGD with the gradient taken at w + eps

Reference: Foret et al., "Sharpness-aware minimization for efficiently improving generalization", ICLR 2021; the
adaptive form: Kwon et al., "ASAM", ICML 2021.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SAM(torch.optim.Optimizer):
    """Takes the step of `base_optimizer` at w with the gradient found at w + eps.

    With g the gradient at w over all parameters of all groups and T the identity, or diag(|w|) if `adaptive`:

        eps = rho T^2 g / (||T g||_2 + 1e-12)

    State and param_groups are those of the base optimizer, so that learning-rate schedulers act on both, and
    `state_dict` holds the momentum. rho and adaptive stand in the param_groups and may differ between groups; the
    norm is taken over all groups. Weight decay is no part of g: the base optimizer adds it in its own step.
    With rho = 0 the weights are those of the base optimizer, bit for bit.

    Parameters whose gradient is None at `first_step` are neither moved nor restored. The weights at w are kept in
    buffers that are allocated once, and come back bit for bit.

    Where the norm of the gradient at w, or at w + eps, is not finite, the step is skipped: eps is 0, and afterwards
    weights and state are as before, bit for bit (but for state that the base optimizer keeps on another device).

    A BatchNorm in train mode takes both passes into its running statistics; give it momentum 0 in the second to keep
    those of w. With a `torch.amp.GradScaler` scale both losses, call `scaler.unscale_(optimizer)` before `second_step`
    and `scaler.update()` after it: eps does not depend on the scale, and a step that overflows is skipped.

    Attributes:
        skipped: int64 [2], on the device of the weights: how many steps were skipped, and how many of them in a row up
            to now. Nothing here waits for the device; reading them does.

    Args:
        params: parameters or param_groups, as for any optimizer.
        base_optimizer: the class of the optimizer that takes the step.
        rho: radius of the perturbation, 0 or more.
        adaptive: ASAM's perturbation, relative to the size of each weight.
        kwargs: arguments of the base optimizer (lr, momentum, ...).

    Raises:
        TypeError: if `base_optimizer` is an optimizer, and not its class.
        ValueError: if rho is negative or not finite.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ):
        if not callable(base_optimizer):
            example = "SAM(params, torch.optim.SGD, lr=0.1)"
            found = f"an object of {type(base_optimizer).__name__}"
            raise TypeError(f"base_optimizer: expected the class of an optimizer, as in {example}, got {found}")
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        for group in self.param_groups:
            if not 0 <= group["rho"] < float("inf"):
                raise ValueError(f"rho: expected a finite number >= 0, got {group['rho']}")
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.defaults.update(self.base_optimizer.defaults)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._saved: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []
        self._perturbed = False
        self.skipped = torch.zeros(2, dtype=torch.int64)

    def _save(self, params: list[Tensor]) -> None:
        self._saved.update({p: torch.empty_like(p) for p in params if p not in self._saved})
        torch._foreach_copy_([self._saved[p] for p in params], params)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights from w to w + eps, with the gradients that stand in `.grad`.

        Raises:
            RuntimeError: if the weights are perturbed already, or if no parameter has a gradient.
        """
        if self._perturbed:
            raise RuntimeError("first_step: the weights are perturbed already; call second_step or restore first")
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        self._moved = [p for group in groups for p in group]
        if not self._moved:
            raise RuntimeError("first_step: no parameter has a gradient; call backward before it")
        self._save(self._moved)
        self._perturbed = True

        scaled = []  # T g
        for group, params in zip(self.param_groups, groups, strict=True):
            grads = [p.grad for p in params]
            scaled += torch._foreach_mul(torch._foreach_abs(params), grads) if group["adaptive"] and params else grads
        norm = _norm(scaled)
        self._finite = torch.isfinite(norm)
        for group, params in zip(self.param_groups, groups, strict=True):
            if not params:
                continue
            directions, scaled = scaled[: len(params)], scaled[len(params) :]
            if group["adaptive"]:
                directions = torch._foreach_mul(torch._foreach_abs(params), directions)
            # The scale stays a tensor on the device: no host sync.
            eps = torch._foreach_mul(directions, group["rho"] / (norm + 1e-12))
            torch._foreach_add_(params, eps)
        _choose(self._finite, self._moved, [self._saved[p] for p in self._moved])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def perturbation_norm(self) -> Tensor:
        """The l2 norm of eps, 0-dimensional: of what `first_step` has moved the weights by.

        Raises:
            RuntimeError: if the weights are not perturbed.
        """
        if not self._perturbed:
            raise RuntimeError("perturbation_norm: the weights are not perturbed; call first_step before it")
        return _norm(torch._foreach_sub(self._moved, [self._saved[p] for p in self._moved]))

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back from w + eps to w, bit for bit, without a step; at w it does nothing."""
        if self._perturbed:
            torch._foreach_copy_(self._moved, [self._saved[p] for p in self._moved])
            self._moved = []
            self._perturbed = False

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Bring the weights back to w and take the base optimizer's step with the gradients that stand in `.grad`.

        The step is skipped where they or those of `first_step` have no finite norm.

        Raises:
            RuntimeError: if no `first_step` came before it.
        """
        if not self._perturbed:
            raise RuntimeError("second_step: the weights are not perturbed; call first_step before it")
        self.restore()
        self._step_if_finite()
        self._opt_called = True  # what a scheduler looks at before it warns that no step was taken
        if zero_grad:
            self.zero_grad()

    def _step_if_finite(self) -> None:
        """Take the step where it is finite; a GPU, which must not be waited for, takes it and takes it back."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        finite = self._finite & torch.isfinite(_norm([p.grad for p in params]))
        skipped = (~finite).to(torch.int64)
        total, in_a_row = self.skipped.to(finite.device, non_blocking=True)
        self.skipped = torch.stack([total + skipped, (in_a_row + 1) * skipped])
        if finite.device.type == "cpu":
            if finite:
                self.base_optimizer.step()
            return

        def state() -> dict[tuple[Tensor, str], Tensor]:
            kept = {(p, name): value for p in params for name, value in self.state.get(p, {}).items()}
            return {key: v for key, v in kept.items() if isinstance(v, Tensor) and v.device == finite.device}

        self._save(params)
        kept = state()
        before = {key: torch.empty_like(value) for key, value in kept.items()}
        if kept:  # one launch for all; clones would be one each
            torch._foreach_copy_(list(before.values()), list(kept.values()))
        self.base_optimizer.step()
        after = state()
        old = [before[key] if key in before else torch.zeros_like(value) for key, value in after.items()]
        _choose(finite, [*params, *after.values()], [*(self._saved[p] for p in params), *old])

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """One whole SAM step. `closure` clears the gradients, computes the loss, calls backward and returns the loss.

        It is called twice, at w and at w + eps. If it raises, the weights are back at w.

        Returns:
            The loss at w.

        Raises:
            RuntimeError: without a closure.
        """
        if closure is None:
            way_out = "pass one, or call first_step and second_step with a backward pass before each"
            raise RuntimeError(f"step: expected a closure, since SAM evaluates the loss twice; {way_out}")
        closure = torch.enable_grad()(closure)
        loss = closure()
        # A tensor that the second call changes in place would change the loss at w as well.
        loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
        try:
            self.first_step()
            closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the weights must not be perturbed.

        Raises:
            RuntimeError: between `first_step` and `second_step`.
        """
        if self._perturbed:
            raise RuntimeError("load_state_dict: the weights are perturbed; call second_step or restore first")
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()


def _norm(tensors: list[Tensor]) -> Tensor:
    """The l2 norm of all entries, 0-dimensional."""
    norms = torch._foreach_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _choose(condition: Tensor, new: list[Tensor], old: list[Tensor]) -> None:
    """Leave the new values where the condition (bool, 0-dimensional) holds, or write the old ones over them.

    The bits are multiplied by 1 or 0, as whole numbers: a float that is not finite would survive a product with 0.
    """
    if condition.device.type == "cpu":
        if not condition:
            torch._foreach_copy_(new, old)
        return
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    new, old = ([t.detach().view(kinds[t.element_size()]) for t in tensors] for tensors in (new, old))
    condition = condition.to(new[0].dtype)
    torch._foreach_mul_(new, condition)
    torch._foreach_add_(new, torch._foreach_mul(old, 1 - condition))
