"""A folder that appears whole or not at all, whatever becomes of the process that writes it."""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from lit_peft.core.locks import try_lock

LONGEST = 249
"""Bytes of a name beside which there is room for `.NAME.part`."""


def resolved(path: str | os.PathLike[str]) -> Path:
    """A path without ~ and links: where a new folder of this name is to be."""
    return Path(path).expanduser().resolve()


def check_free(path: str | os.PathLike[str]) -> Path:
    """The place of a new folder, links followed.

    Raises:
        FileExistsError: When there is something already: a file, a folder that is not empty, or a mount point or
            the folder of this process, whose name cannot be given to another folder.
        NotADirectoryError: When a file stands where a folder above it belongs.
        PermissionError: When the folder above it cannot be written to.
    """
    place = resolved(path)
    if place == Path.cwd():
        raise FileExistsError(f"{path} is the folder you are in; name a new folder in it, {Path(path) / 'model'}.")
    if place.is_dir():
        if place.is_mount():
            raise FileExistsError(f"{path} is a mount point; name a new folder in it, {Path(path) / 'model'}.")
        if any(place.iterdir()):
            raise FileExistsError(f"{path} exists and is not empty; name another folder, or remove it.")
    elif place.exists():
        raise FileExistsError(f"{path} is a file; name a folder that is not there yet.")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be a folder: {above} is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be made: {above} is not writable.")
    return place


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a hidden folder beside `path` which takes its place at the end, its bytes on the disk by then.

    At every moment `path` is absent (or empty, as it was) or whole. An exception, Ctrl-C or SIGTERM leaves nothing
    behind; what a SIGKILL leaves, `.NAME.part` and `.NAME.lock`, the next call for this path removes.

    Args:
        path: The folder to be; folders above it are made.

    Raises:
        OSError: See `check_free`; and when another process is writing this folder.
    """
    place = check_free(path)
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    name = place.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    part = place.with_name(f".{name}.part")
    try:
        with ExitStack() as stack:
            stack.enter_context(_ended_by_sigterm())
            stack.enter_context(_held(place.with_name(f".{name}.lock"), path))
            stack.callback(shutil.rmtree, part, ignore_errors=True)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            for file in [*part.rglob("*"), part]:
                _sync(file)
            check_free(path)
            part.rename(place)
            _sync(place.parent)
    finally:
        if not place.exists():
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _held(lock_file: Path, path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a lock that ends with the process, so that a folder which another one writes is not taken for a rest."""
    try:
        lock = try_lock(lock_file)
    except Timeout:
        if not lock_file.exists():  # where no file can be, the lock waits for one
            raise PermissionError(f"{path} cannot be made: no file can be written in {lock_file.parent}.") from None
        raise FileExistsError(f"{path}: another process is writing this folder; wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        if lock is not None:
            lock.release()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the process as an exception does, not at once; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
