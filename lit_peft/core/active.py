"""Which of the adapters on a module run, and what else of the module belongs to them: heads, biases, statistics.

Additions lie side by side at their layers and need no switching but a name. Base parameters that an adapter trains, and
buffers that moved with it, have one place in the module: it holds those of the active adapters, and the registry keeps
those of the others aside.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call, Delta, Weighted
from lit_peft.core.buffers import holds, moved_buffers, moving_buffers, put_back
from lit_peft.core.layers import LayerOps, class_layer_ops
from lit_peft.core.registry import Adapter, Registry, registry
from lit_peft.core.sharded import sharded_like, whole
from lit_peft.core.swap import (
    CastsParameters,
    FrozenStatistics,
    Swapped,
    check_unmerged,
    restore_class,
    swap_class,
    with_running_statistics,
)


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
        self.weighted: dict[str, Weighted] = {}

    def chain(self) -> tuple[Addition, ...]:
        """The active additions, innermost first: adding deltas, then a scaling one, then whatever wraps."""
        if not self.weighted:
            return tuple(self._modules[name] for name in self.active)  # type: ignore[misc]
        return tuple(self.weighted.get(name, self[name]) for name in self.active)  # type: ignore[arg-type]

    def order(self, names: Iterable[str], path: str) -> tuple[str, ...]:
        """Those of these adapters that are here, in the order that composition asks for.

        Adding deltas come by their names, so that their sum is the same to the last bit however it is asked for; what
        wraps comes as it is named, since there the order matters.

        Raises:
            ValueError: When two scaling deltas meet, whose order would matter.
        """
        rank = {name: _rank(self[name]) for name in names if name in self}
        scaling = [name for name, r in rank.items() if r == 1]
        if len(scaling) > 1:
            raise ValueError(f"{path}: adapters {scaling} both rescale this weight; one scaling method a layer.")
        return tuple(sorted(rank, key=lambda name: (rank[name], name if rank[name] == 0 else "")))


def _rank(addition: nn.Module) -> int:
    return 2 if not isinstance(addition, Delta) else int(addition.scales)


# ---------------------------------------------------------------------------------------------- what runs


def set_active(
    module: nn.Module, names: str | Iterable[str] | Mapping[str, float] | None, *, head: str | None = None
) -> None:
    """Chooses the adapters that run: one name, several, whose changes add up, or None for the base.

    `V = W + sum_i w_i (weight_i(W) - W)` at every layer, `w_i` being 1 unless names come with weights; the sum is the
    same to the last bit whatever the order. An adapter alone gives what it gave where it was trained, bit for bit, and
    None what the base gave. What an adapter trains of the base itself, a head or biases, and the buffers that moved
    with it, come and go with it: nothing is loaded, and nothing copied but these.

    Args:
        module: What the adapters are attached to.
        names: Name, names, or {name: weight}.
        head: The one of several adapters whose base parameters and buffers count, where they train the same ones to
            different values: two heads make no sum.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When what is asked for does not compose: two adapters that rescale one weight; a weight for one that
            rescales, computes or trains biases instead of adding; base parameters that differ, without `head`; a base
            that an adapter has trained without keeping a copy. Or when the module is merged. Nothing has changed then.
    """
    state = registry(module)
    if state is None:
        check_unmerged(module)
    wanted = _with_weights(names)
    for name in [*wanted, *([] if head is None else [head])]:
        if state is None or name not in state.adapters:
            raise KeyError(_unknown(name, state))
    if head is not None and head not in wanted:
        raise ValueError(f"head: {head!r} is not among the adapters that are to run, {', '.join(wanted) or 'none'}.")
    if state is None:
        return
    changing = {path for name in {*state.active, *wanted} for path in state.adapters[name].sites}
    additions: dict[str, Any] = {path: module.get_submodule(path).peft for path in changing}
    # In two steps: what raises comes before what changes.
    chains = {path: child.order(wanted, path) for path, child in additions.items()}
    weighted = {name: weight for name, weight in wanted.items() if weight != 1.0}
    for name in weighted:
        _check_weight(state.adapters[name], additions)
    changed = {*state.active, *state.frozen} ^ wanted.keys() | state.frozen
    switch(module, wanted, head)
    for path, chain in chains.items():
        here = additions[path]
        here.active = chain
        here.weighted = {name: Weighted(here[name], weighted[name]) for name in chain if name in weighted}
    state.active, state.weights, state.frozen = tuple(wanted), weighted, set()
    _refreeze(module, state, [state.adapters[name] for name in changed], additions)


def _with_weights(names: str | Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    if not isinstance(names, Mapping):
        listed = [] if names is None else [names] if isinstance(names, str) else list(names)
        if twice := [name for name in listed if listed.count(name) > 1]:
            raise ValueError(f"Adapter {twice[0]!r} is named twice; to count it twice, {{{twice[0]!r}: 2}}.")
        return dict.fromkeys(listed, 1.0)
    for name, weight in names.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name!r} must be a finite number, not {weight!r}.")
    return {name: float(weight) for name, weight in names.items()}


def _unknown(name: str, state: Registry | None) -> str:
    known = sorted(state.adapters) if state is not None else []
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"No adapter is named {name!r}; this module has {known or 'none'}.{hint}"


def _check_weight(adapter: Adapter, additions: Mapping[str, Any]) -> None:
    """Raises ValueError where a weight would have no meaning."""
    for path in adapter.sites:
        if (rank := _rank(additions[path][adapter.name])) > 0:
            why = "rescales its layers instead of adding to them" if rank == 1 else "is no change of a weight"
            raise ValueError(f"{path}: adapter {adapter.name!r} {why}, and has no weighted sum; give it no weight.")
    itself = sorted(set(adapter.base) - set(adapter.head)) or ([] if adapter.sites else adapter.base)
    if itself:
        raise ValueError(
            f"Adapter {adapter.name!r} trains {itself[0]} of the base itself, which has no weighted sum; give it no "
            "weight."
        )


@contextmanager
def running(module: nn.Module, name: str) -> Iterator[None]:
    """Lets one adapter run alone as long as the context lasts, and then again those that did.

    Gradients of base parameters, which the change would take away, are put back.
    """
    state = registry(module)
    if state is None or state.running() == {name: 1.0}:
        yield
        return
    before, frozen, head = state.running(), set(state.frozen), state.head
    grads = {n: module.get_parameter(n).grad for adapter in state.adapters.values() for n in adapter.base}
    set_active(module, name)
    try:
        yield
    finally:
        set_active(module, before, head=head)
        for n, grad in grads.items():
            module.get_parameter(n).grad = grad
        state.frozen = frozen
        freeze(module)


@contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Stops the adapters that run, for another that is attached and loaded; where that fails, they run again."""
    state = registry(module)
    if state is None:
        yield
        return
    before, frozen, head = state.running(), set(state.frozen), state.head
    set_active(module, None)
    try:
        yield
    except Exception:
        set_active(module, before, head=head)
        state.frozen = frozen
        freeze(module)
        raise


# ------------------------------------------------------------------- base parameters and buffers of adapters


def values_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter has trained or moved of the base: while it runs the module's own tensors, else copies."""
    state = registry(module)
    assert state is not None
    live: set[str] = set()
    if name in state.active:
        by_design = moving_buffers(module, [state.adapters[other] for other in state.active])
        own = {*state.adapters[name].base, *moving_buffers(module, [state.adapters[name]])}
        live = own | (state.moved - by_design)  # the rest belongs to all of them
    return {key: attrgetter(key)(module) for key in live} | state.aside.get(name, {})


@torch.inference_mode(False)
@torch.no_grad()
def switch(module: nn.Module, wanted: Collection[str], head: str | None = None, *, leave: bool = False) -> None:
    """Puts base parameters and buffers of these adapters into the module, and keeps those of the others aside.

    Args:
        module: The adapted module.
        wanted: The adapters that are to run.
        head: See `set_active`.
        leave: Whether parameters without a copy of the base keep their values, instead of being refused.

    Raises:
        ValueError: When there is no such state of the base. Nothing has changed then.
    """
    state = registry(module)
    assert state is not None
    if set(state.active) == set(wanted) and state.head == head:
        return
    state.moved |= moved_buffers(module, state.originals)
    values = {name: values_of(module, name) for name in dict.fromkeys([*state.active, *wanted])}
    target = _agreed({name: values[name] for name in wanted}, head)
    back = ({key for name in state.active for key in values[name]} | state.moved) - target.keys()
    parameters = {key for key in back if isinstance(attrgetter(key)(module), nn.Parameter)}
    if (lost := sorted(parameters - state.originals.keys())) and not leave:
        trained = next(name for name in state.active if lost[0] in values[name])
        raise ValueError(
            f"Adapter {trained!r} has trained {lost[0]} and keeps no copy of the base: it cannot be switched off. "
            f"lit_peft.detach(module, {trained!r}) takes it off and leaves the trained values in place."
        )
    aside = {}
    for name, own in values.items():
        kept = {key: value for key, value in own.items() if name not in wanted or not holds(value, target[key])}
        copied = state.aside.get(name, {})
        aside[name] = {key: value if key in copied else value.detach().clone() for key, value in kept.items()}
    own_names = {key for name in wanted for key in state.adapters[name].base}
    own_names |= moving_buffers(module, [state.adapters[name] for name in wanted])
    for key, value in (target | {key: state.originals[key] for key in back & state.originals.keys()}).items():
        _write(module, key, value)
    state.aside = {n: kept for n, kept in (state.aside | aside).items() if kept}
    state.head, state.moved = head, target.keys() - own_names


def _agreed(values: Mapping[str, Mapping[str, Tensor]], head: str | None) -> dict[str, Tensor]:
    """Of the values that adapters have for the base the ones that count, all of them or `head`'s."""
    target: dict[str, Tensor] = {}
    whose: dict[str, str] = {}
    for name in sorted(values, key=lambda name: name != head):
        for key, value in values[name].items():
            if key not in target:
                target[key], whose[key] = value, name
            elif whose[key] != head and not holds(value, target[key]):
                raise ValueError(
                    f"Adapters {whose[key]!r} and {name!r} have both trained or moved {key}, to different values, "
                    f"which make no sum: name the one that counts, head={name!r}, or let one run alone."
                )
    return target


def _write(module: nn.Module, key: str, value: Tensor) -> None:
    """Gives a parameter or buffer of the base a value, in place."""
    owner, _, leaf = key.rpartition(".")
    layer = module.get_submodule(owner)
    parameter = layer._parameters.get(leaf)
    if parameter is None:
        put_back(module, [key], {key: value})
    elif parameter is not value:
        parameter.grad = None  # of other values
        if isinstance(layer, CastsParameters) and parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device, copy=True)  # the base in its own dtype, which may hold more
        else:
            parameter.copy_(sharded_like(whole(value).to(parameter.device), parameter))


# -------------------------------------------------------------------------------------------- what trains


def freeze(module: nn.Module) -> None:
    """Sets `requires_grad` of every parameter: the union of what the running adapters train, and nothing else.

    Layers with running statistics and no parameter that trains are kept in evaluation mode, since their
    statistics belong to the frozen base, unless an adapter has `update_norm_stats`.
    """
    state = registry(module)
    trainable = state.trainable_names() if state is not None else set()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    _hold_statistics(module, state, (path for path, _ in with_running_statistics(module)))


def _refreeze(
    module: nn.Module, state: Registry, changed: Iterable[Adapter], additions: Mapping[str, Additions]
) -> None:
    """The same where these adapters alone have begun or ceased to train: a module may have a thousand others."""
    training = {adapter.name: adapter for adapter in state.training()}
    bases = {name for adapter in training.values() for name in adapter.base}
    for adapter in changed:
        for path, tensors in adapter.sites.items():
            addition = additions[path][adapter.name]
            for tensor in tensors:
                addition.get_parameter(tensor).requires_grad_(adapter.name in training)
        for name in adapter.base:
            module.get_parameter(name).requires_grad_(name in bases)
        owners = {name.rpartition(".")[0] for name in adapter.base}
        if adapter.update_norm_stats:
            owners.update(path for path, _ in with_running_statistics(module))
        _hold_statistics(module, state, owners)


def _hold_statistics(module: nn.Module, state: Registry | None, paths: Iterable[str]) -> None:
    released = state is not None and any(adapter.update_norm_stats for adapter in state.training())
    for path in paths:
        child = module.get_submodule(path)
        if not getattr(child, "track_running_stats", False):
            continue
        if released or any(p.requires_grad for p in child.parameters(recurse=False)):
            release_statistics(module, path)
        else:
            swap_class(child, FrozenStatistics)
            child.eval()


def release_statistics(module: nn.Module, path: str) -> None:
    """Lets a layer follow the mode of the module around it again."""
    child = module.get_submodule(path)
    if isinstance(child, FrozenStatistics):
        restore_class(child, FrozenStatistics)
        child.train(module.get_submodule(path.rpartition(".")[0]).training)
