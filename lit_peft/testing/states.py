"""Reading and moving the tensors of a module under test."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call
from lit_peft.core.dtypes import dequantises_itself
from lit_peft.core.layers import layer_ops
from lit_peft.core.wrapped import parts


def perturb(module: nn.Module, only: str = "") -> None:
    """Moves trainable tensors, those with `only` in their names, off starting values: zeros would hide things."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))


def by_equation(module: Any, x: Tensor) -> Tensor:
    """The output of a `Holder` with its composed weight, computed without any forward of an addition."""
    layer = module.layer
    call = Call(layer, layer.peft.chain())
    return layer_ops(layer).apply(layer, x, call.matrix(), call.bias())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal keys, dtypes and bits."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert same_bits(found[key], value), key


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and bits: codes that are stored as floats may read as nan."""
    if dequantises_itself(a):
        return type(a) is type(b) and all(map(same_bits, parts(a), parts(b)))
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
