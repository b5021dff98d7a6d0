"""bitsandbytes: nf4, fp4 and int8."""

import importlib.util
import math
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_peft.core.dtypes import DTYPES
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import Quantizer, StoredSize
from lit_peft.core.quantized import SOURCE, Frozen4bit, Frozen8bit, adopt, bitsandbytes, state_4bit, told_4bit
from lit_peft.methods.checks import check_choice, check_range

if importlib.util.find_spec("bitsandbytes") is None:  # imported when the first layer is quantised: it takes seconds
    raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STORAGE = {**DTYPES, "uint8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _STORAGE.items()}
_NESTED_BLOCK = 256


class _FourBit(Quantizer):
    """Blocks of a weight in 4 bits each, with one scale a block: `W ~ absmax[block] * code[index]`.

    Args:
        double_quant: Whether the scales are quantised too, to 8 bit in blocks of 256, which takes .5 bit a weight down
            to .127 (Dettmers et al. 2023, QLoRA, section 3).
        compute_dtype: Dtype of the products with the base; auto: that of the activations. Where a GPU has no bfloat16
            (compute capability below 8), which is warned of, float16.
        block_size: Weights that share a scale. Smaller ones round less and take more memory.
        storage_dtype: Dtype of the tensor that holds the codes. FSDP2 of torch 2.11 shards float dtypes alone.
        **common: See `Quantizer`.
    """

    quant_type: ClassVar[str]

    def __init__(
        self,
        double_quant: bool = True,
        compute_dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16",
        block_size: int = 64,
        storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not isinstance(double_quant, bool):
            raise ValueError(f"double_quant is {double_quant!r}, expected true or false.")
        check_choice("compute_dtype", compute_dtype, (*DTYPES, "auto"))
        check_choice("storage_dtype", storage_dtype, tuple(_STORAGE))
        if type(block_size) is not int or block_size not in _BLOCKS:
            raise ValueError(f"block_size is {block_size!r}, expected one of {', '.join(map(str, _BLOCKS))}.")
        self.double_quant, self.block_size = double_quant, block_size
        self.compute_dtype, self.storage_dtype = DTYPES.get(compute_dtype), _STORAGE[storage_dtype]

    @property
    def stored_as(self) -> str:
        return told_4bit(self.quant_type, self.block_size, self.double_quant)

    def check_device(self, device: torch.device) -> None:
        if self.compute_dtype != torch.bfloat16 or device.type != "cuda":
            return
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            rank_zero_warn(
                f"quantize: {self.quant_type} computes in bfloat16, which {torch.cuda.get_device_name(device)} has no "
                "units for and emulates slowly: set compute_dtype to float16, and train in 16-mixed or 32-true."
            )

    def quantize(self, layer: Any, device: torch.device) -> None:
        bnb, W = bitsandbytes(), _matrix(layer)
        new = bnb.nn.Linear4bit(
            W.shape[1], W.shape[0], layer.bias is not None, self.compute_dtype, device=torch.device("meta")
        )
        new.quant_storage = self.storage_dtype
        weight = bnb.nn.Params4bit(
            W.to(device),
            requires_grad=False,
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=self.storage_dtype,
            module=new,
        )
        if device.type == "meta":  # as which `.to` would leave the weight
            bnb.functional.quantize_blockwise(torch.zeros(1, device="cpu"))  # makes the table that all layers share
            new.weight = weight._quantize(device)
        else:
            new.weight = weight.to(device)
        new.weight.module = None  # it would keep the layer alive that was made for the weight
        _become(layer, new)

    def size(self, out_features: int, in_features: int) -> StoredSize:
        n = out_features * in_features
        blocks, unit = math.ceil(n / self.block_size), self.storage_dtype.itemsize
        codes = math.ceil(n / 2 / unit) * unit
        if not self.double_quant:
            return StoredSize(codes, 4 * blocks + 4 * 16)
        return StoredSize(codes, blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 * 256 + 4 * 16 + 4)

    def loading_config(self, left_alone: list[str]) -> Any | None:
        # transformers has no word for another size
        return self.reading_config(left_alone) if self.block_size == 64 else None

    @classmethod
    def of(cls, layer: Any) -> "Quantizer | None":
        state = state_4bit(layer) if issubclass(type(layer), Frozen4bit) else None
        if state is None or state.quant_type != cls.quant_type:
            return None
        computes, stores = _NAMES.get(layer.compute_dtype, "auto"), _NAMES[layer.weight.dtype]
        return cls(state.nested, computes, state.blocksize, stores)  # type: ignore[arg-type]

    def reading_config(self, left_alone: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype or torch.float32,
            bnb_4bit_quant_storage=self.storage_dtype,
            llm_int8_skip_modules=left_alone,
        )


class NF4(_FourBit):
    """4-bit NormalFloat: the 16 values are quantiles of a normal distribution (Dettmers et al. 2023, section 3)."""

    quant_type = "nf4"


class FP4(_FourBit):
    """4-bit floating point: sign, two bits of exponent and one of mantissa."""

    quant_type = "fp4"


class Int8(Quantizer):
    """LLM.int8 (Dettmers et al. 2022): weights in 8 bit with a scale a row, products in int8 but for outliers.

    On a GPU the activations are quantised too, row by row, and columns with a value above `threshold` are multiplied in
    floating point. On a CPU the weight alone is.

    Args:
        threshold: Magnitude from which a column of activations counts as an outlier; 6 is the paper's.
        **common: See `Quantizer`.
    """

    def __init__(self, threshold: float = 6.0, **common: Any) -> None:
        super().__init__(**common)
        check_range("threshold", threshold, 0)
        self.threshold = float(threshold)

    @property
    def stored_as(self) -> str:
        return "int8 by rows"

    def quantize(self, layer: Any, device: torch.device) -> None:
        bnb, W = bitsandbytes(), _matrix(layer)
        new = bnb.nn.Linear8bitLt(
            W.shape[1],
            W.shape[0],
            layer.bias is not None,
            has_fp16_weights=False,
            threshold=self.threshold,
            device=torch.device("meta"),
        )
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(W.to(device, torch.float16))
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        _become(layer, new)

    def size(self, out_features: int, in_features: int) -> StoredSize:
        return StoredSize(out_features * in_features, 4 * out_features)

    @classmethod
    def of(cls, layer: Any) -> "Quantizer | None":
        return cls(layer.state.threshold) if issubclass(type(layer), Frozen8bit) else None

    def loading_config(self, left_alone: list[str]) -> Any | None:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=self.threshold, llm_int8_skip_modules=left_alone
        )


def _matrix(layer: Any) -> torch.Tensor:
    """The weight [out, in] of a dense layer, contiguous."""
    return layer_ops(layer).matrix(layer).detach().contiguous()


def _become(layer: Any, new: nn.Module) -> None:
    """Makes a layer what another one is, but for its bias, its hooks and its mode; whoever holds it still does."""
    setattr(layer, SOURCE, type(layer))
    layer.__class__ = type(new)
    layer._parameters["weight"] = new._parameters["weight"]
    for key, value in new.__dict__.items():
        layer.__dict__.setdefault(key, value)
    layer._load_state_dict_pre_hooks.update(new._load_state_dict_pre_hooks)
    adopt(layer)
