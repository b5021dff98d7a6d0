"""Folding adapters into the weights of their layers, in float32, and taking them out again exactly."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.active import Adapted, Additions, run_again, set_active
from lit_peft.core.addition import Delta, composed_bias, composed_weight
from lit_peft.core.attach import close, put_on, reopen, take_off
from lit_peft.core.layers import layer_ops
from lit_peft.core.registry import Registry, Running, registry
from lit_peft.core.swap import MERGED_KEY, check_unmerged


@dataclass
class _Merged:
    """What `unmerge` needs: additions by site, own weights and biases on the host, and the registry."""

    additions: dict[str, Additions] = field(default_factory=dict)
    weights: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    state: Registry | None = None
    before: Running | None = None


def merge(
    module: nn.Module, names: str | Iterable[str] | Mapping[str, float] | None = None, *, head: str | None = None
) -> None:
    """Folds adapters into the weights: the module then has its own keys and classes again, and nothing of ours runs.

    `W <- V`, composed as `Delta` says, computed in float32 and rounded once to the weight's dtype. Base parameters
    that train (a head, biases) keep their trained values. `unmerge` undoes it; until then the original weights are
    kept on the host, and adapters are neither attached, nor saved, switched or detached.

    Args:
        module: What the adapters are attached to.
        names: The adapters to fold, as `set_active` takes them; null: those that are active. Others are put aside
            with them.
        head: See `set_active`.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When there is no adapter, they are merged already, an addition is no change of a weight, or a
            weight cannot be written: quantised, or tied to another module's, which would change with it. The module
            is then as it was.
    """
    check_unmerged(module)
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter to merge.")
    before = state.running()
    if names is not None or head is not None:
        set_active(module, before.weights if names is None else names, head=head)
    try:
        check_mergeable(module)
    except ValueError:
        run_again(module, before)
        raise
    paths = state.paths()
    kept = module.__dict__[MERGED_KEY] = _Merged(before=before)
    try:
        for path in paths:
            layer: Any = module.get_submodule(path)
            if chain := layer.peft.chain():
                _fold(layer, chain, kept.weights, path)
            kept.additions[path] = take_off(layer)
        kept.state = close(module)
    except BaseException:
        _restore(module, module.__dict__.pop(MERGED_KEY))
        run_again(module, before)
        raise


def check_mergeable(module: nn.Module) -> None:
    """Raises what `merge` would for the active adapters, before anything else is done; see there."""
    check_unmerged(module)
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter to merge.")
    for path in state.paths():
        _check(module, path)


def unmerge(module: nn.Module) -> None:
    """Undoes `merge`: weights are bit for bit what they were, and the adapters are back and run as they did.

    Raises:
        ValueError: When nothing is merged, or one of its layers was adapted since from a module inside.
    """
    if MERGED_KEY not in module.__dict__:
        raise ValueError(f"{type(module).__name__} has no merged adapter to take out again.")
    kept: _Merged = module.__dict__[MERGED_KEY]
    if taken := [path for path in kept.additions if isinstance(module.get_submodule(path), Adapted)]:
        raise ValueError(f"{taken[0]} has an adapter of its own, attached since the merge; detach that one first.")
    del module.__dict__[MERGED_KEY]
    _restore(module, kept)
    assert kept.state is not None and kept.before is not None
    reopen(module, kept.state)
    run_again(module, kept.before)


def _restore(module: nn.Module, kept: _Merged) -> None:
    for path, (W, b) in kept.weights.items():
        layer: Any = module.get_submodule(path)
        layer_ops(layer).store(layer, W, b)
    for path, additions in kept.additions.items():
        device = next(module.get_submodule(path).parameters()).device
        put_on(module, path, additions.to(device))


def _check(module: nn.Module, path: str) -> None:
    """Raises ValueError, naming the layer, when its active additions cannot be folded into it."""
    layer: Any = module.get_submodule(path)
    chain = layer.peft.chain()
    if not chain:
        return
    if why := next((addition.not_mergeable for addition in chain if addition.not_mergeable is not None), None):
        raise ValueError(f"{path} cannot be merged: {why}")
    if (stored := layer_ops(layer).quantization(layer)) is not None:
        raise ValueError(f"{path} cannot be merged: its weight is quantised, {stored}.")
    holders = (
        (p, own) for p, child in module.named_modules() if child is not layer for own in child._parameters.values()
    )
    if tied := [p for p, own in holders if own is layer.weight]:
        raise ValueError(
            f"{path} cannot be merged: its weight is also that of {tied[0]}, which would change with it. Keep the "
            "adapter beside the base, or `lit-peft export` it; a new one merges where the two are untied before "
            "attaching, or where the layer is left out."
        )


def _fold(layer: Any, chain: Iterable[Any], weights: dict[str, tuple[Tensor, Tensor | None]], path: str) -> None:
    ops = layer_ops(layer)
    W, b = ops.matrix(layer).detach(), ops.bias(layer)
    b = None if b is None else b.detach()
    deltas = [copy.deepcopy(delta).float() for delta in chain if isinstance(delta, Delta)]
    with torch.no_grad():
        V, c = composed_weight(deltas, W.float()), composed_bias(deltas, None if b is None else b.float())
    if b is None and c is not None:
        raise ValueError(f"{path} cannot be merged: it has no bias, and its adapter adds one.")
    weights[path] = W.to("cpu", copy=True), None if b is None else b.to("cpu", copy=True)
    ops.store(layer, V, c)
