"""LightningModules that build a transformers model, train it and score it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.tasks.text_classification import TextClassification

__all__ = ["TextClassification"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lit_peft.tasks.text_classification"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
