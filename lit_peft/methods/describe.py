"""What `lit-peft methods NAME` prints of one method: its docstring, its arguments, and what it trains."""

import inspect
import re
import textwrap
from typing import Any

import torch
from docstring_parser import parse
from torch import nn

from lit_peft.methods.base import Method


def describe(cls: type[Method]) -> str:
    """Summary, equation and paper; arguments with their defaults; what a task takes; share of DistilBERT; merging."""
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Method) and base.__doc__:
            documented |= {p.arg_name: p.description or "" for p in parse(inspect.cleandoc(base.__doc__)).params}
    head = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:")[0].strip()
    lines = [f"{cls.__name__}: {head}", "", "Arguments:"]
    for name, parameter in cls.parameters().items():
        default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        text = re.sub(r"\s+", " ", documented.get(name, "")).strip()
        line = f"  {name} ({default}){': ' * bool(text)}{text}"
        lines.append(textwrap.fill(line, 100, subsequent_indent="      "))
    lines += ["", f"Learning rate: {cls.learning_rate:g}", f"Optimizer: {cls.optimizer}"]
    return "\n".join([*lines, *_on_distilbert(cls)])


def why_not_mergeable(cls: type[Method]) -> str | None:
    """Why what a method adds to DistilBERT cannot be folded into weights; None where it can, or it cannot be added."""
    model, head = distilbert()
    make: Any = cls
    try:
        method: Method = make(train_also=head, **_unquantised(cls))
        method.attach(model)
    except (TypeError, ValueError):
        return None
    return next((a.not_mergeable for a in method.additions(model).values() if a.not_mergeable is not None), None)


def _on_distilbert(cls: type[Method]) -> list[str]:
    """What it trains of DistilBERT's shape, beside a head for two classes, and whether it merges."""
    model, head = distilbert()
    make: Any = cls
    try:
        method: Method = make(train_also=head, **_unquantised(cls))
        adapter = method.attach(model)
    except (TypeError, ValueError) as error:
        return [f"On DistilBERT's shape: {error}"]
    trains = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in adapter.head)
    total = sum(p.numel() for p in model.parameters())
    nothing = None if adapter.sites else "there is nothing to merge, it trains the base itself."
    return [
        f"On DistilBERT's shape: {trains:,} of {total:,} parameters train ({trains / total:.2%}), beside a new head.",
        f"Merges into the weights: {nothing or why_not_mergeable(cls) or 'yes'}",
    ]


def _unquantised(cls: type[Method]) -> dict[str, None]:
    """What keeps a method from quantising a model that has no values; the numbers are the same."""
    return {"quantize": None} if "quantize" in cls.parameters() else {}


def distilbert() -> tuple[nn.Module, list[str]]:
    """A DistilBERT classifier without memory behind its parameters, and the modules of its head."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    with torch.device("meta"):
        return DistilBertForSequenceClassification(DistilBertConfig()), ["pre_classifier", "classifier"]
