"""Every method that merges passes the suite on a base in 4 and in 8 bit too, three architectures each.

Made from the classes of test_conformance.py, and no rows of docs/conformance.md, which has every method once.
"""

from typing import Any

import pytest
import test_conformance

from lit_peft import QLoRA
from lit_peft.core.quantize import stored_as
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.describe import why_not_mergeable
from lit_peft.methods.registry import available
from lit_peft.testing import MODELS, MethodConformance

BASES: dict[str, dict[str, Any]] = {
    # Computing in float32, so that equal is equal; stored in it, so that the codes are sharded with the rest.
    "nf4": {"mode": "nf4", "compute_dtype": "float32", "storage_dtype": "float32"},
    "int8": {"mode": "int8"},
}
FAST = "TestLoRAOnInt8"
"""The one that the fast tests include."""


def on(base: str, suite: type[MethodConformance]) -> type[MethodConformance]:
    """The suite of a method on such a base."""
    method: Any = suite.method
    changes = {
        "method": type(method)(**method.arguments() | {"quantize": BASES[base]}),
        "layers": ("linear", "conv1d"),  # which it quantises; those that are quantised already: test_conformance.py
        "models": ("distilbert", "gpt2", "llama"),
        "__module__": __name__,
    }
    name = f"{suite.__name__}On{base.title()}"
    made = type(name, (suite,), changes)
    return made if name == FAST else pytest.mark.slow(made)


def merges(suite: Any) -> bool:
    """Whether it is of a method that changes weights, and whose base is not quantised as it is."""
    method: Any = getattr(suite, "method", None)
    return isinstance(method, TargetedMethod) and method.quantize is None and why_not_mergeable(type(method)) is None


SUITES = [on(base, suite) for suite in vars(test_conformance).values() if merges(suite) for base in BASES]
globals().update({suite.__name__: suite for suite in SUITES})


def test_every_method_that_merges_is_among_them():
    own = [entry.load() for entry in available().values() if entry.package == "lit-peft"]
    expected = {cls for cls in own if issubclass(cls, TargetedMethod) and why_not_mergeable(cls) is None}
    assert {type(suite.method) for suite in SUITES} == expected - {QLoRA}  # in test_conformance.py, on NF4


def test_their_bases_are_quantised():
    for suite in SUITES:
        assert all(stored_as(suite().base(MODELS[name])) for name in suite.models)
