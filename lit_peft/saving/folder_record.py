"""The two halves of an adapter folder: HF PEFT's adapter_config.json, and our record in the header of the tensors.

Whoever edits one of them has a folder that contradicts itself, which is refused: HF PEFT would read one half, and we
the other. A folder that HF PEFT has written, or written anew, has no record and is read as HF PEFT's.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lit_peft.core.buffers import moving_buffers
from lit_peft.core.checkpoint import FORMAT_VERSION, CheckpointMismatch, adapter_keys, read_folder, record
from lit_peft.core.fingerprint import compare_fingerprints, fingerprint
from lit_peft.core.hf_peft import Root, is_inside
from lit_peft.core.registry import Adapter, registry

RECORD = "lit_peft"
"""Key of our own record in the metadata of the tensor file, where HF PEFT does not look."""
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Entries that differ from machine to machine, or that no equation depends on.
_CIRCUMSTANCES = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _maps_to(kind: Any) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        items = value.values() if isinstance(value, dict) else [True]
        return all(isinstance(item, kind) and not isinstance(item, bool) for item in items)

    return fits


def _is_method(value: Any) -> bool:
    kinds = {"class_path": str, "init_args": dict}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def _is_told(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("backbone"), str | None)
        and (value.get("label_names") is None or _texts(value["label_names"]))
    )


# Entry -> (whether a value will do, what is expected).
_Forms = Mapping[str, tuple[Callable[[Any], bool], str]]
_RECORD_FORMS: _Forms = {
    "methods": (
        lambda v: isinstance(v, dict) and len(v) == 1 and all(map(_is_method, v.values())),
        "one name with a class_path and init_args",
    ),
    "fingerprint": (_maps_to(str), "a digest for each parameter"),
    "base": (_texts, "a list of names"),
    "head": (_texts, "a list of names"),
    "scales": (_maps_to(int | float), "a number for each name"),
    "moved": (_texts, "a list of names"),
    "config": (lambda v: isinstance(v, dict), f"the content of {_CONFIG}"),
}
_RECORD_OPTIONS: _Forms = {
    "model": (_is_told, "a backbone and label_names"),
    "masks": (_maps_to(str), "a text for each mask"),
}
_TEXT = (lambda v: isinstance(v, str), "a text")
_NAMES = (lambda v: isinstance(v, str) or _texts(v), "a list of names or an expression")
_OBJECT = (lambda v: isinstance(v, dict), "an object")
_CONFIG_FORMS: _Forms = {
    **dict.fromkeys(("base_model_name_or_path", "bias", "peft_type", "task_type"), _TEXT),
    **dict.fromkeys(("feedforward_modules", "target_modules"), _NAMES),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), _OBJECT),
    "modules_to_save": (_texts, "a list of names"),
}


def make_record(module: nn.Module, root: Root, adapter: Adapter) -> dict[str, Any]:
    """What goes into the header of the tensors, beside the content of adapter_config.json.

    Args:
        module: What the method was attached to; a task of ours says what `lit-peft predict --adapter` starts from.
        root: The model in it.
        adapter: The registry's record.
    """
    entry, state = record(module, adapter_keys(module)), registry(module)
    assert state is not None
    told = module.folder_record() if hasattr(type(module), "folder_record") else {}  # type: ignore[operator]
    moved = sorted(state.moved - moving_buffers(module, [adapter]))
    return entry | {
        "model": told,
        "base": [root.inside(name) for name in adapter.base],
        "head": [root.inside(name) for name in adapter.head],
        "scales": {root.inside(name): scale for name, scale in adapter.scales.items()},
        "moved": list(_of_model(dict.fromkeys(moved, ""), root)),
        "fingerprint": _of_model(entry["fingerprint"], root),
    }


def _of_model(named: Mapping[str, str], root: Root) -> dict[str, str]:
    """What is said of the model's own tensors, under their names in it."""
    return {root.inside(name): value for name, value in named.items() if not root.path or is_inside(name, [root.path])}


def open_folder(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Reads an adapter folder: (config, tensors on the host, our record or None), each well formed.

    Raises:
        FileNotFoundError: When a file is missing.
        CheckpointMismatch: When a file is damaged, or the two halves of a folder of ours contradict each other.
    """
    config, tensors, metadata = read_folder(folder)
    for key, (fits, expected) in _CONFIG_FORMS.items():
        if config.get(key) is not None and not fits(config[key]):
            raise CheckpointMismatch(f"{folder}/{_CONFIG}: {key} must be {expected}, not {_shown(config[key])}.")
    if RECORD not in metadata:
        return config, tensors, None
    mine = _read_record(metadata[RECORD], f"{folder}/{_TENSORS}")
    try:
        compare_halves(config, mine["config"], sorted({*config, *mine["config"]} - _CIRCUMSTANCES))
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{folder}: {error}") from error
    return config, tensors, mine


def _read_record(text: str, where: str) -> dict[str, Any]:
    try:
        mine = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{where} is damaged: the record in its header is no JSON: {error}") from error
    version = mine.get("format_version") if isinstance(mine, dict) else None
    if type(version) is not int:
        raise CheckpointMismatch(f"{where}: the record in its header has no format_version: {_shown(mine)}.")
    if version > FORMAT_VERSION:
        raise CheckpointMismatch(f"{where} has format version {version}; this release reads up to {FORMAT_VERSION}.")
    for key, (fits, expected) in {**_RECORD_FORMS, **_RECORD_OPTIONS}.items():
        if key not in mine:
            if key in _RECORD_FORMS:
                raise CheckpointMismatch(f"{where}: the record in its header lacks {key!r}.")
        elif not fits(mine[key]):
            raise CheckpointMismatch(
                f"{where}: {key!r} in the record in its header must be {expected}, not {_shown(mine[key])}."
            )
    return mine


def compare_halves(config: Mapping[str, Any], recorded: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises CheckpointMismatch, naming key and values, where a config says something else than our record means."""
    for key in keys:
        here, there = config.get(key), recorded.get(key)
        if (here or there) and _unordered(here) != _unordered(there):
            says = "does not have it" if key not in recorded else f"means {_shown(there)}"
            raise CheckpointMismatch(
                f"{_CONFIG} contradicts the record in {_TENSORS}: {key} is "
                f"{_shown(here) if key in config else 'missing'}, and the record {says}. One of them was changed; "
                "save the adapter again."
            )


def _unordered(value: Any) -> Any:
    return sorted(value) if _texts(value) else value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


def check_base(mine: Mapping[str, Any], module: nn.Module, root: Root) -> None:
    """Raises CheckpointMismatch where the base is another than that of the record."""
    state = registry(module)
    found = _of_model(state.fingerprint, root) if state is not None else fingerprint(root.model)
    if (difference := compare_fingerprints(mine["fingerprint"], found)) is not None:
        raise CheckpointMismatch(f"This adapter belongs to another base model: {difference}.")
