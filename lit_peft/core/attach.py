"""Attaching additions to a module, and the way back."""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lit_peft.core.active import Adapted, Additions, freeze, release_statistics, run_again
from lit_peft.core.addition import Addition
from lit_peft.core.buffers import base_buffers, moving_buffers, put_back
from lit_peft.core.fingerprint import fingerprint
from lit_peft.core.owned import switch
from lit_peft.core.quantize import recognise
from lit_peft.core.registry import REGISTRY_KEY, Adapter, Registry, Running, registry
from lit_peft.core.remake import note_inputs
from lit_peft.core.sharded import check_unsharded
from lit_peft.core.streams import stream
from lit_peft.core.swap import (
    cast_parameters,
    check_forward,
    check_unmerged,
    leave_fast_path,
    restore_class,
    restore_fast_path,
    restore_parameters,
    swap_class,
    with_running_statistics,
)
from lit_peft.core.targets import Site

ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `adapter_dtype` accepts beside "auto", float32 (but see training/seam.py on bf16-true)."""


def attach(
    module: nn.Module,
    name: str,
    additions: Iterable[tuple[Site, Addition]],
    base: Iterable[str],
    *,
    head: Iterable[str] = (),
    scales: Mapping[str, float] | None = None,
    spec: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    keep_originals: bool = True,
    update_norm_stats: bool = False,
) -> Adapter:
    """Attaches one adapter: swaps classes, casts, initialises, freezes the rest, and adds it to the active ones.

    Base parameters that it trains start from what they are now: where an active adapter has trained them too, from
    there. To begin at the base, `set_active(module, None)` first.

    Args:
        module: Root of the module tree; the registry is kept on it.
        name: Name of the adapter, unique on this module.
        additions: Where each addition goes.
        base: Names of base parameters that this adapter trains.
        head: Those among them that `train_also` named.
        scales: Base parameter -> scale of its learning rate, where that is not 1.
        spec: Class path and arguments of the method, kept for checkpoints.
        dtype: Dtype of everything that trains.
        keep_originals: Whether to keep a host copy of the base parameters that train, for `detach`. Buffers of the
            base are copied in any case, since that is how a checkpoint knows which have moved, but for those that
            are saved whether or not they have.
        update_norm_stats: Whether frozen normalisation layers update their running statistics in training.

    Raises:
        ValueError: When the name is taken or not a Python identifier, nothing would train, there are no running
            statistics to update, the module is sharded already or merged, or a site cannot carry an addition. The
            module is then as it was.
    """
    check_attachable(module, name)
    pairs, base = list(additions), sorted(base)
    for site, _ in pairs:
        _check_site(site)
    if not pairs and not base:
        raise ValueError(f"Adapter {name!r} trains nothing: no addition was built, no base parameter is trained.")
    if update_norm_stats and not any(with_running_statistics(module)):
        raise ValueError(
            f"update_norm_stats: {type(module).__name__} has no layer with running statistics, as BatchNorm has; "
            "leave it out."
        )
    state, buffers = registry(module), set[str]()
    if state is None:
        recognise(module)
        buffers = set(base_buffers(module))
        state = Registry(
            required_grad={n for n, p in module.named_parameters() if p.requires_grad},
            fingerprint=fingerprint(module),
        )
        module.__dict__[REGISTRY_KEY] = state
    adapter = state.adapters[name] = Adapter(
        name, spec or {}, base=base, head=sorted(head), scales=dict(scales or {}), update_norm_stats=update_norm_stats
    )
    own = {*base, *moving_buffers(module, [adapter])}
    for key in sorted(((buffers | own) if keep_originals else (buffers - own)) - set(state.originals)):
        tensor = attrgetter(key)(module)
        if not tensor.is_meta:
            state.originals[key] = tensor.detach().to("cpu", copy=True)
    try:
        for site, addition in pairs:
            _add(module, site, name, addition, dtype)
            adapter.sites[site.path] = [n for n, p in addition.named_parameters() if p.requires_grad]
        cast_parameters(module, base, dtype)
        state.active += (name,)
        freeze(module)
        run_again(module, state.running())
        note_inputs(module)
    except BaseException:
        detach(module, name)
        raise
    return adapter


def check_attachable(module: nn.Module, name: str) -> None:
    """Raises ValueError when no adapter of this name can be attached to the module now."""
    check_unmerged(module)
    state = registry(module)
    if state is not None and name in state.adapters:
        raise ValueError(f"This module already has an adapter named {name!r}; give the new one another `name`.")
    if not name.isidentifier():
        raise ValueError(f"Adapter name {name!r} must be a Python identifier: it becomes part of parameter names.")
    if hasattr(Additions, name) or name in vars(Additions()):
        raise ValueError(f"Adapter name {name!r} is taken: a module has an attribute of that name. Choose another.")
    for path, child in module.named_modules():
        if path and registry(child) is not None:
            raise ValueError(f"{path} has adapters of its own; attach all adapters at one root, here or there.")
        if path.rpartition(".")[2] == "_orig_mod":
            raise ValueError(
                f"{path.rpartition('.')[0] or 'The module'} was wrapped by torch.compile, which renames all "
                "parameters. Attach first, then compile in place: model.compile()."
            )
    check_unsharded(
        module,
        "adapters attached now would differ from rank to rank. Attach first, then shard (a LightningModule's "
        "shard(mesh) runs after us).",
    )


def _check_site(site: Site) -> None:
    kind = type(site.layer).__name__
    if isinstance(site.layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{site.path}: a {kind} iterates over its children and cannot carry an adapter; name one.")
    check_forward(site.path, site.layer)


def _add(module: nn.Module, site: Site, name: str, addition: Addition, dtype: torch.dtype) -> None:
    layer: Any = site.layer
    own = next(layer.parameters(recurse=False), None)
    device = own.device if own is not None else next(module.parameters()).device
    if device.type != "meta":
        _initialise(site, name, addition)  # on the host, in float32: the same values on every kind of device
    if not isinstance(layer, Adapted):
        put_on(module, site.path, Additions())
    layer.peft[name] = addition.to(device=device, dtype=dtype).train(layer.training)


def _initialise(site: Site, name: str, addition: Addition) -> None:
    """Starting values from a stream of the site's own: equal on every rank, whatever else is attached."""
    generator = stream(f"{torch.initial_seed()}/{name}/{site.path}")
    with torch.no_grad(), torch.device("cpu"):  # Lightning is in its accelerator's context
        addition.init(site, generator)


def detach(module: nn.Module, name: str | None = None) -> None:
    """Takes adapters off again, all of them or the one named; the module is then what it was before they came.

    A base that a method has quantised stays so.

    Base parameters that trained, and buffers that moved, get their first values back, unless `keep_originals` was off.
    Buffers that belong to no adapter, as an average that a frozen layer keeps, get them with the last one.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When the module is merged or sharded.
    """
    check_unmerged(module)
    check_unsharded(module, "adapters cannot be taken off it. Load the base again in one process.")
    state = registry(module)
    if state is None or (name is not None and name not in state.adapters):
        raise KeyError(f"No adapter is named {name!r}; this module has {sorted(state.adapters) if state else 'none'}.")
    gone = [state.adapters[name]] if name else list(state.adapters.values())
    before = state.running()
    weights = {n: weight for n, weight in before.weights.items() if name is not None and n != name}
    head = before.head if before.head in weights else None
    switch(module, Running(weights, head, shadowed=before.shadowed), leave=True)
    for adapter in gone:
        for path in adapter.sites:
            _remove(module.get_submodule(path), adapter.name)
        del state.adapters[adapter.name]
        state.aside.pop(adapter.name, None)
    state.active = tuple(weights)
    state.weights = {n: weight for n, weight in weights.items() if weight != 1.0}
    state.frozen &= weights.keys()
    kept = {n for adapter in state.adapters.values() for n in adapter.base}
    restore_parameters(module, {n for adapter in gone for n in adapter.base} - kept, state.originals)
    if state.adapters:
        freeze(module)
        note_inputs(module)
    else:
        put_back(module, state.originals, state.originals)  # of buffers alone by now
        close(module)


def _remove(layer: Any, name: str) -> None:
    here = layer.peft
    del here[name]
    here.active = tuple(n for n in here.active if n != name)
    here.weighted.pop(name, None)
    if not here:
        take_off(layer)


def take_off(layer: Any) -> Additions:
    """Makes an adapted layer what it was before; returns its additions."""
    additions = layer.peft
    del layer.peft
    restore_class(layer, Adapted)
    return additions


def put_on(module: nn.Module, path: str, additions: Additions) -> None:
    """Makes the layer at a path, which must not be one, an adapted one with these additions."""
    layer: Any = module.get_submodule(path)
    assert not isinstance(layer, Adapted)
    swap_class(layer, Adapted)
    layer.peft = additions
    layer.peft.train(layer.training)
    leave_fast_path(module, path)


def close(module: nn.Module) -> Registry:
    """Leaves a module that has no additions any more as it was before the first: modes, gradients, no registry."""
    state: Registry = module.__dict__.pop(REGISTRY_KEY)
    for path, child in module.named_modules():
        release_statistics(module, path)
        restore_fast_path(child)
    recognise(module)  # quantised layers need what was undone there, whether or not they carry anything
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in state.required_grad)
    note_inputs(module)
    return state


def reopen(module: nn.Module, state: Registry) -> None:
    """Undoes `close`, once the additions are back."""
    module.__dict__[REGISTRY_KEY] = state
    freeze(module)
    note_inputs(module)
