"""Passing what one layer reads on to the addition of another one, where no single module sees both."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call


class InputReader(Addition):
    """Changes nothing at its layer, and passes on what the layer is called with.

    At a feed-forward network's up projection that is the input of the network, which is not a module of its own in all
    blocks: BERT's is spread over two, `nn.TransformerEncoderLayer` has none.
    """

    not_mergeable = "it passes an input on to another layer's adapter."

    def __init__(self, passed: "PassedInput") -> None:
        super().__init__()
        self.passed = passed

    def describe(self) -> dict[str, Any]:
        return {"read for": self.passed.reader}

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        self.passed.put(x)
        return call(x)


class PassedInput:
    """What one layer was called with, held until another one takes it, within a forward pass of one thread."""

    def __init__(self, reader: str) -> None:
        self.reader = reader
        self._held: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "_held": {}}  # a forward pass is neither copied nor pickled

    def put(self, x: Tensor) -> None:
        self._held[_thread()] = x

    def take(self) -> Tensor:
        x = self._held.pop(_thread(), None)
        if x is None:
            raise RuntimeError(f"{self.reader} ran without the up projection before it, whose input its adapter reads.")
        return x


def _thread() -> int:
    # In a compiled graph both ends are inlined, and nothing is held between calls.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
