"""A run's checkpoint outside of a trainer: attaches the methods that it records and loads what they trained."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.active import set_active, set_aside
from lit_peft.core.attach import detach
from lit_peft.core.buffers import base_buffers
from lit_peft.core.checkpoint import FORMAT_VERSION, CheckpointMismatch, fixed_keys, read_archive
from lit_peft.core.fingerprint import compare_fingerprints, fingerprint
from lit_peft.core.registry import Adapter, registry
from lit_peft.methods.registry import method_class


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint that a method wrote; tensors and plain values alone are unpickled.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When it is damaged, is no checkpoint, or no method wrote it.
    """
    content = read_archive(path)
    if "lit_peft" not in content:
        raise CheckpointMismatch(f"{path} was not written by a lit-peft method: it has no 'lit_peft' entry.")
    if (version := content["lit_peft"]["format_version"]) > FORMAT_VERSION:
        raise CheckpointMismatch(f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}.")
    return content


def load_checkpoint(module: nn.Module, path: str | os.PathLike[str], name: str) -> Adapter:
    """Attaches and loads what a checkpoint holds; see `lit_peft.load`.

    Args:
        module: The module, of the class that was trained, with its base.
        path: The file.
        name: Name that the adapter gets; several in one file keep theirs.

    Returns:
        The registry's record of the adapter, the first of several.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When the file is damaged, or belongs to another base or module.
        ValueError: When the module cannot take an adapter of this name. The module is then as it was.
    """
    content = read_checkpoint(path)
    saved, state = content["lit_peft"], registry(module)
    names = (
        {old: old for old in saved["methods"]} if len(saved["methods"]) > 1 else dict.fromkeys(saved["methods"], name)
    )
    found = state.fingerprint if state is not None else fingerprint(module)
    if (difference := compare_fingerprints(saved["fingerprint"], found)) is not None:
        raise CheckpointMismatch(f"{path} belongs to another base model: {difference}.")
    attached: list[Adapter] = []
    with set_aside(module):
        try:
            for old, spec in saved["methods"].items():
                method = method_class(spec["class_path"])(**spec["init_args"] | {"name": names[old]})
                attached.append(method.attach(module))
                attached[-1].prepared = old in saved.get("prepared", [old])
            set_active(module, {names[old]: saved.get("weights", {}).get(old, 1.0) for old in saved["methods"]})
            tensors = {_renamed(key, names): value for key, value in content["state_dict"].items()}
            _fill(module, tensors, set(saved.get("moved", ())), path)
        except Exception:
            for adapter in attached:
                detach(module, adapter.name)
            raise
    return attached[0]


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """A key with the name that its adapter has now."""
    head, mark, rest = key.partition(".peft.")
    old, dot, tensor = rest.partition(".")
    return f"{head}{mark}{names[old]}{dot}{tensor}" if mark and old in names else key


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], moved: set[str], path: str | os.PathLike[str]) -> None:
    """Loads the tensors of the active adapters and the buffers that moved with them, all of them and no others."""
    state = registry(module)
    assert state is not None
    expected = fixed_keys(module) | (moved & base_buffers(module).keys())
    where = Path(path).name
    if missing := sorted(expected - tensors.keys()):
        raise CheckpointMismatch(
            f"{where} lacks {missing[0]}" + (f" and {len(missing) - 1} more." * bool(missing[1:]) or ".")
        )
    if unknown := sorted(tensors.keys() - expected):
        raise CheckpointMismatch(f"{where} holds {unknown[0]}, which has no place in this {type(module).__name__}.")
    places = module.state_dict(keep_vars=True)
    for key, tensor in tensors.items():
        if places[key].shape != tensor.shape:
            raise CheckpointMismatch(
                f"{where}: {key} has shape {list(tensor.shape)}, and {list(places[key].shape)} in the module."
            )
    state.moved |= moved
    with torch.no_grad():
        for key, tensor in tensors.items():
            places[key].copy_(tensor)
