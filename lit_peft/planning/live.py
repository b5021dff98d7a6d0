"""How many bytes live at any moment of a step that runs on fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""Bytes that the caching allocator rounds a tensor up to."""


def allocated(nbytes: int) -> int:
    """Bytes that the CUDA caching allocator takes for a tensor of so many."""
    return -(-nbytes // BLOCK) * BLOCK


class LiveBytes(TorchDispatchMode):
    """Counts storages as they are made and freed, and keeps the most that there was.

    Tensors on the meta device are not counted: what a step makes there stands for memory of the host. Besides what
    operators return, the scratch memory of those in `SCRATCH` counts while they run.

    Attributes:
        now: Bytes that live.
        peak: The most that lived since the start or the last `restart`.
        gradients: Bytes of the gradients that live, as far as `follow_gradients` knows their parameters.
        peak_rest: The most that lived beside gradients and what was there at the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = self.gradients = self.peak_rest = self._start = 0

    def restart(self) -> None:
        """Takes what lives now for what is there at the start."""
        self._start = self.peak = self.now
        self.peak_rest = 0

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors that were made elsewhere; returns the bytes of those that did not count yet."""
        before = self.now
        for tensor in tensors:
            self._add(tensor)
        return self.now - before

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Tells gradients, as they arrive, from activations."""
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: Tensor) -> None:
        if p.grad is not None:
            self.gradients += allocated(p.grad.untyped_storage().nbytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        scratch = SCRATCH.get(func._schema.name)
        if scratch is not None:
            self._reach(self.now + scratch(*args))
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = allocated(storage.nbytes())
            self.now += self._sizes[key]
            weakref.finalize(storage, self._drop, key)
            self._reach(self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _reach(self, total: int) -> None:
        self.peak = max(self.peak, total)
        self.peak_rest = max(self.peak_rest, total - self._start - self.gradients)


# ------------------------------------------------------------------------------------------------------- scratch


def _dense_4bit(x: Tensor, codes: Tensor, shape: Any, absmax: Tensor, block: int, *_: Any) -> int:
    """The product with a 4-bit weight, for which bitsandbytes makes the dense one unless there are few rows."""
    n = shape[0] * shape[1]
    return allocated(n * x.element_size()) + 2 * allocated(4 * -(-n // block))


def _int32_product(x: Tensor, codes: Tensor, *_: Any) -> int:
    """The product of int8 matrices, before it is scaled."""
    return allocated(4 * x.numel() // x.shape[-1] * codes.shape[0])


def _int32_product_mixed(x: Tensor, rows: Tensor, codes: Tensor, *_: Any) -> int:
    return _int32_product(rows, codes)


def _attention_backward(dy: Tensor, q: Tensor, k: Tensor, *_: Any) -> int:
    """Fused attention sums the gradient of the queries in float32; that of keys that heads share, for each of them."""
    shared = 2 * q.numel() * q.element_size() if q.shape[1] != k.shape[1] else 0
    return allocated(4 * q.numel()) + allocated(4 * q.numel() // q.shape[-1]) + shared


SCRATCH: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": _dense_4bit,
    "bitsandbytes::int8_scaled_mm": _int32_product,
    "bitsandbytes::int8_mixed_scaled_mm": _int32_product_mixed,
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
}
"""Operator -> bytes that it takes on a GPU while it runs; its fake kernel shows what it returns alone."""
