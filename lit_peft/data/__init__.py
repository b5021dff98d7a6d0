"""LightningDataModules. Imported on first use, because `datasets` and Lightning take seconds to import."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.data.imdb import IMDBDataModule
    from lit_peft.data.language_modeling import LanguageModelingDataModule
    from lit_peft.data.sst2 import SST2DataModule
    from lit_peft.data.text_classification import TextClassificationDataModule
    from lit_peft.data.wikitext2 import WikiText2DataModule

__all__ = [
    "IMDBDataModule",
    "LanguageModelingDataModule",
    "SST2DataModule",
    "TextClassificationDataModule",
    "WikiText2DataModule",
]

_HOMES = {
    "IMDBDataModule": "lit_peft.data.imdb",
    "LanguageModelingDataModule": "lit_peft.data.language_modeling",
    "SST2DataModule": "lit_peft.data.sst2",
    "TextClassificationDataModule": "lit_peft.data.text_classification",
    "WikiText2DataModule": "lit_peft.data.wikitext2",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
