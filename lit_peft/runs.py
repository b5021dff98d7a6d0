"""Folders of runs: <root>/version_N with config.yaml, checkpoints, adapter and metrics."""

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from lit_peft.core.locks import try_lock

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables in which a launcher says which rank a process is, the first that is set."""

LOCK = ".lock"
"""File of a run's folder that the process which trains in it holds."""


def is_first_rank() -> bool:
    """Whether this process is rank 0 of a run, by what its launcher says before any process group is there."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return rank == "0" and os.environ.get("NODE_RANK", "0") == "0"


def claim_folder(root: Path) -> Path:
    """Makes <root>/version_N, N the first number that is free, so that runs started together do not share one.

    Further ranks make none. Those that Lightning starts have the first one's environment and find its folder there;
    those that torchrun or srun starts cannot know it yet and take <root>/version_of_rank_0, in which nothing is
    written: the checkpoint callbacks take rank 0's folder as soon as there is a process group.
    """
    if not is_first_rank():
        return Path(os.environ.get("LIT_PEFT_RUN", root / "version_of_rank_0"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"trainer.default_root_dir: {root} is a file, expected a folder.") from None
    except OSError as error:
        raise OSError(error.errno, f"trainer.default_root_dir: {error.strerror}", str(root)) from error
    number = max((n for n, _ in _numbered(root)), default=-1) + 1
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run was faster
            number += 1
        else:
            os.environ["LIT_PEFT_RUN"] = str(folder)
            return folder


def give_back_folder() -> None:
    """Removes the folder that this process claimed, of a run that was refused before it began: nothing is in it."""
    claimed = os.environ.pop("LIT_PEFT_RUN", None)
    if claimed is None or not is_first_rank():
        return
    written = [file.name for file in Path(claimed).rglob("*") if file.is_file()]
    if all(name in ("config.yaml", "hparams.yaml", LOCK) or "tfevents" in name for name in written):
        shutil.rmtree(claimed, ignore_errors=True)


_locks: list[FileLock] = []


def lock_folder(folder: Path) -> None:
    """Keeps a run's folder to this process until `unlock_folders`, or until the process ends in whatever way.

    Raises:
        ValueError: When another process has it: both would write the same files.
    """
    try:
        lock = try_lock(folder / LOCK)
    except Timeout:
        raise ValueError(f"{folder}: another process is training in this folder; wait for it, or stop it.") from None
    if lock is not None:
        _locks.append(lock)


def unlock_folders() -> None:
    """Lets other processes train in the folders that this one had locked."""
    while _locks:
        lock = _locks.pop()
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _numbered(root: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.name[8:]), p) for p in root.glob("version_*") if p.name[8:].isdigit())


def run_folder(checkpoint: str | None) -> Path | None:
    """The run that a checkpoint belongs to, <run>/checkpoints/x.ckpt, or None."""
    path = Path(checkpoint) if checkpoint else None
    return path.parent.parent if path is not None and path.exists() and path.parent.name == "checkpoints" else None


def newest_checkpoint(root: Path, name: str) -> Path | None:
    """`checkpoints/<name>.ckpt` of the newest run below a root that has one, None where none has."""
    paths = (folder / "checkpoints" / f"{name}.ckpt" for _, folder in reversed(_numbered(root)))
    return next((path for path in paths if path.exists()), None)  # a folder, where a strategy writes shards


def claim_given(folder: Path) -> None:
    """Takes the folder that a logger of the user's names for a new run.

    Raises:
        FileExistsError: When it holds a run already, which the new one would write over.
    """
    if (folder / "config.yaml").is_file() or (folder / "metrics.json").is_file():
        way_on = (
            f"Go on with it, lit-peft fit --run {folder}, or let" if any(folder.glob("checkpoints/*.ckpt")) else "Let"
        )
        raise FileExistsError(
            f"{folder} holds a run already. {way_on} the new one make a folder of its own: leave out the logger's "
            "version."
        )
    if is_first_rank():
        os.environ["LIT_PEFT_RUN"] = str(folder)


def remove_parts(folder: Path) -> None:
    """Removes what a killed writer left beside the files of a run: `.NAME.….part`, see `atomic_path`."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def free_file(name: str | None, folder: Path) -> Path:
    """The file that predictions go to: the one named, or predictions.jsonl in a folder, numbered where it exists.

    Raises:
        FileExistsError: When the file that was named exists: what is in it would be lost.
    """
    if name is not None:
        if Path(name).exists():
            raise FileExistsError(f"predictions: {name} exists; name another file, or remove it.")
        return Path(name)
    candidates = (folder / f"predictions{number}.jsonl" for number in ("", *(f"-{n}" for n in range(1, 1_000_000))))
    return next(path for path in candidates if not path.exists())
