"""DoRA: LoRA for the directions of a weight's rows, and a trained length for each."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_peft.core.addition import Call
from lit_peft.core.kernels import row_norms, scale, scale_backward, scale_features, wide_norms
from lit_peft.core.layers import layer_ops
from lit_peft.core.products import add_matmul
from lit_peft.core.targets import Site
from lit_peft.methods.lora import LoRA, LoRADelta, LoRAFunction


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: `W' = m V / |V|` with `V = W + s B A` and `|V|` the norm of each row.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.1. `m`: [out] starts as the norms of
    `W`, so that training starts from the base. As in section 4.3 the norm is a constant to the gradient. Trains
    `r (in + out) + out` parameters a layer. Often better than LoRA at small ranks, for a slower step.

    The norm is had without a matrix of W's size,

        |V|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

    of which the first two terms read the weight once a step. Of a convolution a row is one kernel, of an embedding
    one feature over the vocabulary.

    Args:
        **lora: As for LoRA. Dropout acts on the low-rank path alone.
    """

    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "LORA", "use_dora": True}

    def delta(self, site: Site, r: int, alpha: float, scaling: float) -> "DoRADelta":
        return DoRADelta(*site.size, r, alpha, scaling, self.dropout, self.init)

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's LORA with use_dora; its embeddings keep a length for each token instead of each feature."""
        entries, tensors = super().to_hf_peft(sites)
        for site, delta in sites:
            m, ops = delta.lora_magnitude_vector, layer_ops(site.layer)
            if ops.looks_up:
                raise ValueError(f"{site.path}: HF PEFT's DoRA of an embedding has another equation.")
            tensors[f"{site.path}.lora_magnitude_vector"] = m if ops.is_linear else ops.along_features(m)[None]
        return entries, tensors


class DoRADelta(LoRADelta):
    """`m V / |V|`, `V` what is below with `s B A` added; `lora_magnitude_vector`: [out]."""

    scales = True
    fused_from = 1 << 20
    """A quarter of LoRA's: without the fused function the scale would be a node of its own."""

    def __init__(self, out_features: int, *args: Any) -> None:
        super().__init__(out_features, *args)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features))

    def init(self, site: Site, generator: torch.Generator) -> None:
        super().init(site, generator)
        self.lora_magnitude_vector.copy_(wide_norms(site.matrix()))

    def weight(self, W: Tensor) -> Tensor:
        V = super().weight(W)
        return self.ratio(torch.linalg.vector_norm(V.detach(), dim=1)).to(V.dtype)[:, None] * V

    def ratio(self, norm: Tensor) -> Tensor:
        """`m / |V|`, [out]; a row of zeros stays one."""
        return self.lora_magnitude_vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        if self.fuses(call):
            return DoRAFunction.apply(*self.node_inputs(layer, x), self.lora_magnitude_vector)
        ops = layer_ops(layer)
        z, b = super().forward(layer, call, x), call.bias()  # of which the bias is not scaled
        norm = row_norms(call.matrix(), self.lora_A, self.lora_B, self.scaling)
        if ops.is_linear:
            return scale_features(z, self.lora_magnitude_vector, norm, b)
        ratio = self.ratio(norm)
        y = z * ops.along_features(ratio.to(z.dtype))
        return y if b is None else y + ops.along_features((b * (1 - ratio)).to(z.dtype))


class DoRAFunction(torch.autograd.Function):
    """LoRA's function and what scales its output as one node, `y = m / |V| (W x + s B A d) + b`; keeps `z` as well."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dropped, A, B, fused, m = inputs  # what `LoRAFunction` takes, and `m`
        W, b = fused.ops.matrix(fused.layer), fused.ops.bias(fused.layer)
        z, (x_rows, z_rows), kept = LoRAFunction.change(ctx, x, dropped, A, B, fused)
        add_matmul(z_rows, x_rows, W.to(x.dtype).t())
        norm = row_norms(W, A, B, fused.s)
        ctx.save_for_backward(z, m, norm, b, *kept)
        return scale(z, m, norm, b)

    @staticmethod
    @once_differentiable  # the norm is a constant to it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, m, norm, b, *kept = ctx.saved_tensors
        dz, dm, _ = scale_backward(grads[0], z, m, norm, b)
        return *LoRAFunction.gradients(ctx, dz, *kept), None, dm.to(m.dtype)
