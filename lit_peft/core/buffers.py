"""Buffers of the base: those that training moves by design, those that have moved in fact, and the way back."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_peft.core.dtypes import dequantises_itself
from lit_peft.core.sharded import sharded_like, whole
from lit_peft.core.swap import buffers_beside, with_running_statistics
from lit_peft.core.wrapped import parts

if TYPE_CHECKING:
    from lit_peft.core.registry import Adapter


def base_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that a state dict holds and that no addition brought; a shared one once.

    Sparse and quantised ones, which have no plain storage to be compared, are left alone.
    """
    found: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        if ".peft." in f".{path}.":
            continue
        for key, buffer in child._buffers.items():
            if buffer is not None and _is_plain(buffer) and key not in child._non_persistent_buffers_set:
                found[f"{path}.{key}".lstrip(".")] = buffer
    return found


def moving_buffers(module: nn.Module, adapters: Iterable["Adapter"]) -> set[str]:
    """Names of saved buffers that training moves under these adapters, and that belong to them therefore.

    Those beside a parameter that trains and, under `update_norm_stats`, those of all normalisation layers.
    """
    adapters = list(adapters)
    names = {name for adapter in adapters for name in adapter.base}
    if any(adapter.update_norm_stats for adapter in adapters):
        names.update(f"{path}.running_mean".lstrip(".") for path, _ in with_running_statistics(module))
    return buffers_beside(module, names)


def moved_buffers(module: nn.Module, originals: Mapping[str, Tensor]) -> set[str]:
    """Names of base buffers that hold other bits than their originals.

    One without an original was made on first use, and will be again. By content: an assignment, `.data` and a move to
    another device leave no trace that could be read instead. Each buffer comes to the host for it; where some are
    sharded, every rank calls.
    """
    moved = set()
    for name, original in originals.items():  # few, where a module with many adapters has modules by the thousand
        buffer = _buffer(module, name)
        if buffer is not None and not holds(buffer, original):
            moved.add(name)
    return moved


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    """The buffer of this name, if it is one that a state dict holds and that can be compared."""
    owner, _, key = name.rpartition(".")
    try:
        layer = module.get_submodule(owner)
    except AttributeError:
        return None
    buffer = layer._buffers.get(key)
    return buffer if key not in layer._non_persistent_buffers_set and _is_plain(buffer) else None


def _is_plain(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.layout is torch.strided and not buffer.is_quantized


@torch.no_grad()
def holds(tensor: Tensor, original: Tensor) -> bool:
    """Whether a tensor has the bits of another, cast to its dtype, wherever they lie; on the meta device it always has.

    A collective where one of them is sharded.
    """
    if tensor is original:
        return True
    if dequantises_itself(tensor):
        return type(tensor) is type(original) and all(map(holds, parts(tensor), parts(original)))
    buffer, original = whole(tensor.detach()), whole(original.detach())
    if buffer.is_meta:
        return True
    if original.shape != buffer.shape:
        return False
    pair = (t.cpu().resolve_conj().contiguous().reshape(-1) for t in (original.to(buffer.dtype), buffer))
    a, b = (tensor.view(torch.uint8) for tensor in pair)  # bits: a NaN equals itself
    return torch.equal(a, b)


def put_back(module: nn.Module, names: Iterable[str], originals: Mapping[str, Tensor]) -> None:
    """Gives these buffers their first values, where there is a copy of them; dtype and device stay as they are."""
    layers = dict(module.named_modules())
    for name in names:
        owner, _, key = name.rpartition(".")
        if name not in originals or owner not in layers:
            continue
        layer, first = layers[owner], originals[name]
        buffer = layer._buffers.get(key)
        if buffer is not None and buffer.shape == first.shape:
            if holds(buffer, first):
                continue  # an expanded one cannot be written to, either
            buffer.detach().copy_(sharded_like(first.to(buffer.device), buffer))
        else:  # another tensor took its place
            layer._buffers[key] = first.to(first.device if buffer is None else buffer.device, copy=True)
