"""Which data module a trainer reads."""

from typing import Any


def current_data_module(trainer: Any) -> Any:
    """The data module of the call that runs, or ran last; None where that was given loaders, or the module has its own.

    `trainer.datamodule` would then still be that of an earlier call.

    Args:
        trainer: A trainer of `lightning` or `pytorch_lightning`.
    """
    hooks = trainer._data_connector._datahook_selector
    return None if hooks is None else hooks.datamodule
