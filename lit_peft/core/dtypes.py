"""In what a product is computed."""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by the names that configurations give them."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` is computed in: autocast's where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
