"""A look at the gradients of the first steps: what gets none would never be trained."""

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from lit_peft.core.registry import registry
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
        self._absent: dict[int, set[str]] = {}
        self._zero: dict[int, set[str]] = {}

    @property
    def ended(self) -> bool:
        """Whether every optimizer that has made a step has made enough of them."""
        return bool(self._steps) and min(self._steps.values()) >= WATCHED

    def step(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Looks at the gradients with which an optimizer is about to step.

        A layer may be left out of some steps (layer drop, an expert without tokens), and a gradient be zero for long
        (a margin that is kept): what has been zero throughout is warned about, as are base parameters without one, as a
        loss need not use them all.

        Raises:
            TrainingFault: None of the tensors has a gradient in the first two steps, or one of the adapter has none in
                all that are watched.
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
        absent = self._absent[key] = {
            name for name in self._absent.get(key, watched.keys()) if name in watched and watched[name].grad is None
        }
        self._zero[key] = {
            name for name in self._zero.get(key, watched.keys()) if name in watched and not _moves(watched[name])
        }
        none_at_all = step < 2 and absent >= (additions & watched.keys() or watched.keys())
        lost = absent if none_at_all else absent & additions
        if lost and (none_at_all or step + 1 == WATCHED):
            raise TrainingFault(
                f"{len(lost)} tensors of {self.method.name!r} got no gradient, {min(lost)} among them: they would "
                "never be trained. Is the layer used in the forward pass? With gradient checkpointing, use "
                "use_reentrant=False."
            )
        if step + 1 == WATCHED:
            self.finish()

    def finish(self) -> None:
        """Warns, once, of what has had no gradient other than zero so far, if that was more than one step.

        In the first it may be by design: a factor that starts at zero hides its partner's.
        """
        for key, steps in self._steps.items():
            if steps > 1 and (silent := sorted(self._zero.pop(key, ()))):
                shown = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
                told = f"Trained, but without a gradient other than zero in {steps} steps: {shown}."
                warnings.warn(told, stacklevel=2)


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())
