"""The two files of an adapter folder, read and checked without torch."""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_peft.core.records import (
    AGAIN,
    CONFIG,
    RECORD,
    TENSORS,
    CheckpointMismatch,
    check_config,
    compare_halves,
    read_record,
    shown,
    tensor_digest,
)


class Stored(NamedTuple):
    """A tensor as it lies in the file: safetensors' name of its dtype, sizes, bytes."""

    dtype: str
    shape: list[int]
    data: memoryview


def read_files(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Stored], dict[str, str]]:
    """What the files of an adapter folder hold: (config, tensors, metadata of the tensor file).

    Only safetensors are read, never a pickle.

    Raises:
        FileNotFoundError: When a file is missing.
        CheckpointMismatch: When a file is truncated or is not what its name says.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            pickled = " adapter_model.bin is a pickle, which could run anything: save it as safetensors."
            hint = pickled if (folder / "adapter_model.bin").is_file() else ""
            raise FileNotFoundError(f"{folder} is no adapter folder: it has no {name}.{hint}")
    where = folder / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        where = folder / TENSORS
        with safe_open(where, "np") as file:  # checks the header: sizes, offsets, no gap and nothing left over
            metadata = file.metadata() or {}
        stored = _map(where)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointMismatch(f"{where} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointMismatch(f"{folder}/{CONFIG} holds {type(config).__name__}, not an object.")
    return config, stored, metadata


def _map(path: Path) -> dict[str, Stored]:
    """The tensors of a file whose header is right; their bytes are read when they are looked at."""
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header.pop("__metadata__", None)
    return {
        name: Stored(
            entry["dtype"], entry["shape"], content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        )
        for name, entry in header.items()
    }


def open_files(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Stored], dict[str, Any] | None]:
    """Reads and checks an adapter folder: (config, tensors, our record or None), each well formed.

    A folder of ours must be what was saved: every tensor and the record itself have digests in the record, and
    adapter_config.json must say the same. A folder that HF PEFT has written, or written anew, has no record.

    Raises:
        FileNotFoundError: When a file is missing.
        CheckpointMismatch: When a file is damaged or was changed.
    """
    config, stored, metadata = read_files(folder)
    check_config(config, f"{folder}/{CONFIG}")
    mine = _record(metadata, folder)
    if mine is None:
        return config, stored, None
    try:
        compare_halves(config, mine["config"])
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{folder}: {error}") from error
    _check_digests(stored, mine["digests"], f"{folder}/{TENSORS}")
    return config, stored, mine


def open_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Our record in an adapter folder, or None, while the tensors stay unread; raises as `open_files` does for it."""
    return _record(read_files(folder)[2], folder)


def _record(metadata: Mapping[str, str], folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    if RECORD in metadata:
        return read_record(metadata[RECORD], f"{folder}/{TENSORS}")
    if astray := [key for key, value in metadata.items() if value.startswith('{"format_version"')]:
        raise CheckpointMismatch(f"{folder}/{TENSORS} is damaged: its header names our record {shown(astray[0])}.")
    return None


def _check_digests(stored: Mapping[str, Stored], digests: Mapping[str, str], where: str) -> None:
    if missing := sorted(digests.keys() - stored.keys()):
        raise CheckpointMismatch(f"{where} lacks {missing[0]}, which it was saved with. {AGAIN}")
    for name, tensor in stored.items():
        if name not in digests:
            raise CheckpointMismatch(f"{where} holds {shown(name)}, which it was saved without. {AGAIN}")
        if tensor_digest(*tensor) != digests[name]:
            raise CheckpointMismatch(
                f"{where}: {name} is not as it was saved, its digest does not match: the file is damaged, or was "
                f"changed. {AGAIN}"
            )
