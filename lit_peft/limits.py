"""Settings whose type lets a value pass that nothing can work with; refused by name before anything is built."""

import inspect
import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from lit_peft.methods.base import Method
from lit_peft.methods.checks import check_positive, check_range
from lit_peft.training.seam import NO_PLUGIN

PLUGIN_REFUSED = f"trainer.plugins: {NO_PLUGIN}"
LEAST = {
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 0,
    "early_stopping.patience": 0,
}


def check_settings(config: Mapping[str, Any]) -> None:
    """Checks the sections of a verb that are no classes of ours: these check their arguments themselves.

    Args:
        config: Its configuration, `config["trainer"]["max_epochs"]`.

    Raises:
        ValueError: For the first setting that is out of its range.
    """

    def given(key: str) -> Any:
        section, _, name = key.partition(".")
        return (config.get(section) or {}).get(name)

    for key, least in LEAST.items():
        if (value := given(key)) is not None and not isinstance(value, bool):
            check_range(key, value, least)
    if isinstance(interval := given("trainer.val_check_interval"), int | float):
        check_positive("trainer.val_check_interval", interval)
    if names_plugin(given("trainer.plugins")):
        raise ValueError(PLUGIN_REFUSED)  # before it is built, which asks for a GPU
    if given("trainer.default_root_dir") is None:
        raise ValueError("trainer.default_root_dir is null, expected a folder.")


def names_plugin(plugins: Any) -> bool:
    """Whether the plugin that is refused is among those that are given, in whatever form: a name, a class, a list."""
    return re.search(r"\bBitsandbytesPrecision\b", str(plugins)) is not None


def check_nulls(section: str, cls: type, arguments: Mapping[str, Any]) -> None:
    """Refuses null for an argument that has another default and no type that admits it; the parser lets it pass.

    Args:
        section: What the class stands under, "method".
        cls: The class.
        arguments: Those that it is to be built with.

    Raises:
        ValueError: For the first such argument.
    """
    parameters = cls.parameters() if issubclass(cls, Method) else inspect.signature(cls).parameters
    for name, value in arguments.items():
        if value is not None or name not in parameters:
            continue
        default, kind = parameters[name].default, parameters[name].annotation
        union = get_origin(kind) in (Union, types.UnionType)
        admits = type(None) in get_args(kind) if union else not isinstance(kind, type)
        if default not in (None, inspect.Parameter.empty) and not admits:
            raise ValueError(f"{section}.{name} is null, expected a value such as {default}.")
