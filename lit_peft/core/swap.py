"""Changing what a module is without moving it: the class swap, and what is built on it."""

import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.dtypes import dequantises_itself

MERGED_KEY = "_lit_peft_merged"
"""Where a module keeps what `unmerge` needs. Here, since `attach` asks for it and `merge` stands on `attach`."""


class Swapped:
    """Mixin of every swapped class: pickles and copies as its base class, and is swapped when rebuilt."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixins, base = unswapped(type(self))
        return _rebuild, (mixins, base), self.__getstate__()


def unswapped(cls: type) -> tuple[tuple[type, ...], type]:
    """The mixins that a class was swapped with, first one first, and the class that it was before."""
    mixins: list[type] = []
    while issubclass(cls.__bases__[0], Swapped):
        mixin, cls = cls.__bases__
        mixins.insert(0, mixin)
    return tuple(mixins), cls


def with_mixins(mixins: Iterable[type], base: type) -> type:
    """The class that `unswapped` takes apart into these."""
    return functools.reduce(lambda cls, mixin: swapped_class(mixin, cls), mixins, base)


def _rebuild(mixins: tuple[type, ...], base: Any) -> Any:
    return base.__new__(with_mixins(mixins, base))


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    """The one subclass of `mixin` and `base`.

    It is cached because torch.compile recompiles for every class, and it carries the base's names because
    `save_pretrained` writes the class name into the config and error messages show it.
    """
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (mixin, base), names)


def swap_class(module: nn.Module, mixin: type[Swapped], innermost: bool = False) -> None:
    """Gives `module` the cached subclass that puts `mixin` before its class; nothing if it has it already.

    `innermost` puts it behind the mixins that the class has.
    """
    if not isinstance(module, mixin):
        mixins, base = unswapped(type(module)) if innermost else ((), type(module))
        module.__class__ = with_mixins((mixin, *mixins), base)


def restore_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Undoes `swap_class`, whatever other mixins the class has; nothing if it has not this one."""
    if isinstance(module, mixin):
        mixins, base = unswapped(type(module))
        module.__class__ = with_mixins((m for m in mixins if m is not mixin), base)


def holds_numbers(parameter: Tensor) -> bool:
    """Whether a parameter is one of floating point, and not of codes that are stored in such a dtype."""
    has_codes = getattr(parameter, "quant_state", None) is not None or dequantises_itself(parameter)
    return parameter.is_floating_point() and not has_codes


class CastsParameters(Swapped):
    """A base layer that trains in another dtype than it computes in: float32 biases of a bfloat16 layer.

    Its forward sees all its parameters in the dtype that the layer came with, under autocast too: some
    kernels (layer norm on a CPU) refuse a bfloat16 weight beside a float32 bias. An input in the other dtype is cast
    as well: T5 casts what it gives to a layer to the dtype of the weight that it finds there.
    """

    base_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
        kept = dict(own)
        try:
            for name, p in kept.items():
                if p is not None and holds_numbers(p):
                    own[name] = p.to(self.base_dtype)
                    args = tuple(
                        a.to(self.base_dtype) if torch.is_tensor(a) and a.dtype == p.dtype else a for a in args
                    )
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            own.update(kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.to(dtype) means this dtype too.
        self.base_dtype = fn(torch.empty(0, dtype=self.base_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[misc]


class BorrowsForward(Swapped):
    """A layer that computes as one of another class does, whose forward it has borrowed."""

    borrowed: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.borrowed(self, *args, **kwargs)


class FrozenStatistics(Swapped):
    """A normalisation layer that stays in evaluation mode: its statistics belong to the frozen base."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


# ------------------------------------------------------------------------------- base parameters that train


def cast_parameters(module: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Gives the base parameters that train the dtype of the adapters.

    Raises:
        ValueError: When one is quantised, or its layer's forward cannot be given another dtype.
    """
    for name in names:
        parameter = module.get_parameter(name)
        if not holds_numbers(parameter):
            raise ValueError(
                f"{name} is quantised and cannot be trained: leave it out, or load the base with that layer as it is "
                "(transformers: llm_int8_skip_modules)."
            )
        if parameter.dtype == dtype:
            continue
        before = parameter.dtype
        for path, layer in _owners(module, parameter):
            check_forward(path, layer)
            if path and isinstance(module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
                raise ValueError(
                    f"{name} cannot train in {dtype} beside a base in {before}: nn.MultiheadAttention reads "
                    "it itself and takes one dtype. Set adapter_dtype, or load the base in that dtype."
                )
            if not isinstance(layer, CastsParameters):
                swap_class(layer, CastsParameters)
                layer.base_dtype = before  # type: ignore[assignment]
                leave_fast_path(module, path)
        parameter.data = parameter.data.to(dtype)


def _owners(module: nn.Module, parameter: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each place that a parameter lives in, several where it is tied."""
    for path, child in module.named_modules():
        if any(own is parameter for own in child._parameters.values()):
            yield path, child


def restore_parameters(module: nn.Module, names: Iterable[str], originals: MutableMapping[str, Tensor]) -> None:
    """Gives base parameters their dtype back and the values in `originals`, which it takes out there."""
    for name in names:
        parameter = module.get_parameter(name)
        owners = (layer for _, layer in _owners(module, parameter))
        layers: list[Any] = [layer for layer in owners if isinstance(layer, CastsParameters)]
        dtype = layers[0].base_dtype if layers else parameter.dtype
        parameter.data = originals.pop(name, parameter.data).to(parameter.device, dtype)
        parameter.grad = None
        for layer in layers:
            own = [p for p in layer.parameters(recurse=False) if holds_numbers(p)]
            if all(p.dtype == dtype for p in own):
                restore_class(layer, CastsParameters)
                del layer.base_dtype


def buffers_beside(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of buffers that are saved and live beside these parameters: running statistics move with them."""
    found: set[str] = set()
    for owner in {name.rpartition(".")[0] for name in names}:
        layer = module.get_submodule(owner)
        kept = layer._buffers.keys() - layer._non_persistent_buffers_set
        found.update(f"{owner}.{key}".lstrip(".") for key in kept if layer._buffers[key] is not None)
    return found


def with_running_statistics(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each normalisation layer that keeps running statistics (BatchNorm and its like)."""
    return ((path, child) for path, child in module.named_modules() if getattr(child, "track_running_stats", False))


# --------------------------------------------------------------------- what would pass a swapped layer by


def check_forward(path: str, layer: nn.Module) -> None:
    """Raises ValueError for a layer whose instance has a forward of its own, which no class can override."""
    if "forward" in layer.__dict__:
        raise ValueError(
            f"{path}: this {type(layer).__name__} carries a forward of its own (accelerate's device_map "
            "leaves one), which would be called instead of ours. Load the model without device_map."
        )


def leave_fast_path(module: nn.Module, path: str) -> None:
    """Keeps an nn.TransformerEncoder around this layer from reading its weight, in evaluation, uncalled."""
    layer: Any = module.get_submodule(path)
    parts = path.split(".")
    for parent in (module.get_submodule(".".join(parts[:i])) for i in range(len(parts))):
        if isinstance(parent, nn.TransformerEncoderLayer) and "_lit_peft_hook" not in layer.__dict__:
            layer.__dict__["_lit_peft_hook"] = layer.register_forward_pre_hook(_no_op_hook)
        if isinstance(parent, nn.TransformerEncoder) and "_lit_peft_nested" not in parent.__dict__:
            parent.__dict__["_lit_peft_nested"] = parent.use_nested_tensor
            parent.use_nested_tensor = False  # packed batches are for the fast path, layers cannot read them


def _no_op_hook(module: nn.Module, args: Any) -> None:
    """Does nothing: that it is there keeps nn.TransformerEncoderLayer from its fast path."""


def restore_fast_path(module: nn.Module) -> None:
    """Undoes `leave_fast_path` for this one module."""
    hook = module.__dict__.pop("_lit_peft_hook", None)
    if hook is not None:
        hook.remove()
    if "_lit_peft_nested" in module.__dict__:
        module.use_nested_tensor = module.__dict__.pop("_lit_peft_nested")


def check_unmerged(module: nn.Module) -> None:
    """Raises ValueError where adapters are merged into the module's weights, or a part's: they are out of reach."""
    for path, child in module.named_modules():
        if MERGED_KEY in child.__dict__:
            raise ValueError(
                f"{path or type(child).__name__} is merged: its adapters are folded into its weights. Take them out "
                "again first, lit_peft.unmerge(module); to score it as it is, give the trainer no method."
            )
