"""torchao: weights in 8 bit. It needs the package, `pip install lit-peft[torchao]`."""

from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lit_peft.core.quantize import Quantizer, StoredSize
from lit_peft.core.quantized import adopt
from lit_peft.core.wrapped import FrozenWrapped, made_by_rows, told

_CONFIG = Int8WeightOnlyConfig(set_inductor_config=False)  # else it sets inductor for whatever is compiled


class Int8WeightOnly(Quantizer):
    """Weights in 8 bit with a scale a row, `W ~ scale[row] * code`; activations and products as they are.

    bitsandbytes' `int8` quantises activations too, on a GPU; this does not. The layer stays an `nn.Linear`, its weight
    a tensor that dequantises itself. GPT-2's Conv1D, which torchao does not know, is left alone.

    Args:
        **common: See `Quantizer`.
    """

    kinds = ("torch.nn.modules.linear.Linear",)

    @property
    def stored_as(self) -> str:
        return "torchao Int8Tensor by rows"

    def quantize(self, layer: Any, device: torch.device) -> None:
        layer.weight.data = layer.weight.data.to(device)
        quantize_(layer, _CONFIG, filter_fn=lambda module, path: module is layer)
        adopt(layer)

    def size(self, out_features: int, in_features: int) -> StoredSize:
        return StoredSize(out_features * in_features, 5 * out_features)  # a scale and a zero point a row

    @classmethod
    def of(cls, layer: Any) -> Quantizer | None:
        if not isinstance(layer, FrozenWrapped):
            return None
        found, weight = cls(), layer.weight  # type: ignore[attr-defined]
        return found if told(weight) == found.stored_as and made_by_rows(weight) else None

    def loading_config(self, left_alone: list[str]) -> Any | None:
        from transformers import TorchAoConfig

        return TorchAoConfig(_CONFIG, modules_to_not_convert=left_alone)
