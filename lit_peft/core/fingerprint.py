"""What tells one base model from another of the same shape."""

import hashlib

import torch
from torch import Tensor, nn

from lit_peft.core.buffers import base_buffers

_SAMPLES = 64


def fingerprint(module: nn.Module) -> dict[str, str]:
    """A digest of every parameter and saved floating buffer: name -> "shape:hash of 64 values spread over it".

    Values are rounded to bfloat16 first, so that a base gives the same digests whether it was loaded in
    float32 or bfloat16. Of buffers, running statistics for instance, those of integers are left out: counters and
    positions do not tell a base. Take it before quantising and sharding; tensors on the meta device have no values
    and are left out. Cost: one small gather a tensor.
    """
    buffers = ((name, b) for name, b in base_buffers(module).items() if b.is_floating_point())
    return {name: _digest(tensor) for name, tensor in (*module.named_parameters(), *buffers) if not tensor.is_meta}


def _digest(tensor: Tensor) -> str:
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
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape}:{hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:16]}"


def compare_fingerprints(saved: dict[str, str], found: dict[str, str]) -> str | None:
    """One sentence on how two bases differ, or None where they are the same.

    Args:
        saved: Digests kept in a checkpoint.
        found: Digests of the module it is about to be loaded into; further tensors in it do not matter.
    """
    missing = [name for name in saved if name not in found]
    if missing:
        return f"the base has no {missing[0]}" + (f" (nor {len(missing) - 1} more)" if missing[1:] else "")
    different = [name for name in saved if saved[name] != found[name]]
    if not different:
        return None
    name = different[0]
    old_shape, new_shape = (digests[name].partition(":")[0] for digests in (saved, found))
    what = f"has shape {new_shape}, not {old_shape}" if old_shape != new_shape else "holds other values"
    return f"{name} {what}" + (f", and {len(different) - 1} more of {len(saved)} differ" if different[1:] else "")
