"""A run's checkpoint outside of a trainer: attaches the methods that it records and loads what they trained."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.active import run_saved, set_aside
from lit_peft.core.attach import check_attachable, detach
from lit_peft.core.buffers import base_buffers
from lit_peft.core.checkpoint import CheckpointMismatch, check_tensors, fixed_keys
from lit_peft.core.files import read_archive
from lit_peft.core.fingerprint import compare_fingerprints, fingerprint
from lit_peft.core.quantize import Quantize, parse
from lit_peft.core.records import RECORD, check_checkpoint
from lit_peft.core.registry import Adapter, registry
from lit_peft.methods.registry import method_class
from lit_peft.saving.folder_record import warn_of_storage

AS_TRAINED = "as trained"
"""The `quantize` of `load` that stands for what the file says."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint that a method wrote; tensors and plain values alone are unpickled.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When it is damaged, is no checkpoint, or no method wrote it.
    """
    content = read_archive(path)
    check_checkpoint(content.get(RECORD), str(path))
    return content


def load_checkpoint(
    module: nn.Module, path: str | os.PathLike[str], name: str, quantize: Quantize = AS_TRAINED
) -> Adapter:
    """Attaches and loads what a checkpoint holds; see `lit_peft.load`.

    Args:
        module: The module, of the class that was trained, with its base.
        path: The file.
        name: Name that the adapter gets; several in one file keep theirs.
        quantize: See `lit_peft.load`.

    Returns:
        The registry's record of the adapter, the first of several.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When the file is damaged, or belongs to another base or module.
        ValueError: When the module cannot take an adapter of this name. The module is then as it was, but for a base
            that was quantised for it already.
    """
    content = read_checkpoint(path)
    saved, state = content["lit_peft"], registry(module)
    names = (
        {old: old for old in saved["methods"]} if len(saved["methods"]) > 1 else dict.fromkeys(saved["methods"], name)
    )
    _check_base(saved, state.fingerprint if state is not None else fingerprint(module), path)
    given = {} if quantize == AS_TRAINED else {"quantize": parse(quantize)}
    attached: list[Adapter] = []
    with set_aside(module):
        try:
            for old, spec in saved["methods"].items():
                check_attachable(module, names[old])
                cls = method_class(spec["class_path"])
                with asked_for(cls, str(path)):
                    method = cls(**spec["init_args"] | given | {"name": names[old]})
                    attached.append(method.attach(module))
                _check_base(saved, found := registry(module).fingerprint, path)  # type: ignore[union-attr]
                attached[-1].prepared = old in saved.get("prepared", [old])
            run_saved(module, saved, names)
            tensors = {_renamed(key, names): value for key, value in content.get("state_dict", {}).items()}
            _fill(module, tensors, set(saved.get("moved", ())), path)
        except BaseException:
            for adapter in attached:
                detach(module, adapter.name)
            raise
    warn_of_storage(saved["fingerprint"], found)
    for adapter in attached:
        adapter.source = str(Path(path).resolve())
    return attached[0]


def _check_base(saved: Mapping[str, Any], found: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    if (difference := compare_fingerprints(saved["fingerprint"], found, any_storage=True)) is not None:
        raise CheckpointMismatch(f"{path} belongs to another base model: {difference}.")


@contextmanager
def asked_for(cls: type, what: str) -> Iterator[None]:
    """Tells what a method of this class cannot be made of; what it is given has been read from a file."""
    try:
        yield
    except (CheckpointMismatch, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, re.error) as error:
        raise CheckpointMismatch(f"{what} asks for a {cls.__name__} that cannot be: {error}") from error


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
    check_tensors(module, tensors, where)
    places = module.state_dict(keep_vars=True)
    if extra := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise CheckpointMismatch(f"{where} holds {extra[0]}, which is no tensor: only a trainer can load it.")
    state.moved |= moved
    with torch.no_grad():
        for key, tensor in tensors.items():
            places[key].copy_(tensor)
