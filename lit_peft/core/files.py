"""Checkpoint files and adapter folders: read whole or refused by name, written whole or not at all."""

import base64
import functools
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_peft.core.records import CONFIG, RECORD, TENSORS, CheckpointMismatch, sealed, tensor_digest
from lit_peft.core.sharded import in_shards, whole


def check_archive(path: str | os.PathLike[str], *, contents: bool = False) -> None:
    """Raises for a file that cannot be a whole checkpoint.

    Args:
        path: The file.
        contents: Whether to read it all and compare checksums, which `torch.load` does not: a flipped bit would
            become another weight. Otherwise cheap, since an archive's directory stands at its end.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When it is cut off, is something else, or is damaged inside.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    size = f"({path.stat().st_size:,} bytes). Use another one of the run, last.ckpt or best.ckpt."
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise CheckpointMismatch(f"{path} is no checkpoint, or is cut off {size}")
            damaged = archive.testzip() if contents else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        raise CheckpointMismatch(f"{path} is no checkpoint, or is cut off {size}") from error
    if damaged is not None:
        raise CheckpointMismatch(f"{path} is damaged inside: its checksums do not match {size}")


def read_archive(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file, its tensors on the host; only tensors and plain values are unpickled.

    Args:
        path: The file.
        mapped: Whether tensors are read when they are looked at, and their checksums never.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointMismatch: When it is cut off, is something else, is damaged inside, or holds objects of other classes.
    """
    check_archive(path, contents=not mapped)
    with told_as_damage(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return check_content(content, path)


def check_content(content: Any, path: Any) -> dict[str, Any]:
    """What was unpickled from a checkpoint, if it is one.

    Raises:
        CheckpointMismatch: When it is no dict, or its `state_dict` holds something other than tensors.
    """
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{path} holds a {type(content).__name__}; a checkpoint holds a dict.")
    if RECORD not in content:
        return content
    for entry in ("state_dict", "current_model_state"):
        state = content.get(entry, {})
        if not isinstance(state, dict):
            raise CheckpointMismatch(f"{path}: {entry} is a {type(state).__name__}, expected a dict of tensors.")
        for key, value in state.items():
            extra = isinstance(key, str) and key.endswith("_extra_state")  # of torch, and of any type
            if not extra and not (isinstance(key, str) and isinstance(value, Tensor)):
                raise CheckpointMismatch(f"{path}: {entry} holds a {type(value).__name__} as {key!r}, not a tensor.")
    return content


@contextmanager
def told_as_damage(path: Any) -> Iterator[None]:
    """Tells what unpickling raises for an archive that is whole and holds no checkpoint, or what could run anything."""
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f", {named[1]} for instance: loading it could run anything" if named else ", or is no checkpoint"
        raise CheckpointMismatch(f"{path} holds more than tensors and plain values{what}.") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointMismatch(f"{path} is damaged inside, or is no checkpoint: {reason}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` which takes its place at the end: readers see the old or the new file.

    The bytes are on the disk before the name changes. On an error nothing is left and an old file stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~umask())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def umask() -> int:
    """The mask of new files' permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> Path:
    """Writes an adapter folder in HF PEFT's layout: adapter_model.safetensors first, adapter_config.json last.

    Args:
        folder: The folder; made where it is missing. Each file is replaced atomically.
        config: What goes into adapter_config.json.
        tensors: Name -> tensor, moved to the host. Where one is sharded, this is a collective: every rank calls, all
            are gathered, the first rank writes, and the others wait for it.
        record: What goes into the header of the tensor file, where HF PEFT does not look, with digests of all this.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    host = {key: whole(value).detach().cpu().contiguous().clone() for key, value in tensors.items()}
    is_collective = any(map(in_shards, tensors.values()))
    try:
        if not is_collective or torch.distributed.get_rank() == 0:
            digests = {key: _digest(tensor) for key, tensor in host.items()}
            metadata = {"format": "pt", RECORD: sealed({**record, "config": config, "digests": digests})}
            with atomic_path(folder / TENSORS) as part:
                save_file(host, part, metadata)
            with atomic_path(folder / CONFIG) as part:
                part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    finally:
        if is_collective:
            torch.distributed.barrier()
    return folder


def _digest(tensor: Tensor) -> str:
    return tensor_digest(_stored_as(tensor.dtype), tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy())


@functools.cache
def _stored_as(dtype: torch.dtype) -> str:
    """Safetensors' name of a dtype, by the header of an empty tensor."""
    from safetensors.torch import save

    return str(json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"])


def pack_mask(mask: Tensor) -> str:
    """A tensor of booleans as text, a bit each, for the header of a folder's tensor file."""
    return base64.b64encode(np.packbits(mask.cpu().numpy()).tobytes()).decode()


def unpack_mask(text: str, shape: torch.Size) -> Tensor:
    """The tensor of this shape that `pack_mask` packed.

    Raises:
        CheckpointMismatch: When the text is damaged or of another size.
    """
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except ValueError as error:
        raise CheckpointMismatch(f"A mask is no base64: {error}") from error
    if len(bits) != -(-shape.numel() // 8):
        raise CheckpointMismatch(f"A mask of {len(bits)} bytes is none of {list(shape)}.")
    return torch.from_numpy(np.unpackbits(bits, count=shape.numel()).astype(bool)).view(shape)
