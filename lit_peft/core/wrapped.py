"""Weights that dequantise themselves: tensors of a class that holds a layer's weight in fewer bits, as torchao's do."""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.dtypes import compute_dtype
from lit_peft.core.swap import Swapped, restore_class, unswapped, with_mixins


class FrozenWrapped(Swapped):
    """A linear layer with such a weight, frozen: it dequantises again in the backward pass.

    torchao's own product keeps the dense weight for it, which is what a frozen base in 8 bit is to save.
    """

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        dtype, W = compute_dtype(x), layer.weight
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = _Product.apply(x.to(dtype), W)
        else:
            y = F.linear(x.to(dtype), W.dequantize().to(dtype))
        return y if layer.bias is None else y + layer.bias.to(dtype)

    def extra_repr(self) -> str:
        layer: Any = self
        return f"{super().extra_repr()}, {told(layer.weight)}"  # type: ignore[misc]


class _Product(torch.autograd.Function):
    """`W x`, which keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Any) -> Tensor:
        ctx.weight = W
        return F.linear(x, W.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.dequantize().to(grads[0].dtype), None


def told(weight: Any) -> str:
    """What such a weight is stored as: "torchao Int8Tensor by rows", and what it says of activations beside that."""
    cls, block = type(weight), tuple(getattr(weight, "block_size", ()))
    shape = "by rows" if block == (1, weight.shape[-1]) else f"in blocks of {'x'.join(map(str, block))}" * bool(block)
    more = [name for name in ("act_quant_kwargs", "act_pre_scale") if getattr(weight, name, None) is not None]
    with_more = f"with {' and '.join(more)}" * bool(more)
    return " ".join(part for part in (cls.__module__.partition(".")[0], cls.__name__, shape, with_more) if part)


def dense(weight: Any) -> Tensor:
    """The weight in float32, [out, in], rounded to no other dtype in between where its class can do that."""
    if "output_dtype" in inspect.signature(weight.dequantize).parameters:
        return weight.dequantize(output_dtype=torch.float32)
    return weight.dequantize().float()


def parts(weight: Any) -> list[Tensor]:
    """The plain tensors inside, codes first."""
    return [getattr(weight, name).detach() for name in weight.__tensor_flatten__()[0]]


def made_by_rows(weight: Any) -> bool:
    """Whether a dense weight alone tells what such a weight is: it has a scale a row, and changes no activations."""
    make = getattr(type(weight), "from_hp", None)
    return told(weight).endswith("by rows") and make is not None and "granularity" in inspect.signature(make).parameters


def store(layer: Any, W: Tensor) -> None:
    """Quantises a weight, [out, in], as the layer's is, and puts it in its place.

    Raises:
        ValueError: For one that is not known to be made of a dense one alone.
    """
    old = layer.weight
    if not made_by_rows(old):
        raise ValueError(f"A weight that is stored as {told(old)} cannot be quantised anew here.")
    from torchao.quantization import PerRow

    new = type(old).from_hp(W.detach().to(old.device, old.dtype).contiguous(), granularity=PerRow())
    layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)


class Kept(NamedTuple):
    """What such a layer was, tensors on the host."""

    kind: tuple[tuple[type, ...], type]
    """Its class, as `unswapped` takes it apart: a swapped one does not pickle."""
    weight: Tensor
    """No copy where it lies on the host: what takes its place is another tensor, and nothing writes into this one."""
    bias: Tensor | None


def keep(layer: Any) -> Kept:
    """What `put_back` needs to make a layer what it is now."""
    b = layer.bias
    bias = None if b is None else b.detach().to("cpu", copy=True)
    return Kept(unswapped(type(layer)), layer.weight.detach().to("cpu"), bias)


def put_back(layer: Any, kept: Kept) -> None:
    """Makes a layer what it was when it was kept, bit for bit, whether it is dense now or was quantised anew."""
    weight = kept.weight.to(layer.weight.device)
    layer.__class__ = with_mixins(*kept.kind)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if kept.bias is not None:
        layer.bias.data.copy_(kept.bias)


def make_dense(layer: Any, W: Tensor) -> None:
    """Makes a layer a dense one with this weight, [out, in], in place."""
    restore_class(layer, FrozenWrapped)
    layer._parameters["weight"] = nn.Parameter(W)
