"""Copies of a module that hold no values."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import stored_as
from lit_peft.core.registry import registry


def fake_mode() -> FakeTensorMode:
    """A mode under which tensors have shapes and no values; real ones that a step meets, constants, may join in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_meta(module: nn.Module) -> Any:
    """A copy on the meta device; of weights in 4 or 8 bit too."""
    return _copy(module, "meta")


def faked(module: nn.Module, fake: FakeTensorMode) -> Any:
    """A copy of fake tensors."""
    return _copy(module, "cpu", fake)


def fake_batch(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """A batch of fake tensors like this one, floating ones in a dtype where one is given."""

    def fake(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="cpu", dtype=dtype if dtype and t.is_floating_point() else t.dtype)

    return torch.utils._pytree.tree_map_only(Tensor, fake, batch)


def stored(module: nn.Module) -> dict[str, list[Tensor]]:
    """Path -> codes and constants, of every quantised layer."""
    layers = {path: module.get_submodule(path) for path in stored_as(module)}
    return {path: layer_ops(layer).stored(layer) for path, layer in layers.items()}


def _copy(module: nn.Module, device: str, fake: FakeTensorMode | None = None) -> Any:
    plain = [t for child in module.modules() for t in vars(child).values() if isinstance(t, Tensor)]
    tensors = [*module.parameters(), *module.buffers(), *plain]
    tensors += [t for parts in stored(module).values() for t in parts]
    with fake or nullcontext():
        memo: dict[int, Any] = {id(t): _like(t, device) for t in tensors}
    if (state := registry(module)) is not None:  # host copies for `detach`
        memo[id(state.originals)] = {}
    for owner in ("_trainer", "_fabric"):  # of a LightningModule
        memo[id(module.__dict__.get(owner))] = None
    return copy.deepcopy(module, memo)


def _like(t: Tensor, device: str) -> Tensor:
    new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
