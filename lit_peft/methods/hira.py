"""HiRA: a high-rank change of a frozen weight, by multiplying it with a low-rank one."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta, dropped
from lit_peft.core.dtypes import compute_dtype
from lit_peft.core.hf_peft import stores_transposed
from lit_peft.core.layers import LayerOps, layer_ops
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import check_range, check_rank


class HiRA(TargetedMethod):
    """Hadamard high-rank adaptation: `W' = W * (1 + B A)`, elementwise, with `A`: [r, in] and `B`: [out, r].

    Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", section 3.
    The change `W * B A` has up to rank(W) r, where LoRA's has r, for the same `r (in + out)` parameters. `B` starts
    at zero, so that training starts from the base.

    The paper names the factors the other way round, `W * (A B)` with its A at zero. The form without the one that is
    also published, `W' = W * (B A)`, would start from a weight of zeros: it is the *change* there, as it is here.

    There is no scaling, since `W` gives each entry its size, and an entry that is zero stays zero. In bfloat16 a
    change of less than 1/256 of an entry is lost to rounding in the forward pass, not in the gradients; keep the
    base in float32 where small changes matter.

    A step costs what full fine-tuning's does without its optimizer: the gradient of `B A` needs a product of the
    size of W. None is kept between forward and backward. Merging makes inference free.

    Args:
        r: Rank of the factors; 32 is the paper's (section 4.1).
        dropout: Dropout on the input of the change, which then takes a second product; 0 by default.
        **common: See `TargetedMethod` and `Method`.
    """

    learning_rate = 2e-3  # on SST-2 1e-2 won a short sweep and lost the longer runs, docs/results/sst2.md
    may_change = frozenset({"dropout"})
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "HIRA"}
    hf_options: ClassVar[dict[str, Any]] = {
        "r": 32,
        "hira_dropout": 0.0,
        # Change nothing; peft 0.21.2 gives every layer r ranks, whatever rank_pattern says.
        **dict.fromkeys(("init_weights", "fan_in_fan_out", "rank_pattern")),
    }

    def __init__(self, r: int = 32, dropout: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        check_range("r", r, 1)
        check_range("dropout", dropout, 0, 1, open_above=True)
        self.r, self.dropout = r, dropout

    def build(self, site: Site) -> "HiRADelta":
        check_rank("r", self.r, site)
        return HiRADelta(*site.size, self.r, self.dropout)

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's HIRA; see `lit_peft.saving.folder`."""
        tensors: dict[str, Tensor] = {}
        for site, delta in sites:
            ops = layer_ops(site.layer)
            factors = ops.factor_weights(site.layer, delta.hira_A, delta.hira_B)
            if factors is None:
                raise ValueError(
                    f"{site.path}: HF PEFT's HiRA of a convolution has no groups, and none is written with dilation or "
                    "padding_mode."
                )
            kind = "hira_embedding" if ops.looks_up else "hira"
            tensors |= {f"{site.path}.{kind}_{x}": factor for x, factor in zip("AB", factors, strict=True)}
        return {"r": self.r, "hira_dropout": self.dropout, "fan_in_fan_out": stores_transposed(sites)}, tensors

    @classmethod
    def from_hf_peft(cls, options: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same HiRA; see `lit_peft.saving.folder`."""
        return {"r": options["r"], "dropout": options["hira_dropout"]}


class HiRADelta(Delta):
    """`W * (1 + B A)`; `hira_A`: [r, in], `hira_B`: [out, r]."""

    def __init__(self, out_features: int, in_features: int, r: int, dropout: float) -> None:
        super().__init__()
        self.hira_A = nn.Parameter(torch.empty(r, in_features))
        self.hira_B = nn.Parameter(torch.zeros(out_features, r))
        self.dropout = dropout

    def init(self, site: Site, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(site.fan_in)
        nn.init.uniform_(self.hira_A, -bound, bound, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"r": len(self.hira_A)}

    def weight(self, W: Tensor) -> Tensor:
        return _changed(W, self.hira_A.to(W.dtype), self.hira_B.to(W.dtype))

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        ops, d = layer_ops(layer), dropped(x, self.dropout, self.training)
        if d is x and call.is_fusible:
            return HiRAFunction.apply(x.to(compute_dtype(x)), self.hira_A, self.hira_B, layer, ops, True)
        if call.can_read_again:
            return call(x) + HiRAFunction.apply(d.to(compute_dtype(d)), self.hira_A, self.hira_B, layer, ops, False)
        if d is x:
            return super().forward(layer, call, x)
        W = ops.matrix(layer)
        return call(x) + ops.apply(layer, d, self.weight(W) - W)


def _changed(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`W + W * (B A)`, rounded once."""
    return torch.addcmul(W, W, B @ A)


class HiRAFunction(torch.autograd.Function):
    """`y = (W * (1 + B A)) x + b` as one node, or the change `(W * B A) x` alone.

    It keeps `x` and the factors and computes the product again: autograd would keep the changed weight of every layer
    for the gradient of `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: nn.Module, ops: LayerOps, whole: bool) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer, ctx.ops, ctx.whole = layer, ops, whole
        W, b = ops.matrix(layer).to(x.dtype), ops.bias(layer) if whole else None
        V = HiRAFunction.weight(W, A.to(x.dtype), B.to(x.dtype), whole)
        return F.linear(x, V, None if b is None else b.to(x.dtype))

    @staticmethod
    def weight(W: Tensor, A: Tensor, B: Tensor, whole: bool) -> Tensor:
        """What `x` is multiplied by."""
        return _changed(W, A, B) if whole else W * (B @ A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        dy, W = grads[0], ctx.ops.matrix(ctx.layer).to(x.dtype)
        a, b = A.to(x.dtype), B.to(x.dtype)
        dx = dy @ HiRAFunction.weight(W, a, b, ctx.whole) if ctx.needs_input_grad[0] else None
        dM = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        dM *= W
        return dx, (b.t() @ dM).to(A.dtype), (dM @ a.t()).to(B.dtype), None, None, None
