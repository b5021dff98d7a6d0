"""What an adapter folder of ours says of the module and its base, in the header of the tensors.

Whoever edits one half of a folder, HF PEFT's or this record, has one that contradicts itself, which is refused: HF PEFT
would read one half, and we the other. So is a tensor or a record that is not as it was saved. A folder that HF PEFT has
written, or written anew, has no record and is read as HF PEFT's.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.core.buffers import moving_buffers
from lit_peft.core.checkpoint import adapter_keys, record
from lit_peft.core.fingerprint import compare_fingerprints, fingerprint, other_storage
from lit_peft.core.folder_files import open_files
from lit_peft.core.hf_peft import Root, is_inside
from lit_peft.core.records import TENSORS, CheckpointMismatch
from lit_peft.core.registry import Adapter, registry


def make_record(module: nn.Module, root: Root, adapter: Adapter) -> dict[str, Any]:
    """What goes into the header of the tensors, beside the content of adapter_config.json.

    Args:
        module: What the method was attached to; a task of ours says what `lit-peft predict --adapter` starts from.
        root: The model in it.
        adapter: The registry's record.
    """
    entry, state = record(module, adapter_keys(module)), registry(module)
    assert state is not None
    moved = sorted(state.moved - moving_buffers(module, [adapter]))
    return entry | {
        "model": _told(module),
        "base": [root.inside(name) for name in adapter.base],
        "head": [root.inside(name) for name in adapter.head],
        "scales": {root.inside(name): scale for name, scale in adapter.scales.items()},
        "moved": list(_of_model(dict.fromkeys(moved, ""), root)),
        "fingerprint": _of_model(entry["fingerprint"], root),
    }


def _told(module: nn.Module) -> dict[str, Any]:
    """What a task of ours says of itself."""
    return module.folder_record() if hasattr(type(module), "folder_record") else {}  # type: ignore[operator]


def _of_model(named: Mapping[str, str], root: Root) -> dict[str, str]:
    """What is said of the model's own tensors, under their names in it."""
    return {root.inside(name): value for name, value in named.items() if not root.path or is_inside(name, [root.path])}


def open_folder(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Reads an adapter folder: (config, tensors on the host, our record or None), each well formed and whole.

    Raises:
        FileNotFoundError: When a file is missing.
        CheckpointMismatch: When a file is damaged, or a folder of ours is not as it was saved.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, _, mine = open_files(folder)
    try:
        return config, load_file(Path(folder) / TENSORS), mine
    except SafetensorError as error:  # of a dtype that torch has not
        raise CheckpointMismatch(f"{folder}/{TENSORS} is damaged: {error}") from error


def differs(mine: Mapping[str, Any], module: nn.Module, root: Root) -> str | None:
    """How a model in a module differs from the base of a record, quantised or not; None where it is the same."""
    return compare_fingerprints(mine["fingerprint"], _found(module, root), any_storage=True)


def _found(module: nn.Module, root: Root) -> dict[str, str]:
    state = registry(module)
    return _of_model(state.fingerprint, root) if state is not None else fingerprint(root.model)


def check_attached(mine: Mapping[str, Any], module: nn.Module, root: Root) -> None:
    """Once the base is quantised as it will be: refuses another, warns of weights that are stored otherwise.

    Before, those that were quantised in training had nothing to be compared with.

    Raises:
        CheckpointMismatch: When the base is another than that of the record.
    """
    if (difference := differs(mine, module, root)) is not None:
        raise CheckpointMismatch(f"This adapter belongs to another base model: {difference}.")
    warn_of_storage(mine["fingerprint"], _found(module, root))


def warn_of_storage(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Warns where weights of the base are quantised otherwise than in training: the outputs are not those of then."""
    if (other := other_storage(saved, found)) is not None:
        warnings.warn(f"{other}: the adapter's outputs differ by what quantising rounds.", stacklevel=5)


def check_base(mine: Mapping[str, Any], module: nn.Module, root: Root) -> None:
    """Raises CheckpointMismatch where the base is another than that of the record; warns of classes of other names."""
    if (difference := differs(mine, module, root)) is not None:
        raise CheckpointMismatch(f"This adapter belongs to another base model: {difference}.")
    theirs, ours = (told.get("label_names") for told in (mine.get("model", {}), _told(module)))
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"This adapter was trained on the classes {', '.join(theirs)}; {type(module).__name__} names them "
            f"{', '.join(ours)}, and goes on doing so.",
            stacklevel=4,
        )
