"""In what a product is computed, and the tensors whose dtype is not that of what they store."""

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by the names that configurations give them."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` is computed in: autocast's where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def dequantises_itself(weight: Any) -> bool:
    """Whether a weight is a tensor that holds codes, as torchao's do; its dtype is that of what it dequantises to.

    Every tensor has a `dequantize`; only these have one of their own.
    """
    cls = type(weight)
    return cls is not nn.Parameter and getattr(cls, "dequantize", Tensor.dequantize) is not Tensor.dequantize
