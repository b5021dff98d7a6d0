"""Attaching additions to a module: registry of adapters, freezing, which ones run; and the way back."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call, Delta
from lit_peft.core.buffers import base_buffers, moving_buffers, put_back
from lit_peft.core.fingerprint import fingerprint
from lit_peft.core.layers import LayerOps, class_layer_ops
from lit_peft.core.swap import (
    FrozenStatistics,
    Swapped,
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


class Adapted(Swapped):
    """What a layer becomes: itself, with the additions as its child `peft`."""

    peft: "Additions"
    layer_ops: LayerOps | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.layer_ops = class_layer_ops(cls)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        below = self.peft.chain()
        run = super().forward  # type: ignore[misc]
        return Call(self, below, run)(*args, **kwargs) if below else run(*args, **kwargs)  # type: ignore[arg-type]


class Additions(nn.ModuleDict):
    """The additions of one site by adapter name; `active` names those that run, innermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def chain(self) -> tuple[Addition, ...]:
        """The active additions, innermost first: adding deltas, then a scaling one, then whatever wraps."""
        return tuple(self._modules[name] for name in self.active)  # type: ignore[misc]

    def order(self, names: Iterable[str], path: str) -> tuple[str, ...]:
        """Those of these adapters that are here, in the order that composition asks for.

        Raises:
            ValueError: When two scaling deltas meet, whose order would matter.
        """
        rank = {name: _rank(self[name]) for name in names if name in self}
        scaling = [name for name, r in rank.items() if r == 1]
        if len(scaling) > 1:
            raise ValueError(f"{path}: adapters {scaling} both rescale this weight; one scaling method a layer.")
        return tuple(sorted(rank, key=lambda name: rank[name]))


def _rank(addition: nn.Module) -> int:
    return 2 if not isinstance(addition, Delta) else int(addition.scales)


# ------------------------------------------------------------------------------------------------ registry


@dataclass
class Adapter:
    """What the registry knows of one attached adapter; plain data, so that it copies and pickles."""

    name: str
    spec: dict[str, Any]
    """Class path and arguments of the method, as the checkpoint keeps them."""
    sites: dict[str, list[str]] = field(default_factory=dict)
    """Path of each adapted module -> names of its trainable tensors."""
    base: list[str] = field(default_factory=list)
    """Base parameters that this adapter trains."""
    head: list[str] = field(default_factory=list)
    """Those among them that `train_also` named."""
    scales: dict[str, float] = field(default_factory=dict)
    """Base parameter -> scale of its learning rate, where `train_also` gives one other than 1."""
    update_norm_stats: bool = False
    """Whether running statistics move in training although their layers are frozen."""
    trainable: bool = True
    prepared: bool = False
    """Whether a fit has begun with it or with its checkpoint, so that `Method.prepare` must not start it again."""


@dataclass
class Registry:
    """All adapters of one module tree, kept on its root."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required_grad: set[str] = field(default_factory=set)
    """Base parameters that required a gradient before the first adapter came; `detach` gives it back."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Host copies of base parameters that train and of the base's saved buffers, as they were at first."""
    moved: set[str] = field(default_factory=set)
    """Base buffers that were seen with other values than at first, or that a checkpoint brought."""
    fingerprint: dict[str, str] = field(default_factory=dict)

    def trainable_names(self) -> set[str]:
        """Names of all parameters that train: the union over the adapters."""
        names: set[str] = set()
        for adapter in self.adapters.values():
            if adapter.trainable:
                names.update(adapter.base)
                names.update(
                    f"{path}.peft.{adapter.name}.{tensor}".lstrip(".")
                    for path, tensors in adapter.sites.items()
                    for tensor in tensors
                )
        return names


_REGISTRY_KEY = "_lit_peft"


def registry(module: nn.Module) -> Registry | None:
    """The registry of the adapters attached to `module`, or None where there is none."""
    return module.__dict__.get(_REGISTRY_KEY)


# ------------------------------------------------------------------------------------------ attach, detach


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
    """Attaches one adapter: swaps classes, casts, initialises, freezes the rest, and makes it active.

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
        buffers = set(base_buffers(module))
        state = Registry(
            required_grad={n for n, p in module.named_parameters() if p.requires_grad},
            fingerprint=fingerprint(module),
        )
        module.__dict__[_REGISTRY_KEY] = state
    adapter = state.adapters[name] = Adapter(
        name, spec or {}, base=base, head=sorted(head), scales=dict(scales or {}), update_norm_stats=update_norm_stats
    )
    own = {*base, *moving_buffers(module, [adapter])}
    for key in ((buffers | own) if keep_originals else (buffers - own)) - set(state.originals):
        tensor = attrgetter(key)(module)
        if not tensor.is_meta:
            state.originals[key] = tensor.detach().to("cpu", copy=True)
    try:
        for site, addition in pairs:
            _add(module, site, name, addition, dtype)
            adapter.sites[site.path] = [n for n, p in addition.named_parameters() if p.requires_grad]
        cast_parameters(module, base, dtype)
        freeze(module)
        set_active(module, [*state.active, name])
    except Exception:
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
    for path, child in module.named_modules():
        if path and registry(child) is not None:
            raise ValueError(f"{path} has adapters of its own; attach all adapters at one root, here or there.")
        if path.rpartition(".")[2] == "_orig_mod":
            raise ValueError(
                f"{path.rpartition('.')[0] or 'The module'} was wrapped by torch.compile, which renames all "
                "parameters. Attach first, then compile in place: model.compile()."
            )
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise ValueError(
                f"{path or type(child).__name__} is sharded already: adapters attached now would differ from "
                "rank to rank. Attach first, then shard (a LightningModule's shard(mesh) runs after us)."
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
    digest = hashlib.sha256(f"{torch.initial_seed()}/{name}/{site.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad(), torch.device("cpu"):  # Lightning is in its accelerator's context
        addition.init(site, generator)


def freeze(module: nn.Module) -> None:
    """Sets `requires_grad` of every parameter: the union of what the adapters train, and nothing else.

    Layers with running statistics and no parameter that trains are kept in evaluation mode, since their
    statistics belong to the frozen base, unless an adapter has `update_norm_stats`.
    """
    state = registry(module)
    trainable = state.trainable_names() if state is not None else set()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    released = state is not None and any(adapter.update_norm_stats for adapter in state.adapters.values())
    for path, child in with_running_statistics(module):
        if released or any(p.requires_grad for p in child.parameters(recurse=False)):
            _release_statistics(module, path)
        else:
            swap_class(child, FrozenStatistics)
            child.eval()


def _release_statistics(module: nn.Module, path: str) -> None:
    """Lets a layer follow the mode of the module around it again."""
    child = module.get_submodule(path)
    if isinstance(child, FrozenStatistics):
        restore_class(child, FrozenStatistics)
        child.train(module.get_submodule(path.rpartition(".")[0]).training)


def set_active(module: nn.Module, names: str | Iterable[str] | None) -> None:
    """Chooses the adapters that run: one name, several (their changes add up), or None for the bare base.

    Base parameters that train are not switched: they keep their trained values until `detach`.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When two of them rescale one weight, or the module is merged.
    """
    check_unmerged(module)
    state = registry(module)
    known = state.adapters if state is not None else {}
    wanted = [] if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise KeyError(f"No adapter is named {name!r}; this module has {sorted(known) or 'none'}.")
    if state is None:
        return
    paths = {path for adapter in known.values() for path in adapter.sites}
    additions: dict[str, Any] = {path: module.get_submodule(path).peft for path in paths}
    # In two steps: what raises comes before what changes.
    chains = {path: child.order(wanted, path) for path, child in additions.items()}
    for path, chain in chains.items():
        additions[path].active = chain
    state.active = tuple(wanted)


def detach(module: nn.Module, name: str | None = None) -> None:
    """Takes adapters off again, all of them or the one named; the module is then what it was before.

    Base parameters that trained, and buffers that moved, get their first values back, unless `keep_originals` was off.
    Buffers that belong to no adapter, as an average that a frozen layer keeps, get them with the last one.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When the module is merged.
    """
    check_unmerged(module)
    state = registry(module)
    if state is None or (name is not None and name not in state.adapters):
        raise KeyError(f"No adapter is named {name!r}; this module has {sorted(state.adapters) if state else 'none'}.")
    gone = [state.adapters.pop(name)] if name else list(state.adapters.values())
    if not name:
        state.adapters.clear()
    for adapter in gone:
        for path in adapter.sites:
            _remove(module.get_submodule(path), adapter.name)
    kept = {n for adapter in state.adapters.values() for n in adapter.base}
    names = {n for adapter in gone for n in adapter.base} - kept
    restore_parameters(module, names, state.originals)
    back = set(state.originals)  # of buffers alone by now, unless adapters stay
    if state.adapters:
        back &= moving_buffers(module, gone) - moving_buffers(module, state.adapters.values())
    put_back(module, back, state.originals)
    state.moved -= back
    if state.adapters:
        freeze(module)
        set_active(module, [n for n in state.active if n in state.adapters])
    else:
        close(module)


def _remove(layer: Any, name: str) -> None:
    del layer.peft[name]
    if not layer.peft:
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
    state: Registry = module.__dict__.pop(_REGISTRY_KEY)
    for path, child in module.named_modules():
        _release_statistics(module, path)
        restore_fast_path(child)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in state.required_grad)
    return state


def reopen(module: nn.Module, state: Registry) -> None:
    """Undoes `close`, once the additions are back."""
    module.__dict__[_REGISTRY_KEY] = state
    freeze(module)
