"""What a GPU would do, on fake tensors of a CPU.

Fake tensors could say that they are on a GPU, but autograd then wants a device guard, and attention the properties of a
device, which a build or a machine without one has not. So they say `cpu`, on every machine, and the few places where
torch, bitsandbytes or we do something else on a GPU are taken over here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_peft.core import kernels
from lit_peft.core.quantized import bitsandbytes
from lit_peft.planning.liger import HALVES, without_launches

_SDPA, _DROPOUT = F.scaled_dot_product_attention, F.dropout
_WIDE = (
    "layer_norm group_norm softmax log_softmax cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss "
    "kl_div binary_cross_entropy_with_logits cosine_similarity softplus exp log pow __pow__ rsqrt reciprocal cumsum "
    "prod sum norm logsumexp"
)
"""What autocast computes in float32 on a GPU, by name; on a CPU it leaves most of these as they come."""
_PACKED = "find_packed_sequence_indices"
"""What transformers calls to see by values whether rows hold several texts, and otherwise makes no mask."""


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Runs fake tensors of a CPU as a GPU would run them."""
    bnb = bitsandbytes()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(bnb, "matmul", _matmul_8bit))
        stack.enter_context(mock.patch.object(kernels, "STAND_IN", _KERNELS))
        if (masks := sys.modules.get("transformers.masking_utils")) and hasattr(masks, _PACKED):
            stack.enter_context(mock.patch.object(masks, _PACKED, lambda *args, **kwargs: None))
        if offload := getattr(sys.modules.get("lit_peft.training.checkpointing"), "Offload", None):
            stack.enter_context(mock.patch.object(offload, "__call__", _offloaded))
        for home, name, function in without_launches():
            stack.enter_context(mock.patch.object(home, name, function))
        for (home, name), function in _taken().items():
            stack.enter_context(mock.patch.object(home, name, function))
        yield


# ------------------------------------------------------------------------------------------------------ attention


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that a GPU chooses.

    Flash attention in half precision without a mask, memory-efficient attention with one or in float32, and the plain
    formula, which makes all scores, where heads share keys and flash attention cannot serve them.
    """
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        q, k, v = q.to(half), k.to(half), v.to(half)
    aten, shared = torch.ops.aten, q.dim() == 4 and q.shape[1] != k.shape[1]
    if q.dim() != 4 or q.shape[-1] != v.shape[-1]:
        return _SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is None and q.dtype in HALVES and q.shape[-1] <= 256:
        width = q.shape[-1]
        if over := width % 8:
            q, k, v = (F.pad(t, (0, 8 - over)) for t in (q, k, v))
            scale = width**-0.5 if scale is None else scale
        y = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return y[..., :width]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    if shared:
        return aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, trains, dropout_p, is_causal, scale=scale)[
        0
    ]


# -------------------------------------------------------------------------------------------------- other functions


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of one byte an element; a CPU keeps one in the dtype of `x`."""
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(x, p, True)[0]
    return _DROPOUT(x, p, training, inplace)


def _wide(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that autocast computes in float32."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) and a.dtype in HALVES else a for a in args)
            kwargs = {k: a.float() if isinstance(a, Tensor) and a.dtype in HALVES else a for k, a in kwargs.items()}
        return func(*args, **kwargs)

    return widened


def _taken() -> dict[tuple[Any, str], Callable[..., Any]]:
    """(Where a function of torch is, its name) -> what is called in its place; modes do not act in backward passes."""
    wide = {
        (home, name): function
        for name in _WIDE.split()
        for home in (torch, F, Tensor)
        if (function := getattr(home, name, None)) is not None
    }
    return {place: _wide(function) for place, function in wide.items()} | {
        (F, "scaled_dot_product_attention"): _attention,
        (F, "dropout"): _dropout,
        (torch, "dropout"): _dropout,
    }


def _offloaded(self: Any, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoints a block whose input waits on the host: on the meta device, where nothing is counted."""
    place = args[0].untyped_storage()._cdata if args else None

    def put(x: Tensor) -> Tensor:
        return x.to("meta") if x.untyped_storage()._cdata == place and x.requires_grad else x

    def get(x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu") if x.device.type == "meta" else x

    with torch.autograd.graph.saved_tensors_hooks(put, get):
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


def _matmul_8bit(
    A: Tensor, B: Tensor, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
) -> Any:
    """`bitsandbytes.matmul` as on a GPU, in int8; which columns hold outliers the values alone would tell."""
    state.threshold = 0.0
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(A, B, out, bias, state)


# ---------------------------------------------------------------------------------------------- our Triton kernels


def _scale(z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(z.contiguous())


def _scale_backward(
    dy: Tensor, z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        torch.empty_like(z.contiguous()),
        v.new_empty(v.shape, dtype=torch.float32),
        None if bias is None else bias.float(),
    )


def _row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return W.new_empty(W.shape[0], dtype=torch.float32)


def _dense_4bit(codes: Tensor, state: Any, dtype: torch.dtype, columns: slice) -> Tensor:
    out, n = state.shape
    return codes.new_empty((out, len(range(n)[columns])), dtype=dtype)


_KERNELS = SimpleNamespace(scale=_scale, scale_backward=_scale_backward, row_norms=_row_norms, dense_4bit=_dense_4bit)
"""What they return, from what they are given: see `lit_peft.core.triton_kernels`."""
