"""A run's plan beside those of other ways to train the same model on the same data."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lit_peft.class_path import imported
from lit_peft.methods.base import Method, TargetedMethod
from lit_peft.methods.full import FullFineTuning
from lit_peft.methods.lora import LoRA
from lit_peft.methods.qlora import QLoRA
from lit_peft.planning.plan import Plan, plan

STORAGES = (None, "int8", "nf4")


def label(method: Method, dtype: str) -> str:
    """Name of a method, and how its base is stored."""
    storage = method.base_storage()
    mode = dtype if storage is None else f"{storage['mode']}{'' if storage.get('double_quant', True) else ' single'}"
    r = getattr(method, "r", None)
    rank = f" r {r}" if isinstance(r, int) else ""
    return f"{type(method).__name__}{rank}, {mode}"


def alternatives(method: Method) -> Iterator[Method]:
    """Other ways to train what a method trains: its base stored otherwise, LoRA in its place, everything trained."""
    common = {key: value for key, value in method.arguments().items() if key in Method.parameters()}
    storage = method.base_storage()
    chosen = None if storage is None else storage["mode"]
    others = [mode for mode in STORAGES if mode != chosen]
    if isinstance(method, TargetedMethod):
        cls = LoRA if type(method) is QLoRA else type(method)
        for mode in others:
            yield cls(**method.arguments() | {"quantize": mode})
        if not isinstance(method, LoRA):
            sites = {key: value for key, value in method.arguments().items() if key in TargetedMethod.parameters()}
            yield LoRA(**sites)
    if not isinstance(method, FullFineTuning):
        yield FullFineTuning(**common | {"quantize": None, "train_also": []})
    else:
        for mode in STORAGES:
            yield LoRA(target_modules="all-linear", **common | {"quantize": mode})


def plans(
    model: nn.Module,
    method: Method,
    batch: Any,
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    others: bool = True,
    **options: Any,
) -> list[Plan]:
    """Plans of a method and, where asked for, of its `alternatives`; those that do not fit the model are left out.

    Args:
        model: See `lit_peft.planning.plan`.
        method: The method that was chosen; its plan comes first.
        batch: See there.
        optimizer: Called with what trains; null: what each method names, else AdamW.
        others: Whether to plan the alternatives.
        **options: As for `plan`.
    """
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    true = options.get("precision") == "bf16-true"
    dtype = str(torch.bfloat16 if true else max(set(floats), key=floats.count)).removeprefix("torch.")

    def of(one: Method) -> Plan:
        path = getattr(one, "optimizer", None)
        make = optimizer or (imported(path) if isinstance(path, str) and "." in path else None)
        return plan(model, one, batch, optimizer=make, name=label(one, dtype), **options)

    found = [of(method)]
    for other in alternatives(method) if others else ():
        try:
            found.append(of(other))
        except ValueError:
            continue  # a rank that its layers have not, nothing to quantise: it is no alternative here
    return found
