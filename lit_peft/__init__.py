"""Parameter-efficient fine-tuning, native to PyTorch Lightning.

    trainer = L.Trainer(callbacks=[LoRA(r=16, target_modules=["q_lin", "v_lin"])])
    trainer.fit(any_lightning_module, datamodule)

Importing this package imports nothing else: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.core.active import running, set_active
    from lit_peft.core.addition import Addition, Delta
    from lit_peft.core.attach import detach
    from lit_peft.core.merge import merge, unmerge
    from lit_peft.methods.adalora import AdaLoRA
    from lit_peft.methods.base import Method, TargetedMethod
    from lit_peft.methods.bitfit import BitFit
    from lit_peft.methods.bottleneck_adapter import BottleneckAdapter
    from lit_peft.methods.combine import combine
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
    from lit_peft.saving.adapter_folder import AdapterFolder
    from lit_peft.saving.folder import attach, load, save
    from lit_peft.training.rates import param_groups

__version__ = "0.1.0"

_HOME = {
    "Addition": "core.addition",
    "Delta": "core.addition",
    "AdapterFolder": "saving.adapter_folder",
    "attach": "saving.folder",
    "combine": "methods.combine",
    "detach": "core.attach",
    "running": "core.active",
    "set_active": "core.active",
    "load": "saving.folder",
    "merge": "core.merge",
    "param_groups": "training.rates",
    "save": "saving.folder",
    "unmerge": "core.merge",
}

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdapterFolder",
    "Addition",
    "BitFit",
    "BottleneckAdapter",
    "Delta",
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
    "attach",
    "combine",
    "detach",
    "load",
    "merge",
    "param_groups",
    "running",
    "save",
    "set_active",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"lit_peft.{_HOME.get(name, 'methods')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
