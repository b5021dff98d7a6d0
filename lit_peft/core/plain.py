"""What makes a quantised module a plain one of floats, beside its layers: a dtype, and no marks of transformers."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from lit_peft.core.quantize import stored_as
from lit_peft.core.swap import CastsParameters

_OF_MODEL = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
_OF_CONFIG = ("quantization_config", "_is_quantized")
"""What transformers leaves on a model that it loaded in fewer bits, and on its configuration."""

Marks = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Path of a model -> what was on it, and on its configuration."""


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of most of what is not quantised in a base; None where nothing else is there.

    Of a layer that trains in another dtype than it computes in, the latter.
    """
    quantised, counts = stored_as(module), Counter[torch.dtype]()
    for path, child in module.named_modules():
        if ".peft." in f".{path}.":
            continue
        for name, p in child._parameters.items():
            if p is not None and p.is_floating_point() and not (name == "weight" and path in quantised):
                counts[child.base_dtype if isinstance(child, CastsParameters) else p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else None


def take_marks(module: nn.Module) -> Marks:
    """Takes off what says that transformers models are quantised: they can then be cast, and saved, as others can."""
    marks: Marks = {}
    for path, child in module.named_modules():
        config = getattr(child, "config", None)
        found = (_take(child, _OF_MODEL), _take(config, _OF_CONFIG))
        if any(found):
            marks[path] = found
    return marks


def give_marks(module: nn.Module, marks: Marks) -> None:
    """Undoes `take_marks`."""
    for path, (of_model, of_config) in marks.items():
        child: Any = module.get_submodule(path)
        child.__dict__.update(of_model)
        if of_config:
            child.config.__dict__.update(of_config)


def _take(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    own = getattr(owner, "__dict__", {})
    return {name: own.pop(name) for name in names if name in own}
