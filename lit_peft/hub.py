"""Where a model or data set named by the user is: a local path, the Hugging Face cache, or the hub."""

import difflib
import os
import re
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Literal

DEMO = "demo"
HOST = "huggingface.co"
PROBE_SECONDS = 3.0
FILE_SUFFIXES = {
    ".csv",
    ".tsv",
    ".txt",
    ".json",
    ".jsonl",
    ".parquet",
    ".arrow",
    ".yaml",
    ".yml",
    ".gz",
    ".zip",
}
FILE_SUFFIXES |= {".ckpt", ".safetensors", ".bin", ".pt", ".pth"}


def locate(name: str, *, what: Literal["model", "dataset"] = "model") -> str:
    """Decide what `name` means, within seconds even where the hub is out of reach.

    The first of these that holds:

    1. `demo`, for a model: the folder of the bundled encoder (a folder of that name is `./demo`);
    2. an existing file or folder: its absolute path;
    3. something that can only be a local path (it starts with `.`, `~` or `/`, ends like a file, has more
       than one `/`, or lies in an existing folder): an error;
    4. a hub id: itself where the hub can be reached, else the folder of its snapshot in the local cache.

    `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` rule the hub out. With `HF_ENDPOINT` or a proxy set, the hub
    counts as
    reachable: a plain connection would say nothing.

    Args:
        name: What the user wrote.
        what: The kind of repository that a hub id means, "model" or "dataset".

    Returns:
        An absolute path, or a hub id for `from_pretrained` or `load_dataset`.

    Raises:
        FileNotFoundError: A local path that does not exist; names the nearest one that does.
        ValueError: Neither a path nor a possible hub id.
        ConnectionError: A hub id that is not in the cache while the hub is out of reach.
    """
    if name == DEMO and what == "model":
        from lit_peft.demo import ENCODER

        return str(ENCODER)
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path.absolute())
    if _is_local(name):
        raise FileNotFoundError(_not_found(path))
    # A hub id is [namespace/]name of letters, digits, ".", "-" and "_".
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        raise ValueError(f"{name!r} is neither an existing path nor a hub id such as 'namespace/name'.")

    offline = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(v)), None)
    if not offline and _hub_is_reachable():
        return name
    if cached := _cached(name, what):
        return cached
    key = "model.backbone" if what == "model" else "data.path"
    why = f"{offline} is set" if offline else f"{HOST} cannot be reached"
    raise ConnectionError(
        f"There is no local path {name!r}, {why}, and the {what} is not in the Hugging Face cache.\n"
        f"Either use the bundled demo with `--config offline`, or set `{key}` to a local folder."
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_local(name: str) -> bool:
    """Whether `name` can be nothing but a path."""
    head, slash, rest = name.partition("/")
    return (
        name.startswith((".", "~", os.sep))
        or Path(name).suffix.lower() in FILE_SUFFIXES
        or "/" in rest
        or (bool(slash) and Path(head).is_dir())
    )


def existing(path: Path) -> Path:
    """The path itself; FileNotFoundError with the nearest one where there is none."""
    if not path.exists():
        raise FileNotFoundError(_not_found(path))
    return path


def _not_found(path: Path) -> str:
    folder = next(p for p in path.absolute().parents if p.is_dir())
    missing = path.absolute().relative_to(folder).parts[0]
    siblings = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(missing, siblings, n=1, cutoff=0.5)
    hint = f"nearest: {folder / near[0]}" if near else f"{folder} holds {', '.join(siblings[:8]) or 'nothing'}"
    return f"No such file or folder: {path} ({hint})."


def _hub_is_reachable() -> bool:
    if os.environ.get("HF_ENDPOINT") or urllib.request.getproxies():
        return True
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((HOST, 443), PROBE_SECONDS).close()
            connected.set()
        except OSError:
            pass

    # In a thread: name resolution knows no time limit, and each address of the host gets the whole of it.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return connected.is_set()


def _cached(name: str, what: str) -> str | None:
    """Snapshot folder of a hub id, the id itself where only `datasets`' prepared copy is left, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, repo_type=what, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if what == "dataset":
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        *owner, repository = name.split("/")
        prepared = "___".join([*owner, camelcase_to_snakecase(repository)])
        if (Path(config.HF_DATASETS_CACHE) / prepared).is_dir():
            return name
    return None
