"""The records of ours in a checkpoint and in an adapter folder: their forms; of a folder's its digest, and whether it
agrees with HF PEFT's half.

Needs no torch, so that a file can be looked at in no time.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

FORMAT_VERSION = 1
RECORD = "lit_peft"
"""Key of our own record in the metadata of the tensor file, where HF PEFT does not look, and in a checkpoint."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Entries that differ from machine to machine, or that no equation depends on.
_CIRCUMSTANCES = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})


class CheckpointMismatch(ValueError):
    """A checkpoint or adapter folder is damaged, or does not belong to the module it is loaded into.

    One line, whatever names and values a file put into it.
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in re.sub(r"\s+", " ", message))
        super().__init__(re.sub(r"\S{400,}", lambda word: word[0][:399] + "…", text))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _maps_to(kind: Any) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(key, str) and isinstance(item, kind) and not isinstance(item, bool)
            for key, item in value.items()
        )

    return fits


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared: of a pickle it might be a tensor, which has no one truth."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else not hasattr(value, "__array__")


def _is_method(value: Any) -> bool:
    kinds = {"class_path": str, "init_args": dict}
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), kind) for key, kind in kinds.items())
        and _is_plain(value["init_args"])
    )


def _are_methods(value: Any) -> bool:
    names = all(isinstance(name, str) and name.isidentifier() for name in value) if isinstance(value, dict) else False
    return names and bool(value) and all(map(_is_method, value.values()))


def _are_asides(value: Any) -> bool:
    """Tensors of base parameters and buffers by adapter; told by what they have, since torch is not known here."""
    return isinstance(value, dict) and all(
        isinstance(own, dict) and all(isinstance(key, str) and hasattr(v, "layout") for key, v in own.items())
        for own in value.values()
    )


def _is_told(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("backbone"), str | None)
        and (value.get("label_names") is None or _texts(value["label_names"]))
    )


# Entry -> (whether a value will do, what is expected).
_Forms = Mapping[str, tuple[Callable[[Any], bool], str]]
_NAMED = (_texts, "a list of names")
_NUMBERS = (_maps_to(int | float), "a number for each name")
_DIGESTS = (_maps_to(str), "a digest for each parameter")
_FOLDER: _Forms = {
    "methods": (
        lambda v: _are_methods(v) and len(v) == 1,
        "one name with a class_path and init_args",
    ),
    "fingerprint": _DIGESTS,
    "base": _NAMED,
    "head": _NAMED,
    "scales": _NUMBERS,
    "moved": _NAMED,
    "config": (lambda v: isinstance(v, dict), f"the content of {CONFIG}"),
    "digests": (_maps_to(str), "a digest for each tensor"),
    "digest": (lambda v: isinstance(v, str), "a text"),
}
_FOLDER_OPTIONS: _Forms = {
    "metrics": _NUMBERS,
    "model": (_is_told, "a backbone and label_names"),
    "masks": (_maps_to(str), "a text for each mask"),
}
_CHECKPOINT: _Forms = {
    "methods": (_are_methods, "a class_path and init_args for each name"),
    "fingerprint": _DIGESTS,
}
_CHECKPOINT_OPTIONS: _Forms = {
    "metrics": _NUMBERS,
    "moved": _NAMED,
    "optimizers": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(g, dict) and _is_plain(g) for g in v)),
        "the settings of each group",
    ),
    "prepared": _NAMED,
    "weights": _NUMBERS,
    "head": (lambda v: v is None or isinstance(v, str), "a name"),
    "aside": (_are_asides, "tensors by name for each adapter"),
}
_TEXT = (lambda v: isinstance(v, str), "a text")
_NAMES = (lambda v: isinstance(v, str) or _texts(v), "a list of names or an expression")
_OBJECT = (lambda v: isinstance(v, dict), "an object")
_CONFIG_FORMS: _Forms = {
    **dict.fromkeys(("base_model_name_or_path", "bias", "peft_type", "task_type"), _TEXT),
    **dict.fromkeys(("feedforward_modules", "target_modules"), _NAMES),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), _OBJECT),
    "modules_to_save": _NAMED,
}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointMismatch for an entry of adapter_config.json of another type than HF PEFT gives it."""
    for key, (fits, expected) in _CONFIG_FORMS.items():
        if config.get(key) is not None and not fits(config[key]):
            raise CheckpointMismatch(f"{where}: {key} must be {expected}, not {shown(config[key])}.")


def read_record(text: str, where: str) -> dict[str, Any]:
    """The record in the header of a folder's tensors, well formed and as it was written.

    Raises:
        CheckpointMismatch: When it is not, or a newer release wrote it.
    """
    try:
        mine = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{where} is damaged: the record in its header is no JSON: {error}") from error
    _check_version(mine, where, "the record in its header")
    _check_forms(mine, _FOLDER, _FOLDER_OPTIONS, where, "the record in its header", AGAIN)
    if mine["digest"] != _digest_of_record(mine):
        raise CheckpointMismatch(f"{where}: the record in its header is not as it was written. {AGAIN}")
    return dict(mine)


def check_checkpoint(saved: Any, where: str) -> None:
    """Makes sure that the record in a checkpoint is well formed.

    Args:
        saved: The entry `lit_peft`, None where there is none.
        where: The file.

    Raises:
        CheckpointMismatch: Naming the entry that is not.
    """
    if saved is None:
        raise CheckpointMismatch(
            f"{where} was not written by a lit-peft method: it has no 'lit_peft' entry. To start from the weights of a "
            "full checkpoint, load them into the module before attaching."
        )
    what = f"its entry {RECORD!r}"
    _check_version(saved, where, what)
    _check_forms(saved, _CHECKPOINT, _CHECKPOINT_OPTIONS, where, what, "Use another checkpoint of the run.")


def _check_version(mine: Any, where: str, what: str) -> None:
    version = mine.get("format_version") if isinstance(mine, dict) else None
    if type(version) is not int:
        raise CheckpointMismatch(f"{where}: {what} has no format_version: {shown(mine)}.")
    if version > FORMAT_VERSION:
        raise CheckpointMismatch(f"{where} has format version {version}; this release reads up to {FORMAT_VERSION}.")


def _check_forms(mine: Mapping[str, Any], forms: _Forms, options: _Forms, where: str, what: str, way_out: str) -> None:
    for key, (fits, expected) in {**forms, **options}.items():
        if key not in mine:
            if key in forms:
                raise CheckpointMismatch(f"{where}: {what} lacks {key!r}. {way_out}")
        elif not fits(mine[key]):
            raise CheckpointMismatch(f"{where}: {key!r} in {what} must be {expected}, not {shown(mine[key])}.")


def compare_halves(config: Mapping[str, Any], recorded: Mapping[str, Any], keys: Iterable[str] | None = None) -> None:
    """Raises CheckpointMismatch, naming key and values, where a config says something else than our record means.

    Args:
        config: adapter_config.json.
        recorded: What the record means.
        keys: The entries to compare; null: all that the record has and an equation depends on. What a config has
            besides, HF PEFT's own classes write the defaults of their release, the method looks at.
    """
    for key in sorted(recorded.keys() - _CIRCUMSTANCES) if keys is None else keys:
        here, there = config.get(key), recorded.get(key)
        if (here or there) and _unordered(here) != _unordered(there):
            raise CheckpointMismatch(
                f"{CONFIG} contradicts the record in {TENSORS}: {key} is "
                f"{shown(here) if key in config else 'missing'}, and the record means {shown(there)}. One of them was "
                "changed; save the adapter again."
            )


def _unordered(value: Any) -> Any:
    return sorted(value) if _texts(value) else value


def shown(value: Any) -> str:
    """A value as JSON, cut off where it is long; of anything else, from a pickle, its type."""
    try:
        text = json.dumps(value, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:59] + "…"


# ------------------------------------------------------------------------------------------------- digests

AGAIN = "Copy it anew from where it is whole, or save the adapter again."


def sealed(record: Mapping[str, Any]) -> str:
    """A folder's record as text, with a digest of itself."""
    return json.dumps({**record, "digest": _digest_of_record(record)})  # not sorted: of patterns the first match counts


def _digest_of_record(record: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in record.items() if key != "digest"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensor_digest(dtype: str, shape: Iterable[int], data: Any) -> str:
    """Of a tensor as safetensors stores it.

    Args:
        dtype: Name in the header of the file, F32.
        shape: Sizes.
        data: Its bytes, anything with the buffer protocol.
    """
    digest = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    digest.update(data)
    return digest.hexdigest()[:16]
