"""Attaching additions to a module: class swap, registry of adapters, freezing, dtypes; and the way back."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call, Delta
from lit_peft.core.fingerprint import fingerprint
from lit_peft.core.layers import find_layer_ops
from lit_peft.core.targets import Site

ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `adapter_dtype` accepts beside "auto", which means float32 (methods/base.py refines it by precision)."""


# ---------------------------------------------------------------------------------------------- class swap


class Swapped:
    """Mixin of every swapped class: it pickles and copies as its base class, and is swapped again when rebuilt."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixins, base = _unswapped(type(self))
        return _rebuild, (mixins, base), self.__getstate__()


def _unswapped(cls: type) -> tuple[tuple[type, ...], type]:
    """The mixins that a class was swapped with, first one first, and the class that it was before."""
    mixins: list[type] = []
    while Swapped in cls.__bases__[0].__bases__:
        mixin, cls = cls.__bases__
        mixins.insert(0, mixin)
    return tuple(mixins), cls


def _swapped(mixins: Iterable[type], base: type) -> type:
    return functools.reduce(lambda cls, mixin: swapped_class(mixin, cls), mixins, base)


def _rebuild(mixins: tuple[type, ...], base: type) -> Any:
    return base.__new__(_swapped(mixins, base))


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    """The one subclass of `mixin` and `base`.

    It is cached because torch.compile recompiles for every class, and it carries the base's names because
    `save_pretrained` writes the class name into the config and error messages show it.
    """
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (mixin, base), names)


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Gives `module` the cached subclass that puts `mixin` before its class; nothing if it has it already."""
    if not isinstance(module, mixin):
        module.__class__ = swapped_class(mixin, type(module))


def restore_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Undoes `swap_class`, whatever other mixins the class has; nothing if it has not this one."""
    if isinstance(module, mixin):
        mixins, base = _unswapped(type(module))
        module.__class__ = _swapped((m for m in mixins if m is not mixin), base)


class Adapted(Swapped):
    """What a layer becomes: itself, with the additions as its child `peft`."""

    peft: "Additions"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        below = self.peft.chain()
        run = super().forward  # type: ignore[misc]
        return Call(self, below, run)(*args, **kwargs) if below else run(*args, **kwargs)  # type: ignore[arg-type]


class CastsParameters(Swapped):
    """A base layer that trains in a wider dtype than it computes in: float32 biases of a bfloat16 layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
        kept = dict(own)
        try:
            if not torch.is_autocast_enabled(x.device.type):
                own.update({name: p.to(x.dtype) for name, p in kept.items() if p is not None})
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            own.update(kept)


class FrozenStatistics(Swapped):
    """A normalisation layer that stays in evaluation mode: its running statistics belong to the frozen base."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


class Additions(nn.ModuleDict):
    """The additions of one site by adapter name; `active` names those that run, innermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def chain(self) -> tuple[Addition, ...]:
        """The active additions, innermost first: adding deltas, then a scaling one, then whatever wraps."""
        return tuple(self._modules[name] for name in self.active)  # type: ignore[misc]

    def activate(self, names: Iterable[str], path: str) -> None:
        """Makes these adapters the active ones, in the order that composition asks for.

        Raises:
            ValueError: When two scaling deltas meet, whose order would matter.
        """
        rank = {name: _rank(self[name]) for name in names if name in self}
        scaling = [name for name, r in rank.items() if r == 1]
        if len(scaling) > 1:
            raise ValueError(f"{path}: adapters {scaling} both rescale this weight; one scaling method a layer.")
        self.active = tuple(sorted(rank, key=lambda name: rank[name]))


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
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Host copies of those, as they were before."""
    trainable: bool = True


@dataclass
class Registry:
    """All adapters of one module tree, kept on its root."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required_grad: set[str] = field(default_factory=set)
    """Base parameters that required a gradient before the first adapter came; `detach` gives it back."""
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
    spec: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    keep_originals: bool = True,
) -> Adapter:
    """Attaches one adapter: swaps classes, casts, initialises, freezes the rest, and makes it active.

    Args:
        module: Root of the module tree; the registry is kept on it.
        name: Name of the adapter, unique on this module.
        additions: Where each addition goes.
        base: Names of base parameters that this adapter trains.
        spec: Class path and arguments of the method, kept for checkpoints.
        dtype: Dtype of everything that trains.
        keep_originals: Whether to keep a host copy of the base parameters that train, for `detach`.

    Raises:
        ValueError: When the name is taken or not a Python identifier, nothing would train, the module has been
            sharded already, or a site cannot carry an addition.
    """
    check_attachable(module, name)
    pairs, base = list(additions), sorted(base)
    for site, _ in pairs:
        _check_site(site)
    if not pairs and not base:
        raise ValueError(f"Adapter {name!r} trains nothing: no addition was built and no base parameter is trained.")
    state = registry(module)
    if state is None:
        state = Registry(
            required_grad={n for n, p in module.named_parameters() if p.requires_grad},
            fingerprint=fingerprint(module),
        )
        module.__dict__[_REGISTRY_KEY] = state
    adapter = Adapter(name, spec or {}, base=base)
    for site, addition in pairs:
        adapter.sites[site.path] = [n for n, p in addition.named_parameters() if p.requires_grad]
        _add(module, site, name, addition, dtype)
    if keep_originals:
        adapter.originals = {n: module.get_parameter(n).detach().to("cpu", copy=True) for n in base}
    _cast_base(module, base, dtype)
    state.adapters[name] = adapter
    freeze(module)
    set_active(module, [*state.active, name])
    return adapter


def check_attachable(module: nn.Module, name: str) -> None:
    """Raises ValueError when no adapter of this name can be attached to the module now."""
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
                f"{path.rpartition('.')[0] or 'The module'} was wrapped by torch.compile, which renames every "
                "parameter. Attach first, then compile in place: model.compile()."
            )
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise ValueError(
                f"{path or type(child).__name__} is sharded already: adapters attached now would differ from rank to "
                "rank. Attach first, then shard (a LightningModule's `shard(mesh)` runs after attaching)."
            )


def _check_site(site: Site) -> None:
    kind = type(site.layer).__name__
    if isinstance(site.layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{site.path}: a {kind} iterates over its children and cannot carry an adapter; name one.")
    if "forward" in site.layer.__dict__:
        raise ValueError(
            f"{site.path}: this {kind} carries a forward of its own instance (accelerate's device_map leaves one), "
            "which would hide the adapter. Load the model without device_map."
        )


def _no_op_hook(module: nn.Module, args: Any) -> None:
    """Does nothing: that it is there keeps nn.TransformerEncoderLayer from its fast path."""


def _add(module: nn.Module, site: Site, name: str, addition: Addition, dtype: torch.dtype) -> None:
    layer: Any = site.layer
    own = next(layer.parameters(recurse=False), None)
    device = own.device if own is not None else next(module.parameters()).device
    if device.type != "meta":
        _initialise(site, name, addition)  # on the host and in float32: the same values on every kind of device
    if not isinstance(layer, Adapted):
        swap_class(layer, Adapted)
        layer.peft = Additions()
        layer.peft.train(layer.training)
        if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in _ancestors(module, site.path)):
            # In evaluation it reads linear1.weight itself and would pass the adapter by, unless a hook is there.
            layer.__dict__["_lit_peft_hook"] = layer.register_forward_pre_hook(_no_op_hook)
    layer.peft[name] = addition.to(device=device, dtype=dtype).train(layer.training)


def _ancestors(module: nn.Module, path: str) -> Iterator[nn.Module]:
    parts = path.split(".")
    return (module.get_submodule(".".join(parts[:i])) for i in range(len(parts)))


def _initialise(site: Site, name: str, addition: Addition) -> None:
    """Starting values from a stream of the site's own: equal on every rank, whatever else is attached."""
    digest = hashlib.sha256(f"{torch.initial_seed()}/{name}/{site.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad():
        addition.init(site, generator)


def _cast_base(module: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Gives the base parameters that train the dtype of the adapters."""
    for name in names:
        parameter = module.get_parameter(name)
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is quantised ({parameter.dtype}) and cannot be trained; leave it out.")
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            swap_class(module.get_submodule(name.rpartition(".")[0]), CastsParameters)


def freeze(module: nn.Module) -> None:
    """Sets `requires_grad` of every parameter: the union of what the adapters train, and nothing else.

    Layers with running statistics and no parameter that trains are kept in evaluation mode, since their
    statistics belong to the frozen base.
    """
    state = registry(module)
    trainable = state.trainable_names() if state is not None else set()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    for child in module.modules():
        if getattr(child, "track_running_stats", False):
            if any(p.requires_grad for p in child.parameters(recurse=False)):
                restore_class(child, FrozenStatistics)
            else:
                swap_class(child, FrozenStatistics)
                child.eval()


def set_active(module: nn.Module, names: str | Iterable[str] | None) -> None:
    """Chooses the adapters that run: one name, several (their changes add up), or None for the bare base.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When two of them rescale one weight.
    """
    state = registry(module)
    known = state.adapters if state is not None else {}
    wanted = [] if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise KeyError(f"No adapter is named {name!r}; this module has {sorted(known) or 'none'}.")
    if state is None:
        return
    for path in {path for adapter in known.values() for path in adapter.sites}:
        layer: Any = module.get_submodule(path)
        layer.peft.activate(wanted, path)
    state.active = tuple(wanted)


def detach(module: nn.Module, name: str | None = None) -> None:
    """Takes adapters off again, all of them or the one named; the module is then what it was before.

    Base parameters that trained get their first values back, unless `keep_originals` was off.

    Raises:
        KeyError: For a name that no adapter has.
    """
    state = registry(module)
    if state is None or (name is not None and name not in state.adapters):
        raise KeyError(f"No adapter is named {name!r}; this module has {sorted(state.adapters) if state else 'none'}.")
    for adapter in [state.adapters[name]] if name else list(state.adapters.values()):
        for path in adapter.sites:
            _remove(module.get_submodule(path), adapter.name)
        for parameter, original in adapter.originals.items():
            target = module.get_parameter(parameter)
            target.data = original.to(target.device)
            restore_class(module.get_submodule(parameter.rpartition(".")[0]), CastsParameters)
        del state.adapters[adapter.name]
    if state.adapters:
        freeze(module)
        set_active(module, [n for n in state.active if n in state.adapters])
        return
    del module.__dict__[_REGISTRY_KEY]
    for child in module.modules():
        if isinstance(child, FrozenStatistics):
            restore_class(child, FrozenStatistics)
            child.train(module.training)
    for parameter_name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter_name in state.required_grad)


def _remove(layer: Any, name: str) -> None:
    del layer.peft[name]
    if not layer.peft:
        del layer.peft
        restore_class(layer, Adapted)
        hook = layer.__dict__.pop("_lit_peft_hook", None)
        if hook is not None:
            hook.remove()
