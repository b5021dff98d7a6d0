"""LightningModules that build a transformers model, train it and score it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.tasks.causal_language_modeling import CausalLanguageModeling
    from lit_peft.tasks.masked_language_modeling import MaskedLanguageModeling
    from lit_peft.tasks.text_classification import TextClassification

_HOME = {
    "CausalLanguageModeling": "causal_language_modeling",
    "MaskedLanguageModeling": "masked_language_modeling",
    "TextClassification": "text_classification",
}
__all__ = ["CausalLanguageModeling", "MaskedLanguageModeling", "TextClassification"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"lit_peft.tasks.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
