"""What a method adds to a module: `Addition`, and `Delta` for a change of one weight matrix."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.layers import LayerOps, layer_ops

if TYPE_CHECKING:
    from lit_peft.core.targets import Site


class Addition(nn.Module):
    """Anything put around a frozen module, which goes on living where it was.

    Its parameters are trained, saved and moved with the model; a parameter made with `requires_grad=False`
    stays frozen and is saved. Subclasses override `forward`, and `init` when zeros are not what they start from.
    """

    not_mergeable: ClassVar[str | None] = "it adds a computation, not a change of a weight."
    """Why it cannot be folded into the layer's weight; None where it can."""

    @property
    def remakes_input(self) -> bool:
        """Whether it has its input made again in the backward pass where it can, see `lit_peft.core.remake`."""
        return False

    def forward(self, layer: nn.Module, call: "Call", *args: Any, **kwargs: Any) -> Any:
        """Runs in the place of `layer`'s own forward.

        Args:
            layer: The module this addition is attached to.
            call: Runs what was there before: the module itself and the additions below this one. May be skipped.
            *args: What the module was called with.
            **kwargs: The same, by name.

        Returns:
            What the module shall return.
        """
        return call(*args, **kwargs)

    def init(self, site: "Site", generator: torch.Generator) -> None:
        """Sets the starting values; `Method.build` has only allocated them.

        Args:
            site: The place in the model; `site.matrix()` is its dense weight.
            generator: A CPU generator, seeded from the site's name, so that every rank draws the same values.
        """

    def after_averaging(self) -> None:
        """Runs once tensors of this were averaged over steps: puts back what must hold exactly, the zeros of a mask."""

    def describe(self) -> dict[str, Any]:
        """What the table of sites shows of it beside its size, `{"r": 8, "alpha": 16}`."""
        return {}


class Delta(Addition):
    """A change of one layer's weight matrix, given by one equation, `weight`.

    Everything else follows for every layer type: the forward pass, merging, and composition with other deltas.
    Several deltas at one site add their changes of the *base* weight, whatever their order,
    `V = W + sum_i (weight_i(W) - W)`; one scaling delta (`scales = True`) may then act on the sum, `weight(V)`.
    """

    not_mergeable = None
    scales: ClassVar[bool] = False
    """Whether the equation rescales what it is given, (IA)^3 and DoRA, instead of adding to it."""

    def weight(self, W: Tensor) -> Tensor:
        """The equation. `W`: [out, in], the dense weight. Returns the changed weight, [out, in]."""
        raise NotImplementedError(f"{type(self).__name__} must define weight(W), its equation.")

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The equation for the bias, [out] or None; by default it stays as it is."""
        return b

    def forward(self, layer: nn.Module, call: "Call", x: Tensor) -> Tensor:
        """Applies the equation. Override it where the same values can be had faster.

        An override must add to (or, when `scales`, rescale) what `call(x)` returns, unless `call.is_base`.
        """
        ops = layer_ops(layer)
        if self.scales or call.is_base:
            return ops.apply(layer, x, self.weight(call.matrix()), self.bias(call.bias()))
        W, b = ops.matrix(layer), ops.bias(layer)
        return call(x) + ops.apply(layer, x, self.weight(W) - W, difference(self.bias(b), b))


class Weighted(Delta):
    """An adding delta whose change counts by a weight, `W + w (weight(W) - W)`; holds no tensors of its own.

    Args:
        inner: The delta, which lives where it is.
        w: The weight.
    """

    def __init__(self, inner: Any, w: float) -> None:
        super().__init__()
        self.inner, self.w = inner, w

    def weight(self, W: Tensor) -> Tensor:
        return W + self.w * (self.inner.weight(W) - W)

    def bias(self, b: Tensor | None) -> Tensor | None:
        change = difference(self.inner.bias(b), b)
        if change is None or change is b:
            return b
        return self.w * change if b is None else b + self.w * change

    def forward(self, layer: nn.Module, call: "Call", x: Tensor) -> Tensor:
        y = call(x)
        return y + self.w * self.inner(layer, _Nothing(layer, torch.zeros_like(y)), x)


def composed_weight(deltas: Iterable[Delta], W: Tensor) -> Tensor:
    """`V`, [out, in]: the changes of the base weight `W` added up, in the order given, scaling deltas acting on `V`."""
    V = W
    for delta in deltas:
        if delta.scales:
            V = delta.weight(V)
        elif V is W:
            V = delta.weight(W)
        else:
            V = V + (delta.weight(W) - W)
    return V


def composed_bias(deltas: Iterable[Delta], b: Tensor | None) -> Tensor | None:
    """The same for the bias, [out] or None."""
    c = b
    for delta in deltas:
        if delta.scales:
            c = delta.bias(c)
        elif (change := difference(delta.bias(b), b)) is not None and change is not b:
            c = change if c is None else c + change
    return c


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """`x` with dropout in training; token ids, which an embedding is given, as they are."""
    return F.dropout(x, p) if p > 0 and training and x.is_floating_point() else x


def difference(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """`new - old`, where an absent bias is zero."""
    return new if old is None or new is None else new - old


class Call:
    """What stands below an addition: the layer, and the additions that come before this one.

    Calling it runs them. For a layer with a weight it also tells that weight, deltas included.
    """

    __slots__ = ("below", "layer", "run")

    def __init__(self, layer: nn.Module, below: Sequence[Addition], run: Callable[..., Any] | None = None):
        self.layer, self.below, self.run = layer, below, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.run is not None
        if not self.below:
            return self.run(*args, **kwargs)
        return self.below[-1](self.layer, Call(self.layer, self.below[:-1], self.run), *args, **kwargs)

    @property
    def is_base(self) -> bool:
        """Whether nothing but the layer itself stands below."""
        return not self.below

    @property
    def is_fusible(self) -> bool:
        """Whether one autograd node may stand for the layer and an addition: it is linear, frozen, eager and trains.

        Compiled graphs fuse by themselves; without gradients there is nothing to save.
        """
        if not (self.is_base and self.can_read_again):  # which has looked at the weight
            return False
        return not any(
            p.requires_grad for name, p in self.layer._parameters.items() if p is not None and name != "weight"
        )

    @property
    def can_read_again(self) -> bool:
        """Whether a node may read the weight again in the backward pass instead of keeping it: linear, frozen, eager.

        Whatever stands below, and also where the layer's bias trains; not a weight that is computed, by a weight norm.
        """
        weight = self.layer._parameters.get("weight")
        return (
            self.ops.is_linear
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and weight is not None
            and not weight.requires_grad
        )

    @property
    def ops(self) -> LayerOps:
        """How the layer is read and applied."""
        return layer_ops(self.layer)

    def matrix(self) -> Tensor:
        """The layer's weight with the deltas below, [out, in]; inside a forward pass this is a plain tensor."""
        return composed_weight(self._deltas(), self.ops.matrix(self.layer))

    def bias(self) -> Tensor | None:
        """The layer's bias with the deltas below, [out] or None."""
        return composed_bias(self._deltas(), self.ops.bias(self.layer))

    def _deltas(self) -> list[Delta]:
        return [addition for addition in self.below if isinstance(addition, Delta)]


class _Nothing(Call):
    """What stands below a delta whose change alone is wanted: it returns zeros."""

    __slots__ = ("zeros",)

    def __init__(self, layer: nn.Module, zeros: Tensor) -> None:
        super().__init__(layer, ())
        self.zeros = zeros

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.zeros

    @property
    def is_base(self) -> bool:
        return False
