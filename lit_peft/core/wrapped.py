"""Weights that dequantise themselves: tensors of a class that holds a layer's weight in fewer bits, as torchao's do."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_peft.core.dtypes import compute_dtype
from lit_peft.core.swap import Swapped


def dequantises_itself(weight: Any) -> bool:
    """Whether a weight is such a tensor. Every tensor has a `dequantize`; only these have one of their own."""
    cls = type(weight)
    return cls is not nn.Parameter and getattr(cls, "dequantize", Tensor.dequantize) is not Tensor.dequantize


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


class _Product(torch.autograd.Function):
    """`W x`, which keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Any) -> Tensor:
        ctx.weight = W
        return F.linear(x, W.dequantize().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.dequantize().to(grads[0].dtype), None


def told(weight: Any) -> str:
    """What such a weight is stored as: "torchao Int8Tensor by rows"."""
    cls, block = type(weight), tuple(getattr(weight, "block_size", ()))
    shape = "by rows" if block == (1, weight.shape[-1]) else f"in blocks of {'x'.join(map(str, block))}" * bool(block)
    return f"{cls.__module__.partition('.')[0]} {cls.__name__} {shape}".strip()


def parts(weight: Any) -> list[Tensor]:
    """The plain tensors inside, codes first."""
    return [getattr(weight, name).detach() for name in weight.__tensor_flatten__()[0]]


def store(layer: Any, W: Tensor) -> None:
    """Quantises a weight, [out, in], as the layer's is, and puts it in its place.

    Raises:
        ValueError: For a class of tensor that is not known to be made of a dense one alone.
    """
    old = layer.weight
    if not (told(old).endswith("by rows") and hasattr(type(old), "from_hp")):
        raise ValueError(f"A weight that is stored as {told(old)} cannot be quantised anew here.")
    from torchao.quantization import PerRow

    new = type(old).from_hp(W.detach().to(old.device, old.dtype).contiguous(), granularity=PerRow())
    layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)
