"""The methods, one file each; `lit_peft.methods.registry` lists them together with those of other packages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.methods.adalora import AdaLoRA
    from lit_peft.methods.base import Method, TargetedMethod
    from lit_peft.methods.bitfit import BitFit
    from lit_peft.methods.bottleneck_adapter import BottleneckAdapter
    from lit_peft.methods.dora import DoRA
    from lit_peft.methods.full import FullFineTuning
    from lit_peft.methods.hira import HiRA
    from lit_peft.methods.ia3 import IA3
    from lit_peft.methods.linear_probe import LinearProbe
    from lit_peft.methods.lora import LoRA
    from lit_peft.methods.p_tuning import PTuning
    from lit_peft.methods.prefix_tuning import PrefixTuning
    from lit_peft.methods.prompt_tuning import PromptTuning
    from lit_peft.methods.qlora import QLoRA
    from lit_peft.methods.sparse_lora import SparseLoRA
    from lit_peft.methods.vera import VeRA

# Public name -> module; imported on first use, so that listing the methods needs neither torch nor Lightning.
BUILT_IN = {
    "LoRA": "lora",
    "QLoRA": "qlora",
    "DoRA": "dora",
    "HiRA": "hira",
    "SparseLoRA": "sparse_lora",
    "AdaLoRA": "adalora",
    "VeRA": "vera",
    "IA3": "ia3",
    "BottleneckAdapter": "bottleneck_adapter",
    "PrefixTuning": "prefix_tuning",
    "PromptTuning": "prompt_tuning",
    "PTuning": "p_tuning",
    "BitFit": "bitfit",
    "LinearProbe": "linear_probe",
    "FullFineTuning": "full",
}

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "BottleneckAdapter",
    "DoRA",
    "FullFineTuning",
    "HiRA",
    "LinearProbe",
    "LoRA",
    "Method",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "QLoRA",
    "SparseLoRA",
    "TargetedMethod",
    "VeRA",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{BUILT_IN.get(name, 'base')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
