"""Where a model or data set named by the user is: a local path, the Hugging Face cache, or the hub."""

import difflib
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

What = Literal["model", "dataset"]

DEMO = "demo"
DEMO_DECODER = "demo-decoder"
BUNDLED = (DEMO, DEMO_DECODER)
"""Names of models that come with the package."""
BROKEN = {"TransportError", "ConnectionError", "TimeoutError", "LocalEntryNotFoundError", "HfHubHTTPError"}
"""Names of exceptions of a hub that does not answer as it should."""
PROBE_SECONDS = 3.0
FILE = re.compile(
    r".*\.(csv|tsv|txt|raw|tokens|jsonl?|parquet|arrow|xlsx?|ya?ml|gz|zip|ckpt|safetensors|bin|pth?)",
    re.DOTALL | re.IGNORECASE,
)


def locate(name: str, *, what: What = "model") -> str:
    """Decide what `name` means, within seconds even where the hub is out of reach.

    The first of these that holds:

    1. `demo` or `demo-decoder`, for a model: the folder of the bundled encoder or decoder (a folder of that name is
       `./demo`);
    2. an existing file or folder: its absolute path;
    3. something that can only be a local path (it starts with `.`, `~` or `/`, ends like a file, has more
       than one `/`, or lies in an existing folder): an error;
    4. a hub id: itself where the hub can be reached, else the folder of its snapshot in the local cache.

    `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` rule the hub out. Whether it can be reached is asked through
    huggingface_hub's own session, which honours `HF_ENDPOINT` and proxies, for 3 s at most.

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
    if name in BUNDLED and what == "model":
        from lit_peft.demo import DECODER, ENCODER

        return str(ENCODER if name == DEMO else DECODER)
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path.absolute())
    if _is_local(name):
        raise FileNotFoundError(_not_found(path))
    # A hub id is [namespace/]name of letters, digits, ".", "-" and "_".
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        raise ValueError(f"{name!r} is neither an existing path nor a hub id such as 'namespace/name'.")

    offline = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(v)), None)
    if not offline and _hub_answers(name, what):
        return name
    if cached := _cached(name, what):
        return cached
    raise ConnectionError(_out_of_reach(name, what, f"{offline} is set" if offline else None))


@contextmanager
def explained(name: str, what: What = "model") -> Iterator[None]:
    """Tells in one to three lines why what `locate` found cannot be loaded; for around `from_pretrained` and the like.

    Args:
        name: What the user wrote.
        what: The kind of repository.

    Raises:
        ConnectionError: The hub went out of reach after `locate` had found it.
        FileNotFoundError: The hub has no such repository, or not for this user.
        ValueError: Whatever else the library that loads it raises as an OSError or a ValueError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the file system: a full disk is told elsewhere
            raise
        chain = [error]
        while follower := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(follower)  # type: ignore[arg-type]
        # By name: datasets, transformers and huggingface_hub each have their own, over different HTTP libraries.
        kinds = {cls.__name__ for link in chain for cls in type(link).__mro__}
        if "OfflineModeIsEnabled" in kinds:
            raise ConnectionError(_out_of_reach(name, what, "HF_HUB_OFFLINE is set")) from error
        if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
            raise FileNotFoundError(_no_repository(name, what, gated="gated" in str(error))) from error
        if "RemoteEntryNotFoundError" not in kinds and kinds & BROKEN:
            raise ConnectionError(_out_of_reach(name, what)) from error
        if isinstance(error, OSError | ValueError):
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            raise ValueError(line if name in line else f"Cannot load the {what} {name!r}: {line}") from error
        raise


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that the user named; raises what `locate` and `explained` do."""
    from transformers import AutoTokenizer

    source = locate(name)
    with explained(name):
        return AutoTokenizer.from_pretrained(source)


def _out_of_reach(name: str, what: What, why: str | None = None) -> str:
    if why is None:
        from huggingface_hub import constants

        proxy = " through your proxy" if {"http", "https", "all"} & urllib.request.getproxies().keys() else ""
        why = f"{constants.ENDPOINT} cannot be reached{proxy}"
    key = "model.backbone" if what == "model" else "data.path"
    return (
        f"There is no local path {name!r}, {why}, and the {what} is not in the Hugging Face cache.\n"
        f"Either use the bundled demo with `--config offline`, or set `{key}` to a local folder."
    )


def _no_repository(name: str, what: What, gated: bool) -> str:
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{'datasets/' if what == 'dataset' else ''}{name}"
    if gated:
        return f"The {what} {name!r} is gated: ask for access at {page}, then log in with `hf auth login`."
    return (
        f"There is no local path {name!r}, and no {what} of that name at {constants.ENDPOINT}, or it is private.\n"
        f"Check the spelling at {page}; a private one needs `hf auth login`."
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_local(name: str) -> bool:
    """Whether `name` can be nothing but a path."""
    head, slash, rest = name.partition("/")
    return (
        name.startswith((".", "~", os.sep))
        or FILE.fullmatch(name) is not None
        or "/" in rest
        or (bool(slash) and Path(head).is_dir())
    )


def existing(path: Path) -> Path:
    """The path itself; FileNotFoundError with the nearest one where there is none."""
    if not path.exists():
        raise FileNotFoundError(_not_found(path))
    return path


def _not_found(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there."
    folder = next(p for p in path.absolute().parents if p.is_dir())
    missing = path.absolute().relative_to(folder).parts[0]
    siblings = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(missing, siblings, n=1, cutoff=0.5)
    hint = f"nearest: {folder / near[0]}" if near else f"{folder} holds {', '.join(siblings[:8]) or 'nothing'}"
    return f"No such file or folder: {path} ({hint})."


def _hub_answers(name: str, what: What) -> bool:
    """Whether anything but an error of a server or a proxy comes back when a file of the repository is asked for.

    Not the start page: a mirror may have none, or have one and no way on to the repositories.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    file = "datasets/{}/resolve/main/README.md" if what == "dataset" else "{}/resolve/main/config.json"
    url, session = f"{constants.ENDPOINT}/{file.format(name)}", get_session()
    answered = threading.Event()

    def ask() -> None:
        # Whatever goes wrong, the hub is of no use; the libraries would try again for half a minute.
        with suppress(Exception):
            if session.head(url, timeout=PROBE_SECONDS).status_code < 500:
                answered.set()

    # In a thread: name resolution knows no time limit, and connecting, reading and each redirect get the whole of it.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answered.is_set()


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
