"""bitsandbytes' layers in a frozen base: the class swap that they get, and how they are applied and read."""

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_peft.core import kernels
from lit_peft.core.dtypes import compute_dtype, dequantises_itself
from lit_peft.core.sharded import in_shards
from lit_peft.core.swap import Swapped, swap_class, unswapped, with_mixins
from lit_peft.core.wrapped import FrozenWrapped

# Notices that ask for nothing: an optional kernel that is not there on some CPUs, and a cast before int8 products.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

MANY_ROWS = 1536
"""Rows of activations above which bitsandbytes too makes a 4-bit weight dense; below, it may multiply by the codes."""

SLICED_FROM = 1 << 25
"""Weights of a narrowing 4-bit layer, 64 MiB in bfloat16, from which it is made dense in slices."""

SOURCE = "source_cls"
"""Attribute of a quantised layer, transformers' name for it: the class that it was made from."""


def bitsandbytes() -> ModuleType:
    """The package, imported when it is first needed."""
    import bitsandbytes as bnb

    return bnb


class Frozen4bit(Swapped):
    """bitsandbytes' Linear4bit, its weight frozen.

    bitsandbytes' own forward casts a bias in place to the dtype of the activations, which would turn one that trains
    into another parameter than the optimizer holds, and gives it a gradient of the wrong shape. This one computes in
    its `compute_dtype`, or where it has none in that of each call: bitsandbytes would keep that of the first. It keeps
    its codes as they are: through `.to(dtype)`, which would cast those that are stored in floating point, and in
    evaluation, where bitsandbytes packs them anew for CPUs with bfloat16 instructions, after which training loses
    gradients without a word. It finds its state again after a move or sharding has replaced the weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        return forward_4bit(self, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hangs the constants on the weight again, which loses them on its way through pickle and a copy after that.

        bitsandbytes would write a state dict without them.
        """
        super().__setstate__(state)  # type: ignore[misc]
        layer: Any = self
        layer.weight.quant_state = layer.quant_state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Leaves out the constants of codes in shards: torch gathers these, by parameters and buffers alone."""
        layer: Any = self
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if in_shards(layer.weight):
            for key in [key for key in destination if key.startswith(f"{prefix}weight.")]:
                del destination[key]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the constants with their codes; bitsandbytes would read new codes with its old constants."""
        layer: Any = self
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        found = {key: state_dict[key].clone() for key in state_dict if key.startswith(f"{prefix}weight.")}
        if found:
            unexpected = args[3]
            unexpected[:] = [key for key in unexpected if key not in found]
            state = bitsandbytes().functional.QuantState.from_dict(found, layer.weight.device)
            layer.quant_state = layer.weight.quant_state = state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layer: Any = self
        state, weight = state_4bit(layer), layer.weight
        stored = weight.dtype
        if state is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        is_cast = stored.is_floating_point and type(weight.data) is Tensor
        if is_cast:
            weight.data = weight.data.view(torch.uint8)
        super()._apply(fn, recurse)  # type: ignore[misc]
        if is_cast:
            layer.weight.data = layer.weight.data.view(stored)
        if not layer.weight.is_meta:
            state.to(layer.weight.device)
        layer.quant_state = layer.weight.quant_state = state
        return self


class Frozen8bit(Swapped):
    """bitsandbytes' Linear8bitLt, its weight frozen, in int8; of biases the same holds as in 4 bit.

    On a CPU the weight alone is in 8 bit, in training and in evaluation; on a GPU the product is LLM.int8's. Scales
    follow the weight to another device.
    """

    def forward(self, x: Tensor) -> Tensor:
        return forward_8bit(self, x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Leaves out the scales of a weight in shards, likewise."""
        layer: Any = self
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if in_shards(layer.weight):
            for name in ("SCB", "weight_format"):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, *args: Any) -> None:
        layer: Any = self
        layer.weight.SCB = scales_8bit(layer)  # where bitsandbytes looks for them
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        _keep_8bit(layer, layer.weight.SCB)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layer: Any = self
        scales = scales_8bit(layer)
        super()._apply(fn, recurse)  # type: ignore[misc]
        if scales is not None:
            _keep_8bit(layer, scales.to(layer.weight.device))
        return self


def adopt(layer: Any) -> None:
    """Gives a quantised layer the class that it needs in a frozen base; nothing to any other.

    Of one that was to be quantised and never will be, it is that of a plain layer.
    """
    kinds = {base.__qualname__ for base in type(layer).__mro__ if base.__module__ == "bitsandbytes.nn.modules"}
    if isinstance(layer, Frozen4bit | Frozen8bit | FrozenWrapped):
        return
    if "Linear4bit" in kinds and (state := state_4bit(layer)) is not None:
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        layer.support_avx512bf16_for_cpu = False
        layer.quant_state = layer.weight.quant_state = state
        _freeze(layer, Frozen4bit)
    elif "Linear8bitLt" in kinds and not layer.state.has_fp16_weights and (scales := scales_8bit(layer)) is not None:
        _keep_8bit(layer, scales)
        _freeze(layer, Frozen8bit)
    elif kinds & {"Linear4bit", "Linear8bitLt"} and type(layer.weight) is nn.Parameter:
        # One that the checkpoint did not hold: transformers has left its new values as they are, for ever.
        _make_plain(layer, layer.weight, nn.Linear)
    elif isinstance(layer, nn.Linear) and dequantises_itself(layer.weight):
        layer.__dict__.pop("extra_repr", None)  # torchao's, which does not pickle, and of a dense one would be wrong
        _freeze(layer, FrozenWrapped)


def _freeze(layer: nn.Module, mixin: type[Swapped]) -> None:
    layer._parameters["weight"].requires_grad_(False)  # type: ignore[union-attr]
    swap_class(layer, mixin)


# ---------------------------------------------------------------------------------------------------- 4 bit


def state_4bit(layer: Any) -> Any:
    """Bitsandbytes' quantisation state of a 4-bit layer; None where it is not quantised yet."""
    # The weight's own is lost where the layer was sharded.
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _made(layer: Any, constants: Any) -> Any:
    """The constants of a layer's weight, for a product, which one that is not quantised yet has none of."""
    if constants is None:
        raise RuntimeError(
            f"{type(layer).__name__} is not quantised yet: bitsandbytes does that as the layer is moved, .to(device)."
        )
    return constants


def is_misread(weight: Tensor, state: Any) -> bool:
    """Whether bitsandbytes' kernels may read codes with the scales of other blocks, as those for CPUs do.

    With AVX512, version 0.50.2 takes a row whose length is a multiple of 16 to begin a block.
    """
    return state.shape[-1] % state.blocksize != 0 and not kernels.on_gpu(weight)


def told_4bit(quant_type: str, block_size: int, nested: bool) -> str:
    """What a weight in 4 bits is stored as; a layer and its quantiser say the same."""
    return f"{quant_type} in blocks of {block_size}{', double' if nested else ''}"


def dense_4bit(layer: Any, dtype: torch.dtype | None = None, columns: slice = slice(None)) -> Tensor:
    """The weight of a 4-bit layer, [out, in]; by default in the dtype that it was quantised from.

    Args:
        layer: The layer.
        dtype: Of the result.
        columns: Which of them; all, or one of `slices_4bit`.
    """
    state = state_4bit(layer)
    if state is None:  # not moved to its device yet: bitsandbytes quantises then
        return layer.weight[:, columns]
    codes = layer.weight.data
    if (fast := kernels.in_triton(codes)) is not None:
        return fast.dense_4bit(codes, state, dtype or state.dtype, columns)
    absmax = state.absmax
    ops = bitsandbytes().functional
    if state.nested:
        absmax = ops.dequantize_blockwise(state.absmax, state.state2) + state.offset
    if is_misread(layer.weight, state):
        two = codes.view(torch.uint8).flatten().int()
        W = state.code[torch.stack((two >> 4, two & 15), 1)].flatten()[: state.shape.numel()]
        W *= absmax.float().repeat_interleave(state.blocksize)[: W.numel()]
        return W.view(state.shape).to(dtype or state.dtype)[:, columns]
    W = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype or state.dtype
    )
    return W[:, columns]


def slices_4bit(layer: Any) -> list[slice]:
    """Columns in which the weight of a 4-bit layer is best made dense for the gradient of its input.

    That gradient is as wide, and where the layer narrows, as the last one of a feed-forward network does, both are what
    a checkpointed block has its peak with: of a large one, on a GPU, half is made dense at a time.
    """
    state = state_4bit(layer)
    (out, n), block = state.shape, state.blocksize
    if n < 2 * out or out * n < SLICED_FROM or n % block or kernels.in_triton(layer.weight.data) is None:
        return [slice(0, n)]
    half = -(-n // (2 * block)) * block
    return [slice(0, half), slice(half, n)]


def multiplies_dense(layer: Any, x: Tensor) -> bool:
    """Whether, without gradients, a product with a 4-bit weight is to be made through the dense one."""
    many = x.numel() > MANY_ROWS * x.shape[-1] and not torch.is_grad_enabled() and kernels.in_triton(x) is not None
    return many or is_misread(layer.weight, _made(layer, state_4bit(layer)))


def forward_4bit(layer: Any, x: Tensor, with_bias: bool = True) -> Tensor:
    """`W x + b` of a 4-bit layer, [..., in] -> [..., out], in the dtype that `nn.Linear` would return."""
    state, own = _made(layer, state_4bit(layer)), compute_dtype(x)
    dtype = layer.compute_dtype or own
    bias = layer.bias if with_bias else None
    if multiplies_dense(layer, x):
        b = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), dense_4bit(layer, dtype), b).to(own)
    inside, outside = _bias(bias, dtype)
    y = bitsandbytes().matmul_4bit(x.to(dtype), layer.weight, quant_state=state, bias=inside)
    return (y if outside is None else y + outside).to(own)


def store_4bit(layer: Any, W: Tensor) -> None:
    """Quantises a weight, [out, in], as the layer's is, and puts it in its place."""
    old, state, packed = layer.weight, state_4bit(layer), layer.weight.data
    codes, new = bitsandbytes().functional.quantize_4bit(
        W.detach().to(packed.device).contiguous(),  # in its own dtype: rounded once
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
    )
    new.dtype = state.dtype
    packed.copy_(codes)
    layer.quant_state = old.quant_state = new


# ---------------------------------------------------------------------------------------------------- 8 bit


def scales_8bit(layer: Any) -> Tensor | None:
    """Largest magnitude of each row of an 8-bit layer's weight, [out], float32; None where it is not quantised yet."""
    found = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if found is None else found


def _keep_8bit(layer: Any, scales: Tensor) -> None:
    """Keeps the scales with the layer, since an int8 weight that is moved or copied loses what hangs on it."""
    layer.state.SCB, layer.state.CB = scales, None
    layer.weight.SCB = layer.weight.CB = None


def dense_8bit(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of an 8-bit layer, [out, in]."""
    scales = scales_8bit(layer)
    if scales is None:
        return layer.weight
    return layer.weight.data.to(dtype).mul_((scales * (1 / 127)).unsqueeze(1))


def store_8bit(layer: Any, W: Tensor) -> None:
    """Quantises a weight, [out, in], and puts it in the place of the layer's."""
    half = W.detach().to(layer.weight.device, torch.float16)
    codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(half)
    layer.weight.data.copy_(codes)
    _keep_8bit(layer, scales)


def forward_8bit(layer: Any, x: Tensor, with_bias: bool = True) -> Tensor:
    """`W x + b` of an 8-bit layer, [..., in] -> [..., out], in the dtype that `nn.Linear` would return."""
    bnb, dtype, state = bitsandbytes(), compute_dtype(x), layer.state
    state.CB, state.SCB = layer.weight.data, _made(layer, scales_8bit(layer))
    state.is_training = layer.training or x.is_cpu
    inside, outside = _bias(layer.bias if with_bias else None, dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    y = bnb.matmul(rows, layer.weight, bias=inside, state=state, threshold=state.threshold)
    return (y if outside is None else y + outside).to(dtype).view(*x.shape[:-1], y.shape[-1])


def _bias(b: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A bias for bitsandbytes, and one to be added outside: the gradient that it gives to a bias is none."""
    if b is None:
        return None, None
    return (None, b.to(dtype)) if b.requires_grad and torch.is_grad_enabled() else (b.to(dtype), None)


# ------------------------------------------------------------------------------------------------ made dense


class Kept(NamedTuple):
    """What a quantised layer was, tensors on the host: codes and constants alone, a dense weight is made of them."""

    kind: tuple[tuple[type, ...], type]
    """Its class, as `unswapped` takes it apart: a swapped one does not pickle."""
    attributes: dict[str, Any]
    weight: nn.Parameter
    """The same object that the layer had, and will have."""
    codes: Tensor
    constants: Any
    """bitsandbytes' state of a 4-bit layer, the scales of an 8-bit one."""
    bias: Tensor | None


def keep(layer: Any) -> Kept:
    """What `put_back` needs to make a layer what it is now."""
    own = _own_attributes() - {"quant_state"}  # the constants where they lie, which would stay on the device
    attributes = {key: value for key, value in layer.__dict__.items() if key in own}
    attributes["_load_state_dict_pre_hooks"] = layer._load_state_dict_pre_hooks
    weight, b = layer.weight, layer.bias
    return Kept(
        unswapped(type(layer)),
        attributes,
        weight,
        weight.data.to("cpu", copy=True),
        _on_host(state_4bit(layer) if issubclass(type(layer), Frozen4bit) else scales_8bit(layer)),
        None if b is None else b.detach().to("cpu", copy=True),
    )


def _on_host(constants: Any) -> Any:
    """A copy of bitsandbytes' state, whose `to` moves it in place, or of a tensor, whose `to` does not."""
    found = copy.deepcopy(constants)
    moved = found.to("cpu")
    return found if moved is None else moved


def put_back(layer: Any, kept: Kept) -> None:
    """Makes a layer what it was when it was kept, bit for bit, whether it is dense now or was quantised anew."""
    weight, constants, device = kept.weight, kept.constants, layer.weight.device
    weight.data = kept.codes.to(device)
    layer.__class__ = with_mixins(*kept.kind)
    layer.__dict__.update(kept.attributes)
    layer._parameters["weight"] = weight
    if issubclass(type(layer), Frozen4bit):
        constants.to(device)
        layer.quant_state = weight.quant_state = constants  # type: ignore[attr-defined]
    else:
        _keep_8bit(layer, constants.to(device))
    if kept.bias is not None:
        layer.bias.data.copy_(kept.bias)


def make_dense(layer: Any, weight: Tensor, kind: type[nn.Module]) -> None:
    """Makes a layer one of the class that it was quantised from, in place, with a weight in that class's layout."""
    old = layer.weight
    if issubclass(type(layer), Frozen4bit):
        old.quant_state = None
    else:
        layer.state.CB = layer.state.SCB = None
    old.data = old.data.new_empty(0)  # it may be kept, for `put_back`, and must not hold memory meanwhile
    _make_plain(layer, nn.Parameter(weight), kind)


def _make_plain(layer: Any, weight: nn.Parameter, kind: type[nn.Module]) -> None:
    (mixins, _), hooks = unswapped(type(layer)), layer._load_state_dict_pre_hooks
    layer.__class__ = with_mixins((mixin for mixin in mixins if not issubclass(mixin, Frozen4bit | Frozen8bit)), kind)
    for key in _own_attributes():
        layer.__dict__.pop(key, None)
    plain = ((key, hook) for key, hook in hooks.items() if not str(hook.__module__).startswith("bitsandbytes"))
    layer._load_state_dict_pre_hooks = OrderedDict(plain)
    layer._parameters["weight"] = weight


@functools.cache
def _own_attributes() -> frozenset[str]:
    """Names of what bitsandbytes' layers have beside `nn.Linear`, and of the class that they were made from."""
    bnb, plain = bitsandbytes().nn, nn.Linear(1, 1, device="meta").__dict__.keys()
    layers = (bnb.Linear4bit(1, 1, device="meta"), bnb.Linear8bitLt(1, 1, device="meta"))
    return frozenset({SOURCE}.union(*(layer.__dict__.keys() - plain for layer in layers)))
