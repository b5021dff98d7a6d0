"""What adapters have of the base: parameters that they train, and buffers that moved with them.

Each has one place in the module. It holds what belongs to the adapters that run; the registry keeps that of the others.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.buffers import holds, moved_buffers, moving_buffers, put_back
from lit_peft.core.registry import Running, registry
from lit_peft.core.sharded import sharded_like, whole
from lit_peft.core.swap import CastsParameters


def values_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter has trained or moved of the base: the module's own tensors while they are its, else copies."""
    state = registry(module)
    assert state is not None
    live: set[str] = set()
    if name in state.active and name not in state.frozen:
        by_design = moving_buffers(module, [state.adapters[other] for other in state.active])
        own = {*state.adapters[name].base, *moving_buffers(module, [state.adapters[name]])}
        live = own | (state.moved - by_design)  # the rest belongs to all of them
    tensors = {key: attrgetter(key)(module) for key in sorted(live)}  # in one order on all ranks: some are gathered
    return {key: tensor for key, tensor in tensors.items() if tensor is not None} | state.aside.get(name, {})


@torch.inference_mode(False)
@torch.no_grad()
def switch(module: nn.Module, what: Running, *, leave: bool = False) -> None:
    """Puts base parameters and buffers of these adapters into the module, and keeps those of the others aside.

    Args:
        module: The adapted module.
        what: The adapters that are to run. Where it says what is shadowed, that decides among different values.
        leave: Whether parameters without a copy of the base keep their values, instead of being refused.

    Raises:
        ValueError: When there is no such state of the base. Nothing has changed then.
    """
    state = registry(module)
    assert state is not None
    wanted = what.weights
    same = set(state.active) == set(wanted) and state.head == what.head and what.shadowed is None
    if same and not any(name in state.aside for name in wanted):
        return
    state.moved |= moved_buffers(module, state.originals)
    values = {name: values_of(module, name) for name in dict.fromkeys([*state.active, *wanted])}
    target = agreed({name: values[name] for name in wanted}, what)
    back = sorted(({key for name in state.active for key in values[name]} | state.moved) - target.keys())
    parameters = [key for key in back if isinstance(attrgetter(key)(module), nn.Parameter)]
    if (lost := [key for key in parameters if key not in state.originals]) and not leave:
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
    for key, value in target.items():
        _write(module, key, value)
    for key in back:
        if key in state.originals:
            _write(module, key, state.originals[key], of_base=True)
    state.aside = {n: kept for n, kept in (state.aside | aside).items() if kept}
    state.head, state.moved = what.head, target.keys() - own_names


def agreed(values: Mapping[str, Mapping[str, Tensor]], what: Running) -> dict[str, Tensor]:
    """Of the values that adapters have for the base the ones that count: those of all, of `head`, or not shadowed.

    Raises:
        ValueError: When adapters have different ones and nothing says whose count.
    """
    target: dict[str, Tensor] = {}
    whose: dict[str, str] = {}
    for name in sorted(values, key=lambda name: name != what.head):
        for key, value in values[name].items():
            hidden = what.shadowed is not None and key in what.shadowed.get(name, ())
            if key not in target and not hidden:
                target[key], whose[key] = value, name
            elif what.shadowed is None and whose[key] != what.head and not holds(value, target[key]):
                raise ValueError(
                    f"Adapters {whose[key]!r} and {name!r} have both trained or moved {key}, to different values, "
                    f"which make no sum: name the one that counts, head={name!r}."
                )
    for own in values.values():  # shadowed by one that is frozen
        target = {**own, **target}
    return target


def _write(module: nn.Module, key: str, value: Tensor, *, of_base: bool = False) -> None:
    """Gives a parameter or buffer of the base a value, in place."""
    owner, _, leaf = key.rpartition(".")
    layer = module.get_submodule(owner)
    parameter = layer._parameters.get(leaf)
    if parameter is None:
        put_back(module, [key], {key: value})
    elif parameter is not value:
        parameter.grad = None  # of other values
        if isinstance(layer, CastsParameters):
            dtype: Any = layer.base_dtype if of_base else value.dtype  # the base in its own, which may hold more
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        parameter.copy_(sharded_like(whole(value).to(parameter.device), parameter))
