"""Folding adapters into the weights of their layers, in float32, and taking them out again exactly."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from lit_peft.core.active import Adapted, Additions, run_again, set_active
from lit_peft.core.addition import Addition, Delta, composed_bias, composed_weight
from lit_peft.core.attach import close, put_on, reopen, take_off
from lit_peft.core.layers import LayerOps, layer_ops
from lit_peft.core.plain import Marks, float_dtype, give_marks, take_marks
from lit_peft.core.quantize import recognise, stored_as
from lit_peft.core.registry import Registry, Running, registry
from lit_peft.core.sharded import check_unsharded
from lit_peft.core.swap import MERGED_KEY, check_unmerged

Into = Literal["original", "dequantized", "requantized"]
"""What the adapters of a quantised base are folded into."""
MEANINGS = {
    "dequantized": "the base as training saw it, as a plain float model",
    "requantized": "what training saw, quantised again in the same way: as small as it was, but rounded",
    "original": "the float weights from before they were quantised, which training did not see",
}


@dataclass
class _Merged:
    """What `unmerge` needs: additions by site and what layers were, both on the host, and the registry."""

    into: Into | None
    additions: dict[str, Additions] = field(default_factory=dict)
    layers: dict[str, tuple[LayerOps, Any]] = field(default_factory=dict)
    """Path -> what its `keep` took down of it."""
    marks: Marks = field(default_factory=dict)
    state: Registry | None = None
    before: Running | None = None


def merge(
    module: nn.Module,
    names: str | Iterable[str] | Mapping[str, float] | None = None,
    *,
    head: str | None = None,
    into: Into | None = None,
) -> None:
    """Folds adapters into the weights: the module then has its own keys and classes again, and nothing of ours runs.

    `W <- V`, composed as `Delta` says, computed in float32 and rounded once to the weight's dtype. Base parameters
    that train (a head, biases) keep their trained values. `unmerge` undoes it; until then the original weights and
    the adapters are kept on the host, and adapters are neither attached, nor saved, switched or detached.

    Into what, a quantised base must be told, since each answer costs something else:

        dequantized   V is made of the dequantised W, what training saw, and every quantised layer becomes a dense one
                      of the class that it was made from, adapted or not, in the dtype of the other parameters: a plain
                      float model, which equals the adapted one up to rounding
        requantized   V is quantised again as W was, which rounds it: small, and another model than was trained
        original      W is the float weight from before quantising: the adapter meets a base that it did not train on

    The original weights are not in a quantised module: there, load the adapter onto the float base,
    `lit_peft.load(model, folder, quantize=None)`, and merge that; `lit-peft merge --into original` does so.

    Args:
        module: What the adapters are attached to.
        names: The adapters to fold, as `set_active` takes them; null: those that are active. Others are put aside
            with them.
        head: See `set_active`.
        into: Of a quantised base, and of no other: dequantized or requantized.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When there is no adapter, they are merged already, the module is sharded, an addition is no change
            of a weight, or a weight cannot be written, since it is tied to another module's, which would change with
            it. When `into` is missing where the base is quantised, or given where it is not. The module is then as it
            was.
    """
    check_unmerged(module)
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter to merge.")
    before = state.running()
    if names is not None or head is not None:
        set_active(module, before.weights if names is None else names, head=head)
    try:
        check_mergeable(module, into)
    except ValueError:
        run_again(module, before)
        raise
    dense = stored_as(module) if into == "dequantized" else {}
    dtype = float_dtype(module)
    kept = module.__dict__[MERGED_KEY] = _Merged(into, before=before)
    try:
        for path in dict.fromkeys([*state.paths(), *dense]):
            layer: Any = module.get_submodule(path)
            chain: Sequence[Addition] = ()
            if isinstance(layer, Adapted):
                chain = layer.peft.chain()
                kept.additions[path] = take_off(layer)
            if chain or path in dense:
                _fold(layer, chain, kept.layers, path, dense=path in dense, dtype=dtype)
        if dense:
            kept.marks = take_marks(module)
        for additions in kept.additions.values():  # once all are folded: VeRA's read what one of them holds
            _move(additions, "cpu")
        kept.state = close(module)
    except BaseException:
        _restore(module, module.__dict__.pop(MERGED_KEY))
        run_again(module, before)
        raise
    for path in dense:
        module.get_submodule(path).weight.requires_grad_(True)


def check_mergeable(module: nn.Module, into: Into | None = None) -> None:
    """Raises what `merge` would for the active adapters, before anything else is done; see there."""
    check_unmerged(module)
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter to merge.")
    check_unsharded(
        module,
        "its layers cannot be written as one. Merge what was saved of it, in one process: `lit-peft merge RUN OUT`, or "
        "lit_peft.load(model, FOLDER), then merge.",
    )
    for path in state.paths():
        _check(module, path)
    check_into(stored_as(module).values(), into)


def check_into(storage: Iterable[str], into: Into | None) -> None:
    """Raises ValueError where the adapters of a base that is stored so cannot be folded into what is asked for.

    Args:
        storage: What its quantised layers are stored as; of an unquantised base, nothing.
        into: See `merge`.
    """
    kinds = " and ".join(sorted(set(storage)))
    if into is not None and into not in get_args(Into):
        raise ValueError(f"into is {into!r}, expected one of {', '.join(MEANINGS)}.")
    if not kinds:
        if into in (None, "original"):  # which is what the base is
            return
        raise ValueError(f"into is {into!r}, but the base is not quantised: leave it out.")
    if into is None:
        raise ValueError(
            f"The base is quantised, {kinds}: say into what its adapter is to be folded (--into). "
            + "; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items())
            + "."
        )
    if into == "original":
        raise ValueError(
            f"into is 'original', but the base is quantised, {kinds}, and its original weights are not in it. Load the "
            "adapter onto the float model, lit_peft.load(model, FOLDER_OR_CHECKPOINT, quantize=None), and merge that "
            "one; of a run, `lit-peft merge RUN NEW_FOLDER --into original` does so."
        )


def merged_into(module: nn.Module) -> Into | None:
    """What a merged module was merged into; None where that was not said, or nothing is merged."""
    kept: _Merged | None = module.__dict__.get(MERGED_KEY)
    return None if kept is None else kept.into


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
    for path, (ops, what) in kept.layers.items():
        ops.put_back(module.get_submodule(path), what)
    for path, additions in kept.additions.items():
        device = next(module.get_submodule(path).parameters()).device
        _move(additions, device)
        put_on(module, path, additions)
    give_marks(module, kept.marks)
    recognise(module)


@torch.inference_mode(False)  # what is moved in it could never train again
def _move(additions: Additions, device: torch.device | str) -> None:
    additions.to(device)


def _check(module: nn.Module, path: str) -> None:
    """Raises ValueError, naming the layer, when its active additions cannot be folded into it."""
    layer: Any = module.get_submodule(path)
    chain = layer.peft.chain()
    if not chain:
        return
    if why := next((addition.not_mergeable for addition in chain if addition.not_mergeable is not None), None):
        raise ValueError(f"{path} cannot be merged: {why}")
    holders = (
        (p, own) for p, child in module.named_modules() if child is not layer for own in child._parameters.values()
    )
    if tied := [p for p, own in holders if own is layer.weight]:
        raise ValueError(
            f"{path} cannot be merged: its weight is also that of {tied[0]}, which would change with it. Keep the "
            "adapter beside the base, or `lit-peft export` it; a new one merges where the two are untied before "
            "attaching, or where the layer is left out."
        )


def _fold(
    layer: Any,
    chain: Iterable[Addition],
    kept: dict[str, tuple[LayerOps, Any]],
    path: str,
    *,
    dense: bool,
    dtype: torch.dtype | None,
) -> None:
    """Writes the composed weight into a layer that carries nothing any more, and notes what it was.

    Args:
        layer: The layer.
        chain: Its active additions.
        kept: Where that is noted.
        path: Its path.
        dense: Whether it is quantised, and is to become a dense layer.
        dtype: Dtype of the weight of such; None: that of its dequantised matrix.
    """
    ops = layer_ops(layer)
    with torch.no_grad():
        W, b = ops.float_matrix(layer).detach(), ops.bias(layer)
        deltas = [copy.deepcopy(delta).float() for delta in chain if isinstance(delta, Delta)]
        V, c = composed_weight(deltas, W), composed_bias(deltas, None if b is None else b.detach().float())
        if b is None and c is not None:
            raise ValueError(f"{path} cannot be merged: it has no bias, and its adapter adds one.")
        kept[path] = ops, ops.keep(layer)
        if not dense:
            return ops.store(layer, V, c)
        ops.make_dense(layer, V.to(dtype or ops.matrix(layer).dtype).contiguous())
        if c is not None:
            layer.bias.data.copy_(c)
