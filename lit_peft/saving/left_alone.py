"""How transformers is told which layers of a model are in floats, where it quantises as it loads, or reads codes."""

import re
from collections.abc import Collection

from torch import nn

from lit_peft.core.layers import find_layer_ops


def left_alone(model: nn.Module, quantised: Collection[str]) -> list[str]:
    """The linear layers of a model but for these, as the quantisation configs of transformers take them.

    It takes each for an expression that the path of a layer, or of its weight, starts with, and for an ending of it:
    "classifier" would leave "pre_classifier" alone too. Where a path as it is would, an expression takes its place.

    Args:
        model: A model of transformers, or its skeleton on the meta device.
        quantised: Paths of the layers that are quantised, or will be.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    plain = [path for path, layer in model.named_modules() if path not in quantised and _is_linear(layer)]
    return [
        path if all(should_convert_module(other, [path]) for other in quantised) else rf"^{re.escape(path)}(\.weight)?$"
        for path in plain
    ]


def _is_linear(layer: nn.Module) -> bool:
    ops = find_layer_ops(layer)
    return ops is not None and ops.is_linear
