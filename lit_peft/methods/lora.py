"""LoRA: a low-rank change of a frozen weight."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta
from lit_peft.core.layers import LayerOps, layer_ops
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod


class LoRADelta(Delta):
    """`W + s B A`; `lora_A`: [r, in], `lora_B`: [out, r], `s` the scaling."""

    fused_from = 1 << 22
    """Smallest number of weights at which the fused function beats the plain formula (benchmarks/step_time.py)."""

    def __init__(self, out_features: int, in_features: int, r: int, scaling: float, dropout: float, init: str) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling, self.dropout, self.init_kind = scaling, dropout, init

    def init(self, site: Site, generator: torch.Generator) -> None:
        if self.init_kind == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0], generator=generator)

    def change(self) -> Tensor:
        """`s B A`, [out, in]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        ops = layer_ops(layer)
        dropout = self.dropout > 0 and self.training and x.is_floating_point()
        if not dropout and self._fuses(layer, call, ops, x):
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            return LoRAFunction.apply(
                x.to(dtype), self.lora_A.to(dtype), self.lora_B.to(dtype), layer, ops, self.scaling
            )
        y = call(x)
        dropped = nn.functional.dropout(x, self.dropout) if dropout else x
        if not ops.separable(layer):
            return y + ops.apply(layer, dropped, self.change())
        return ops.combine(y, ops.apply(layer, dropped, self.lora_A), self.lora_B, self.scaling)

    def _fuses(self, layer: Any, call: Call, ops: LayerOps, x: Tensor) -> bool:
        """Large eager layers whose own parameters are frozen; compiled graphs fuse by themselves."""
        return (
            self.lora_A.shape[1] * self.lora_B.shape[0] >= self.fused_from
            and call.is_base
            and ops.is_linear
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not any(p is not None and p.requires_grad for p in layer._parameters.values())
        )


class LoRAFunction(torch.autograd.Function):
    """`y = W x + b + s B A x` as one node: keeps `x` and `A x` for backward, and the 4-bit weight only packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: nn.Module, ops: LayerOps, s: float) -> Tensor:
        h = x @ A.t()
        ctx.save_for_backward(x, A, B, h)
        ctx.layer, ctx.ops, ctx.s = layer, ops, s
        return ops.combine(ops.linear(layer, x), h, B, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        dy = grads[0]
        dh = ctx.s * (dy @ B)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.ops.linear_t(ctx.layer, dy)
            dx.view(-1, dx.shape[-1]).addmm_(dh.reshape(-1, dh.shape[-1]), A)
        dA = dh.reshape(-1, dh.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        dB = ctx.s * (dy.reshape(-1, dy.shape[-1]).t() @ h.reshape(-1, h.shape[-1]))
        return dx, dA, dB, None, None, None


class LoRA(TargetedMethod):
    """LoRA."""

    def __init__(self, r: int = 16, dropout: float = 0.05, bias: str = "none", **common: Any) -> None:
        super().__init__(**common)
        self.r, self.dropout, self.bias = r, dropout, bias

    def build(self, site: Site) -> LoRADelta:
        return LoRADelta(*site.size, self.r, 2.0, self.dropout, "kaiming")
