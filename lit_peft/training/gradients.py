"""A look at the gradients of the first steps: what gets none would never be trained."""

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from lit_peft.core.attach import registry
from lit_peft.faults import TrainingFault

if TYPE_CHECKING:
    from lit_peft.methods.base import Method

WATCHED = 20
"""Steps of each optimizer. One does not do: a factor that starts at zero hides its partner's gradient until it has
moved, which a warm-up from rate zero, a step that the loss scaler skips or a head of zeros puts off."""


class GradientWatch:
    """Watches the tensors of a method through the first steps of a fit.

    Args:
        method: The method, attached to the module that is trained.
    """

    def __init__(self, method: "Method") -> None:
        self.method = method
        self._steps: Counter[int] = Counter()
        self._silent: dict[int, set[str]] = {}

    @property
    def ended(self) -> bool:
        """Whether every optimizer that has made a step has made enough of them."""
        return bool(self._steps) and min(self._steps.values()) >= WATCHED

    def step(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Looks at the gradients with which an optimizer is about to step.

        Base parameters that train are only warned about: a model may hold some that its loss does not use. So are
        tensors of an adapter whose gradient is zero where that of others is not.

        Raises:
            TrainingFault: A tensor of the adapter has no gradient in the first two steps, or none of them has one other
                than zero in all of those watched.
        """
        state, key = registry(module), id(optimizer)
        step = self._steps[key]
        if state is None or step >= WATCHED:
            return
        self._steps[key] += 1
        adapter = state.adapters[self.method.name]
        additions = {f"{p}.peft.{adapter.name}.{t}".lstrip(".") for p, names in adapter.sites.items() for t in names}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: module.get_parameter(name) for name in sorted(additions | set(adapter.base))}
        watched = {n: p for n, p in parameters.items() if id(p) in held and not self.method.lacks_gradient(n)}
        if step < 2:
            without = [name for name, p in watched.items() if p.grad is None]
            lost = [name for name in without if name in additions]
            if lost or (without and len(without) == len(watched)):
                raise TrainingFault(
                    f"{len(lost or without)} tensors of {self.method.name!r} got no gradient, {(lost or without)[0]} "
                    "among them: they would never be trained. Is the layer used in the forward pass? With gradient "
                    "checkpointing, use use_reentrant=False."
                )
        silent = self._silent.setdefault(key, set(watched)) & watched.keys()
        self._silent[key] = silent = {n for n in silent if (g := watched[n].grad) is None or not g.any()}
        if step + 1 < WATCHED or not silent:
            return
        if additions & watched.keys() and silent >= additions & watched.keys():
            raise TrainingFault(
                f"All tensors of {self.method.name!r} have had a gradient of zero in {WATCHED} steps: the loss does "
                "not depend on the layers that are adapted."
            )
        shown = ", ".join(sorted(silent)[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        warnings.warn(f"Trained, but without a gradient other than zero in {WATCHED} steps: {shown}.", stacklevel=2)
