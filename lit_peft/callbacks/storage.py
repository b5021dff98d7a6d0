"""What a run says of a quantised base: its layers and bytes, what was left alone, and parameters by logical shape."""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lit_peft.core.layers import layer_ops
from lit_peft.core.memory import Growth
from lit_peft.core.plain import float_dtype
from lit_peft.core.quantize import stored_as
from lit_peft.training.seam import BUILT_IN


def logical_numel(module: nn.Module) -> dict[str, int]:
    """Name -> number of entries of the weight of each quantised layer; the packed tensor itself has fewer."""
    layers = {path: module.get_submodule(path) for path in stored_as(module)}
    return {f"{path}.weight".lstrip("."): math.prod(layer_ops(layer).size(layer)) for path, layer in layers.items()}


def storage_lines(module: nn.Module, left_alone: Mapping[str, str]) -> list[str]:
    """A line on what the quantised layers of a base take, and one on those that were left alone; none where none is.

    Args:
        module: The module.
        left_alone: Path -> reason, as far as it is known.
    """
    kinds = stored_as(module)
    if not kinds:
        return []
    entries, dtype, sizes = logical_numel(module), float_dtype(module) or torch.get_default_dtype(), dict[str, int]()
    for path in kinds:
        layer = module.get_submodule(path)
        sizes[path] = sum(t.numel() * t.element_size() for t in layer_ops(layer).stored(layer))
    lines = []
    for kind in dict.fromkeys(kinds.values()):
        paths = [path for path, found in kinds.items() if found == kind]
        dense = sum(entries[f"{path}.weight".lstrip(".")] for path in paths) * dtype.itemsize
        now, layers = sum(sizes[path] for path in paths), "layers" if paths[1:] else "layer"
        name = str(dtype).removeprefix("torch.")
        lines.append(f"Base: {len(paths)} {layers} in {kind}, {_mib(now)} instead of {_mib(dense)} in {name}.")
    if left_alone:
        lines.append(f"Left alone: {'; '.join(_by_reason(left_alone))}.")
    built: Growth = module.__dict__.get(BUILT_IN, Growth())
    took = {"host memory": built.host, "GPU memory": built.device}
    if known := [f"{_mib(size)} of {what}" for what, size in took.items() if size is not None]:
        lines.append(f"Loading took up to {' and '.join(known)}.")
    return lines


def _by_reason(left_alone: Mapping[str, str]) -> Iterator[str]:
    """Paths and their reason, numbers of blocks folded and those of one reason together: "lm_head (it is …)"."""
    reasons: dict[str, dict[str, int]] = {}
    for path, why in left_alone.items():
        folded = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        names = reasons.setdefault(why, {})
        names[folded] = names.get(folded, 0) + 1
    for why, names in reasons.items():
        yield f"{', '.join(f'{name} x{n}' if n > 1 else name for name, n in names.items())} ({why})"


def _mib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
