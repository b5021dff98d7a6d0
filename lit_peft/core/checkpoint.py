"""What a checkpoint of an adapted module holds, and whether one fits: adapters and trained parameters only."""

import base64
import functools
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_peft import __version__
from lit_peft.core.buffers import base_buffers, moved_buffers, moving_buffers, put_back
from lit_peft.core.fingerprint import compare_fingerprints
from lit_peft.core.records import CONFIG, FORMAT_VERSION, RECORD, TENSORS, CheckpointMismatch, sealed, tensor_digest
from lit_peft.core.registry import Registry, registry
from lit_peft.core.sharded import in_shards, whole
from lit_peft.core.swap import FrozenStatistics

RATES = ("train_also", "layer_decay", "loraplus_ratio", "unfreeze_every")
"""Arguments of a method that say how fast and from when on parameters train, which does not change what the weights
mean; `train_also` by its scales, while its patterns say what trains."""


def fixed_keys(module: nn.Module) -> set[str]:
    """State-dict keys that every checkpoint of the active adapters holds, whatever has moved so far.

    Additions, base parameters that they train, and buffers that are there to move: beside a parameter that trains (a
    BatchNorm's running statistics), in every normalisation layer under `update_norm_stats`, and in modules that have
    no parameter of their own (a moving average, a queue).
    """
    state = _require(module)
    adapters = [state.adapters[name] for name in state.active]
    kept = {name for adapter in adapters for name in adapter.base} | moving_buffers(module, adapters)
    for path, child in module.named_modules():
        if not child._parameters and not isinstance(child, FrozenStatistics):
            saved = child._buffers.keys() - child._non_persistent_buffers_set
            kept.update(f"{path}.{name}".lstrip(".") for name in saved)
    return {key for key in module.state_dict() if key in kept or adapter_of(key) in state.active}


def adapter_of(key: str) -> str | None:
    """Name of the adapter that a state-dict key belongs to; None for one of the base."""
    _, mark, rest = f".{key}".partition(".peft.")
    return rest.partition(".")[0] if mark else None


def adapter_keys(module: nn.Module) -> set[str]:
    """State-dict keys that a checkpoint must hold now: the fixed ones, and those of base buffers that have moved.

    A buffer that was seen to have moved stays among them, also where it is back at its first value. Reads every
    saved buffer of the base; where some are sharded, every rank calls.
    """
    state = _require(module)
    state.moved |= moved_buffers(module, state.originals)
    return fixed_keys(module) | (state.moved & base_buffers(module).keys())


def record(module: nn.Module, keys: set[str]) -> dict[str, Any]:
    """The entry that goes with an adapter's tensors.

    Format and release; methods and arguments of the active adapters, and their weights where these are not 1; the
    buffers that moved beyond the fixed keys; and the fingerprint of the frozen base, as it was when the first adapter
    came, without what goes with the adapters.

    Args:
        module: The adapted module.
        keys: Its `adapter_keys`, which cost a look at every buffer.
    """
    state = _require(module)
    return {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "methods": {name: state.adapters[name].spec for name in state.active},
        "weights": dict(state.weights),
        "head": state.head,
        "aside": {
            name: {key: whole(tensor).cpu() for key, tensor in state.aside[name].items()}
            for name in state.active
            if name in state.aside
        },
        "moved": sorted(keys - fixed_keys(module)),
        "fingerprint": {name: digest for name, digest in state.fingerprint.items() if name not in keys},
    }


def take_moved(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Before the tensors of a checkpoint are loaded: buffers that it leaves out had not moved, and are put back.

    Args:
        module: The adapted module.
        saved: The checkpoint's record.
    """
    state = _require(module)
    state.moved = set(saved.get("moved", ()))
    put_back(module, base_buffers(module).keys() - fixed_keys(module) - state.moved, state.originals)


def check_record(
    module: nn.Module,
    saved: Mapping[str, Any],
    keys: Iterable[str] | None,
    may_change: Mapping[str, frozenset[str]],
    *,
    resumes: bool = False,
    folder: str = "FOLDER",
) -> None:
    """Compares a checkpoint with the module it is about to be loaded into, before anything is changed.

    Args:
        module: The adapted module.
        saved: The checkpoint's own record, well formed.
        keys: Keys of the tensors in it; None where they are loaded already, and no longer known.
        may_change: Adapter name -> arguments that may differ.
        resumes: Whether a fit goes on from the checkpoint. Rates must then be the same too: they are part of the
            optimizer's state, which would not fit other groups, or put the old rates in the place of new ones.
        folder: The adapter folder of the run, which is told to whoever wants another storage of the base.

    Raises:
        CheckpointMismatch: Naming the first thing that does not fit.
    """
    state = _require(module)
    _compare_methods(saved["methods"], state, may_change, resumes, folder)
    difference = compare_fingerprints(saved["fingerprint"], state.fingerprint)
    if difference is not None:
        raise CheckpointMismatch(f"This checkpoint belongs to another base model: {difference}.")
    fixed, moved = fixed_keys(module), set(saved.get("moved", ()))
    found = fixed | moved if keys is None else set(keys)
    missing = sorted((fixed | moved) - found)
    unknown = sorted(found - fixed - (moved & base_buffers(module).keys()))
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({names[0]}{', …' if names[1:] else ''})"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointMismatch(f"The checkpoint's tensors do not fit this module: {' and '.join(parts)}.")


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: frozenset[str], *, rates: bool
) -> Iterator[str]:
    """Names of the arguments of a method that differ and must not; learning rates count only with `rates`."""
    for argument in sorted({*old, *new} - may_change):
        was, now = old.get(argument), new.get(argument)
        if not rates and argument in RATES:
            was, now = (_patterns(v) if argument == "train_also" else None for v in (was, now))
        if was != now:
            yield argument


def _patterns(train_also: Any) -> Any:
    return list(train_also or ()) if isinstance(train_also, Iterable | None) else train_also


def _compare_methods(
    saved: Mapping[str, Any], state: Registry, may_change: Mapping[str, frozenset[str]], resumes: bool, folder: str
) -> None:
    if set(saved) != set(state.active):
        raise CheckpointMismatch(
            f"The checkpoint holds the adapters {sorted(saved)}, the module {sorted(state.active)}."
        )
    for name, old in saved.items():
        new = state.adapters[name].spec
        if old["class_path"] != new["class_path"]:
            raise CheckpointMismatch(f"The checkpoint was made with {old['class_path']}, not {new['class_path']}.")
        was, now, allowed = old["init_args"], new["init_args"], may_change.get(name, frozenset())
        weights = set(differing(was, now, allowed, rates=False))
        for argument in differing(was, now, allowed, rates=resumes):
            hint = "" if argument in weights else " A fit that resumes goes on at the rates it began with."
            if argument == "quantize" and not resumes:
                hint = (
                    f" For another one, give the run's adapter and no checkpoint: --adapter {folder}; in Python, "
                    f"lit_peft.load(model, {folder!r}, quantize=...)."
                )
            made, asked = _told_apart(argument, was.get(argument), now.get(argument))
            raise CheckpointMismatch(
                f"The checkpoint was made with {new['class_path'].rpartition('.')[2]}({made}), not {asked}.{hint}"
            )


def _told_apart(argument: str, was: Any, now: Any) -> tuple[str, str]:
    """An argument with its value, and the other value; of two `quantize`, no more than the options that differ."""
    if argument == "quantize":
        modes = [value.get("mode") if isinstance(value, Mapping) else value for value in (was, now)]
        if modes[0] != modes[1]:  # the options of one are none of the other
            was, now = modes
        elif isinstance(was, Mapping) and isinstance(now, Mapping):
            keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
            old, new = (", ".join(f"{argument}.{key}={value.get(key)!r}" for key in keys) for value in (was, now))
            return old, new if keys[1:] else repr(now.get(keys[0]))
    return f"{argument}={was!r}", repr(now)


def _require(module: nn.Module) -> Registry:
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter attached.")
    return state


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


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str, *, buffers: bool = True) -> None:
    """Makes sure that tensors can be loaded into their places.

    Args:
        module: The adapted module.
        tensors: Those of the checkpoint; what has no place is not looked at.
        where: The file.
        buffers: Whether buffers of the base must have their shapes, too: a module may give them others as it loads.

    Raises:
        CheckpointMismatch: Naming one of another shape or kind, or a parameter that holds nan or inf.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    places = module.state_dict(keep_vars=True)
    for key, tensor in tensors.items():
        place = places.get(key)
        if not isinstance(place, Tensor) or is_lazy(place) or not (buffers or key in parameters or adapter_of(key)):
            continue
        if place.shape != tensor.shape:
            raise CheckpointMismatch(
                f"{where}: {key} has shape {list(tensor.shape)}, and {list(place.shape)} in the module."
            )
        if _kind(tensor) != _kind(place):
            raise CheckpointMismatch(f"{where}: {key} is of {tensor.dtype}, and {place.dtype} in the module.")
        # A buffer may hold inf, as a mask does.
        if key in parameters and tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointMismatch(
                f"{where}: {key} holds nan or inf: its training diverged, or the file is damaged. Use another "
                "checkpoint of the run."
            )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype is torch.bool, tensor.layout


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
