"""What tells one base model from another of the same shape."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_peft.core.buffers import base_buffers
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import stored_as

_SAMPLES = 64
_FEW = 1 / 2
"""Share of a sample of codes that may differ: of fp4's 2 % do on another kind of device; where the base was quantised
from bfloat16, 1 % of 4-bit and 16 % of 8-bit ones; of another base's nearly all."""
_SCALED = 0.05
"""Share by which the mean scale of a quantised weight may differ. Rounding, as to bfloat16, changes a scale by at most
.4 %, torchao's, which is bfloat16 itself then, by .8 %, and their mean by less."""


def fingerprint(module: nn.Module) -> dict[str, str]:
    """A digest of every parameter and saved floating buffer: name -> "shape:hash of 64 values spread over it".

    Values are rounded to bfloat16 first, so that a base gives the same digests whether it was loaded in
    float32 or bfloat16. Of a quantised weight it is 64 bytes of the codes themselves and the mean magnitude of their
    scales, after what they are, "64x64:nf4 in blocks of 64:bytes*0.0213", since devices, and bfloat16, give another
    code now and then. Of buffers, running statistics for instance, those of integers are left out: counters and
    positions do not tell a base. Take it before sharding; tensors on the meta device have no values and are left out.
    Cost: one small gather a tensor, and a mean of the scales of each quantised one.
    """
    buffers = ((name, b) for name, b in base_buffers(module).items() if b.is_floating_point())
    tensors = {name: tensor for name, tensor in (*module.named_parameters(), *buffers) if not tensor.is_meta}
    quantised = {f"{path}.weight".lstrip("."): kind for path, kind in stored_as(module).items()}
    digests = {}
    for name, tensor in tensors.items():
        if name in quantised:
            layer = module.get_submodule(name.rpartition(".")[0])
            ops = layer_ops(layer)
            scales = ops.scales(layer)
            scale = "" if scales is None else f"*{scales.detach().float().abs().mean().item():.4g}"
            digests[name] = f"{_shape(ops.size(layer))}:{quantised[name]}:{_sample(ops.codes(layer)).hex()}{scale}"
        else:
            digests[name] = f"{_shape(tensor.shape)}:{_hash(_sample(tensor))}"
    return digests


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def _hash(sample: bytes) -> str:
    return hashlib.sha256(sample).hexdigest()[:16]


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    # Evenly spread, by integer arithmetic alone: the same elements on every device.
    index = (
        torch.arange(min(_SAMPLES, flat.numel()), device=flat.device)
        * flat.numel()
        // max(1, min(_SAMPLES, flat.numel()))
    )
    values = flat[index]
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return values.cpu().numpy().tobytes()


def compare_fingerprints(
    saved: Mapping[str, str], found: Mapping[str, str], *, any_storage: bool = False
) -> str | None:
    """One sentence on how two bases differ, or None where they are the same.

    Args:
        saved: Digests kept in a checkpoint.
        found: Digests of the module it is about to be loaded into; further tensors in it do not matter.
        any_storage: Whether weights may be quantised in the one and not, or otherwise, in the other: there is then
            nothing in their digests to compare but shapes, and the tensors that are stored alike tell the base.
    """
    missing = [name for name in saved if name not in found]
    if missing:
        return f"the base has no {missing[0]}" + (f" (nor {len(missing) - 1} more)" if missing[1:] else "")
    old, new = ({name: _parts(digests[name]) for name in saved} for digests in (saved, found))
    different = [name for name in saved if not _alike(old[name], new[name])]
    if any_storage:
        different = [n for n in different if old[n].storage == new[n].storage or not _same_size(old[n], new[n])]
    if not different:
        return None
    name = different[0]
    before, now = old[name], new[name]
    if not _same_size(before, now):
        what = f"has shape {now.shape}, not {before.shape}"
    elif before.storage != now.storage:
        what = f"is {_told(now.storage)} here, and {_told(before.storage)} there"
    else:
        what = "holds other values"
    return f"{name} {what}" + (f", and {len(different) - 1} more of {len(saved)} differ" if different[1:] else "")


def other_storage(saved: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """One sentence on how the weights of one base are stored otherwise than those of another; None: they are not."""
    pairs = {name: (_parts(saved[name]).storage, _parts(found[name]).storage) for name in saved if name in found}
    other = [name for name, (before, now) in pairs.items() if before != now]
    if not other:
        return None
    before, now = pairs[other[0]]
    more = f" and {len(other) - 1} more are" if other[1:] else " is"
    return f"{other[0]}{more} {_told(now)} here, and {_told(before)} in training"


class _Parts(NamedTuple):
    shape: str
    storage: str
    """What it is quantised to; "" where it is not."""
    value: str
    """The hash or, of a quantised one, the sample."""
    scale: str
    """Of a quantised one; "" where none is known, as in records of before it was taken."""


def _parts(digest: str) -> _Parts:
    shape, _, rest = digest.partition(":")
    storage, _, value = rest.rpartition(":")
    value, _, scale = value.partition("*")
    return _Parts(shape, storage, value, scale)


def _alike(old: _Parts, new: _Parts) -> bool:
    if old == new or old[:2] != new[:2] or not old.storage:
        return old == new
    a, b = old.value, new.value
    pairs = [a[i : i + 2] != b[i : i + 2] for i in range(0, max(len(a), len(b)), 2)]
    return sum(pairs) <= _FEW * len(pairs) and _as_large(old.scale, new.scale)


def _as_large(old: str, new: str) -> bool:
    try:
        return not (old and new) or old == new or math.isclose(float(old), float(new), rel_tol=_SCALED)
    except ValueError:  # of a checkpoint whose record was edited
        return False


def _same_size(one: _Parts, other: _Parts) -> bool:
    """Whether weights are of one shape; GPT-2's Conv1D holds the transpose of what a quantised layer does."""
    if one.storage == other.storage:
        return one.shape == other.shape
    return sorted(one.shape.split("x")) == sorted(other.shape.split("x"))


def _told(storage: str) -> str:
    return f"quantised ({storage})" if storage else "not quantised"
