"""Which of the adapters on a module run, and which train.

Additions lie side by side at their layers and need no switching but a name; what adapters have of the base itself is
put in place by `lit_peft.core.owned`.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call, Delta, Weighted
from lit_peft.core.buffers import moved_buffers
from lit_peft.core.layers import LayerOps, class_layer_ops
from lit_peft.core.owned import switch, values_of
from lit_peft.core.registry import Adapter, Registry, Running, registry
from lit_peft.core.swap import (
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
    wanted = with_weights(names)
    for name in [*wanted, *([] if head is None else [head])]:
        if state is None or name not in state.adapters:
            raise KeyError(unknown(name, state))
    if head is not None and head not in wanted:
        raise ValueError(f"head: {head!r} is not among the adapters that are to run, {', '.join(wanted) or 'none'}.")
    if state is not None:
        _run(module, state, Running(wanted, head))


def run_again(module: nn.Module, what: Running) -> None:
    """Brings back what ran: adapters, weights, whose base parameters counted, and what was frozen."""
    state = registry(module)
    assert state is not None
    _run(module, state, what)
    if what.frozen:
        hold(module, what.frozen)


def run_saved(module: nn.Module, saved: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Lets the adapters of a checkpoint run as they did; its tensors are then loaded into the module.

    Args:
        module: The adapted module.
        saved: The checkpoint's record.
        names: Name in it -> name here, where they differ.
    """
    here = {name: (names or {}).get(name, name) for name in saved["methods"]}
    weights = {own: saved.get("weights", {}).get(name, 1.0) for name, own in here.items()}
    aside = {own: dict(saved.get("aside", {}).get(name, {})) for name, own in here.items()}
    state, head = registry(module), saved.get("head")
    assert state is not None
    what = Running(weights, here.get(head), shadowed={name: frozenset(own) for name, own in aside.items()})
    if state.running() != what or any(aside.values()):
        _run(module, state, what)
        state.aside = {n: kept for n, kept in (state.aside | aside).items() if kept}


def _run(module: nn.Module, state: Registry, what: Running) -> None:
    wanted = what.weights
    changing = {path for name in {*state.active, *wanted} for path in state.adapters[name].sites}
    additions: dict[str, Any] = {path: module.get_submodule(path).peft for path in changing}
    # In two steps: what raises comes before what changes.
    chains = {path: child.order(wanted, path) for path, child in additions.items()}
    weighted = {name: weight for name, weight in wanted.items() if weight != 1.0}
    for name in weighted:
        _check_weight(state.adapters[name], additions)
    changed = set(state.active) ^ wanted.keys() | state.frozen
    switch(module, what)
    for path, chain in chains.items():
        here = additions[path]
        here.active = chain
        here.weighted = {name: Weighted(here[name], weighted[name]) for name in chain if name in weighted}
    state.active, state.weights, state.frozen = tuple(wanted), weighted, set()
    _refreeze(module, state, [state.adapters[name] for name in changed], additions)


def with_weights(names: str | Iterable[str] | Mapping[str, Any] | None) -> dict[str, float]:
    """Name -> weight, 1 where none is given.

    Raises:
        ValueError: For a name that comes twice, or a weight that is no finite number.
    """
    if not isinstance(names, Mapping):
        listed = [] if names is None else [names] if isinstance(names, str) else list(names)
        if twice := [name for name in listed if listed.count(name) > 1]:
            raise ValueError(f"Adapter {twice[0]!r} is named twice; to count it twice, {{{twice[0]!r}: 2}}.")
        return dict.fromkeys(listed, 1.0)
    for name, weight in names.items():
        is_number = isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.ndim == 0)
        if isinstance(weight, bool) or not is_number or not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name!r} must be a finite number, not {weight!r}.")
    return {name: float(weight) for name, weight in names.items()}


def unknown(name: Any, state: Registry | None) -> str:
    """What is told of a name that no adapter has."""
    known = sorted(state.adapters) if state is not None else []
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    has = f"this module has {known}" if known else "this module has none: pass the one that they were attached to"
    return f"No adapter is named {name!r}; {has}.{hint}"


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
def running(
    module: nn.Module, names: str | Iterable[str] | Mapping[str, float] | None, *, head: str | None = None
) -> Iterator[None]:
    """Lets these adapters run as long as the context lasts, and then again those that did, exactly as they did.

        with lit_peft.running(module, None):
            base = module(x)

    As `set_active`, but fit for a callback in the middle of a fit: what was frozen stays so, and gradients that base
    parameters hold are put back.
    """
    state = registry(module)
    if state is None:
        set_active(module, names, head=head)  # which says what is wrong with the names
        yield
        return
    before = state.running()
    grads = {n: module.get_parameter(n).grad for adapter in state.adapters.values() for n in adapter.base}
    set_active(module, names, head=head)
    try:
        yield
    finally:
        run_again(module, before)
        for n, grad in grads.items():
            module.get_parameter(n).grad = grad


@contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Stops the adapters that run, for another that is attached and loaded; where that fails, they run again."""
    state = registry(module)
    if state is None:
        yield
        return
    before = state.running()
    set_active(module, None)
    try:
        yield
    except BaseException:  # Ctrl-C, too
        run_again(module, before)
        raise


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


@torch.inference_mode(False)
@torch.no_grad()
def hold(module: nn.Module, names: Collection[str]) -> None:
    """Lets these of the active adapters run without training, and the others train.

    What they have trained or moved of the base is copied first: another one may train the same on.
    """
    state = registry(module)
    assert state is not None
    state.moved |= moved_buffers(module, state.originals)
    for name in sorted(set(names) - state.frozen):
        copied = state.aside.get(name, {})
        own = values_of(module, name).items()
        state.aside[name] = {key: value if key in copied else value.detach().clone() for key, value in own}
    state.frozen = set(names)
    freeze(module)


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
