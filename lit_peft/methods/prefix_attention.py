"""Attention over a prefix: keys and values that every query sees before those of the text.

transformers looks the function that computes attention up by name. While an attention module with a prefix runs, its
configuration names one of ours, which adds the prefix and hands over to the function that was set: nothing stays
changed, and `model.set_attn_implementation` goes on working. A cache holds the text alone.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_NAME = "lit_peft_prefix_"


class Prefix(Addition):
    """Keys and values of one attention module, however they are made."""

    reached = False
    """Whether the module has been seen to compute its attention through transformers' interface."""
    reads = False
    """Whether the next pass sets the prefix to the keys and values that it sees, instead of putting it before them."""

    def describe(self) -> dict[str, Any]:
        return {"n": len(self.pair()[0])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()  # another process has unpickled it

    def pair(self) -> tuple[Tensor, Tensor]:
        """The keys, [n, width of all keys of a token], and the values, likewise."""
        raise NotImplementedError

    def read(self, key: Tensor, value: Tensor) -> None:
        """Takes keys and values that the base has computed for a text of n tokens, [1, heads, n, width of a head]."""
        raise NotImplementedError

    def forward(self, layer: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
        config = layer.config
        if not isinstance(config, _Named):
            check_implementation(layer)
            layer.config = _Named(config)
        try:
            output = call(*args, **kwargs)
        finally:
            layer.config = config
        if not self.reached:
            raise not_reached(layer)
        return output


class _Named:
    """A configuration whose attention is ours, over the one that was set; everything else is the configuration's."""

    def __init__(self, config: Any) -> None:
        self.config, self._attn_implementation = config, _NAME + config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name)


@functools.cache
def register() -> None:
    """Makes our functions known to transformers, one for each implementation."""
    from transformers import AttentionInterface

    for name in IMPLEMENTATIONS:
        AttentionInterface.register(_NAME + name, functools.partial(attend, name))


def check_implementation(layer: Any) -> None:
    """Raises ValueError unless the attention is computed by a function that takes a prefix."""
    if "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(layer).__module__]) or not hasattr(layer, "config"):
        raise not_reached(layer)
    name = layer.config._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"Attention {name!r} takes no prefix: load the model with attn_implementation sdpa or eager.")
    if name == "eager" and getattr(
        layer, "reorder_and_upcast_attn", False
    ):  # GPT-2's own float32 path, which eager has
        raise ValueError("A prefix loses reorder_and_upcast_attn under eager attention: use attn_implementation sdpa.")


def not_reached(layer: nn.Module) -> ValueError:
    """The error for a module that computes its attention itself."""
    return ValueError(
        f"{type(layer).__name__} computes its attention itself and not through transformers' AttentionInterface, so "
        "that a prefix would have no effect: use PromptTuning or LoRA."
    )


def attend(
    name: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention over the prefixes of this module and its own keys, [batch, heads, length, width of a head]."""
    flash = name.startswith("flash")
    if flash and kwargs.get("sliding_window") is not None:
        raise ValueError("Flash attention over a sliding window loses the prefix: use attn_implementation sdpa.")
    if attention_mask is None and name == "sdpa" and query.shape[2] > 1:
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            # The kernel's own triangle would start at the prefix.
            square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = square.tril()[None, None]
    if name == "sdpa":
        kwargs["is_causal"] = False
    own = key, value
    for prefix in module.peft.chain():
        if not isinstance(prefix, Prefix):
            continue
        if not prefix.reached:
            prefix.reached = True
        if prefix.reads:
            prefix.read(*own)
            continue
        k, v = prefix.pair()
        key, value = _before(k, key), _before(v, value)
        n = len(k)
        if attention_mask is not None:  # [batch, keys] for flash, [batch, heads, queries, keys] for the others
            seen: Any = True if attention_mask.dtype == torch.bool else int(flash)
            attention_mask = F.pad(attention_mask, (n, 0), value=seen)
        if (bias := kwargs.get("position_bias")) is not None:  # T5's relative positions: the prefix has none
            kwargs["position_bias"] = F.pad(bias, (n, 0))
    return _delegate(name, module)(module, query, key, value, attention_mask, **kwargs)


def _before(prefix: Tensor, own: Tensor) -> Tensor:
    batch, heads, _, width = own.shape
    first = prefix.to(own.dtype).view(len(prefix), heads, width).transpose(0, 1)
    return torch.cat([first.expand(batch, -1, -1, -1), own], dim=2)


def _delegate(name: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = vars(sys.modules[type(module).__module__])
    return functions["eager_attention_forward"] if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
