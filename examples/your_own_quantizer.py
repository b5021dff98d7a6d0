"""A quantiser of one's own: whole numbers of 8 bits, with a scale for each row.

    [project.entry-points."lit_peft.quantizers"]
    rows8 = "your_own_quantizer:Rows8"

in a package's pyproject.toml makes it a mode: `--method.quantize rows8`, `LoRA(quantize={"mode": "rows8", "bits": 5})`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.layers import LinearOps, layer_ops, register_layer_ops
from lit_peft.core.quantize import Quantizer, StoredSize


class RowsLinear(nn.Linear):
    """What a layer becomes: `weight` holds its codes, [out, in], int8, and `scale` one number a row, [out, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        b = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, (self.weight * self.scale).to(x.dtype), b)


@register_layer_ops(f"{__name__}.RowsLinear")
class RowsLinearOps(LinearOps):
    """How everything else reads such a layer: methods, fingerprints, merging, the table before training."""

    def matrix(self, layer: RowsLinear) -> Tensor:
        return layer.weight * layer.scale

    def quantization(self, layer: RowsLinear) -> str:
        return f"{layer.bits} bits by rows"

    def stored(self, layer: RowsLinear) -> list[Tensor]:
        return [layer.weight, layer.scale]

    def store_matrix(self, layer: RowsLinear, W: Tensor) -> None:
        codes, scale = rounded(W, layer.bits)
        layer.weight.data.copy_(codes)
        layer.scale.copy_(scale)

    def make_dense(self, layer: RowsLinear, W: Tensor) -> None:
        layer.__class__ = nn.Linear
        del layer.scale, layer.bits
        layer.weight = nn.Parameter(W, requires_grad=False)

    def keep(self, layer: RowsLinear) -> tuple[Tensor, Tensor, int, Tensor | None]:
        b = None if layer.bias is None else layer.bias.detach().clone()
        return layer.weight.detach().clone(), layer.scale.clone(), layer.bits, b

    def put_back(self, layer: nn.Linear, kept: tuple[Tensor, Tensor, int, Tensor | None]) -> None:
        codes, scale, bits, b = kept
        store_rows(layer, codes.to(layer.weight.device), scale.to(layer.weight.device), bits)
        if b is not None:
            layer.bias.data.copy_(b)


class Rows8(Quantizer):
    """`W ~ scale[row] * code`.

    Args:
        bits: How many of the 8 are used.
        **common: See `Quantizer`.
    """

    kinds = ("torch.nn.modules.linear.Linear",)

    def __init__(self, bits: int = 8, **common) -> None:
        super().__init__(**common)
        if bits not in range(2, 9):
            raise ValueError(f"bits is {bits!r}, expected 2 to 8.")
        self.bits = bits

    @property
    def stored_as(self) -> str:
        return f"{self.bits} bits by rows"

    def quantize(self, layer: nn.Linear, device: torch.device) -> None:
        store_rows(layer, *rounded(layer_ops(layer).matrix(layer).detach().to(device), self.bits), self.bits)

    def size(self, out_features: int, in_features: int) -> StoredSize:
        return StoredSize(codes=out_features * in_features, constants=4 * out_features)


def store_rows(layer: nn.Linear, codes: Tensor, scale: Tensor, bits: int) -> None:
    """Makes a layer one of `RowsLinear`; the same object, so that whoever holds it still does."""
    layer.__class__, layer.bits = RowsLinear, bits
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("scale", scale, persistent=False)  # the base is in no checkpoint


def rounded(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, int8, and the scale of each row, float32."""
    most = 2 ** (bits - 1) - 1
    scale = W.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return (W / scale).round().to(torch.int8), scale
