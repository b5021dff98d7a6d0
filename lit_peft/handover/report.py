"""What a merge leaves beside the model: its report."""

import hashlib
import json
import math
from collections import Counter
from typing import Any

from torch import nn

from lit_peft import __version__
from lit_peft.core.hf_peft import Root
from lit_peft.core.merge import Into
from lit_peft.core.quantize import stored_as
from lit_peft.core.registry import registry
from lit_peft.saving.merged import left_out

REPORT = "merge_report.json"


def report_of(module: nn.Module, root: Root, into: Into | None = None) -> dict[str, Any]:
    """What a report says of a module, as it was trained, that is about to be merged."""
    state = registry(module)
    assert state is not None
    additions: dict[str, Any] = {path: module.get_submodule(path).peft for path in state.paths()}
    layers = [path for path, here in additions.items() if here.chain()]
    bases = (getattr(module, "backbone", None), getattr(root.model.config, "_name_or_path", None))
    digest = hashlib.sha256(json.dumps(sorted(state.fingerprint.items())).encode()).hexdigest()[:32]
    return {
        "lit_peft": __version__,
        "base": next((base for base in bases if isinstance(base, str) and base), None),
        "base_fingerprint": digest,
        "architecture": type(root.model).__name__,
        "methods": {name: adapter.spec for name, adapter in state.adapters.items()},
        "into": into,
        "base_quantization": dict(Counter(stored_as(module).values())) or None,
        "folded": {"count": len(layers), "layers": layers},
        "trained_as_they_are": sorted({name for adapter in state.adapters.values() for name in adapter.base}),
        "left_out": left_out(module, root),
    }


def finite(value: Any) -> Any:
    """For JSON, which has no nan: null in its place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
