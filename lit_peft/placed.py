"""`lit-peft merge` and `lit-peft export` take two paths, from and to; here they become options."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_peft.arguments import CONFIG_FLAGS, nearest, options, values
from lit_peft.saving.new_folder import check_free

PLACED = ("merge", "export")
"""Verbs that hand a result over."""
ALONE = {"devices": "1", "num_nodes": "1", "strategy": "auto", "logger": "false"}
"""How their trainer runs: one process holds the model and writes it."""


def place(arguments: Sequence[str]) -> list[str]:
    """Puts options in the place of the paths: `merge FROM TO …` is `merge --run FROM --out TO …`, and the like.

    Raises:
        ValueError: When there are not two paths, or the first is nothing that could be handed over.
        OSError: When the first is not there, or the second is; see `check_free`.
    """
    verb, *words = arguments
    if verb not in PLACED or {"-h", "--help"}.intersection(words):
        return list(arguments)
    taken = {i for start, end, _, _ in options(words) for i in range(start, end)}
    paths = {i: word for i, word in enumerate(words) if i not in taken and not word.startswith("-")}
    if len(paths) != 2:
        given = f"not {len(paths)}: {', '.join(paths.values())}" if paths else "and none is given"
        raise ValueError(
            f"{verb} takes two paths, {given}. Usage: lit-peft {verb} RUN_OR_ADAPTER NEW_FOLDER [--KEY VALUE …]"
        )
    source, out = paths.values()
    rest = [word for i, word in enumerate(words) if i not in paths]
    words = [*_source(verb, Path(source), rest), *rest]
    check_free(out)
    alone = [word for key, value in ALONE.items() for word in (f"--trainer.{key}", value)]
    return [verb, *words, *alone, "--out", out]


def _source(verb: str, path: Path, words: Sequence[str]) -> list[str]:
    """The options that mean a run's folder, one of its checkpoints, or the folder of an adapter."""
    named = bool(values(words, "--run", *CONFIG_FLAGS))
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{verb}: there is no {str(path)!r}.{nearest(path.name, siblings)}")
    run = next((p for p in path.resolve().parents[:2] if _is_run(p)), None)
    of_run = ["--run", str(_as_typed(path, run))] if run is not None and not named else []
    if path.is_file() and path.suffix == ".ckpt":
        if not of_run and not named:
            raise ValueError(
                f"{verb}: {path} lies in no run's folder, whose configuration would say what it is of: give that one "
                "too, --run FOLDER."
            )
        return [*of_run, "--ckpt_path", str(path)]
    if _is_run(path):
        return ["--run", str(path)]
    if (path / "adapter_config.json").is_file():
        return [*of_run, "--adapter", str(path)]
    raise ValueError(
        f"{verb}: {path} is neither the folder of a run (config.yaml) or an adapter (adapter_config.json) nor a "
        f"run's .ckpt file.{_hint(path, run)}"
    )


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _as_typed(path: Path, run: Path) -> Path:
    """The run above a path, relative where the path is and leads there."""
    return next((p for p in path.parents if p != Path() and p.resolve() == run), run)


def _hint(path: Path, run: Path | None) -> str:
    runs = sorted((p.parent for p in path.glob("*/config.yaml")), key=lambda p: p.stat().st_mtime)
    if runs:
        return f" The newest run in it: {runs[-1]}"
    if run is not None:
        return f" It lies in a run: {_as_typed(path, run)}"
    folder = path if path.is_dir() else path.parent
    if (path.parent / "adapter_config.json").is_file():
        return f" It lies in an adapter: {path.parent}"
    try:
        whole = "architectures" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        whole = False
    return " It is a whole model, with nothing to fold in." if whole else ""
