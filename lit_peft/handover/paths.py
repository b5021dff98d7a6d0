"""`lit-peft merge` and `lit-peft export` take two paths, from and to; here they become options."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_peft.arguments import CONFIG_FLAGS, nearest, options, take, values
from lit_peft.core.folder_files import open_files
from lit_peft.saving.new_folder import check_free

PLACED = ("merge", "export")
"""Verbs that hand a result over."""
ALONE = {"devices": "1", "num_nodes": "1", "strategy": "auto", "logger": "false"}
"""How their trainer runs: one process holds the model and writes it."""

_IN_PYTHON = {
    "merge": "lit_peft.saving.merged.save_merged(model, NEW_FOLDER)",
    "export": "lit_peft.save(model, NEW_FOLDER)",
}
_BOOLS = (["true"], ["false"])
USAGE = "Usage: lit-peft {verb} RUN_OR_ADAPTER NEW_FOLDER [--KEY VALUE …]"


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
    rest = [word for i, word in enumerate(words) if i not in paths]
    places = list(paths.values())
    runs = values(words, "--run")
    if "--out" in words or any(word.startswith("--out=") for word in words):
        raise ValueError(f"{verb} takes the new folder as its second path, without --out. {USAGE.format(verb=verb)}")
    if len(places) == 1 and len(runs) == 1:  # the run's own result
        rest, _ = take(rest, "--run")
        places = [runs[0], *places]
    if len(places) != 2:
        given = f"not {len(places)}: {', '.join(places)}" if places else "and none is given"
        raise ValueError(f"{verb} takes two paths, {given}. {USAGE.format(verb=verb)}")
    source, out = places
    words = [*_source(verb, Path(source), rest), *rest]
    check_free(out)
    alone = [word for key, value in ALONE.items() for word in (f"--trainer.{key}", value)]
    return [verb, *words, *alone, "--out", out]


def here_and_alone(arguments: Sequence[str]) -> list[str]:
    """Lets `plan` need none of the devices that its configuration names; a bare `--json` means true."""
    verb, *words = arguments
    if verb != "plan" or {"-h", "--help"}.intersection(words):
        return list(arguments)
    words = ["--json=true" if w == "--json" and words[i + 1 : i + 2] not in _BOOLS else w for i, w in enumerate(words)]
    alone = [f"--trainer.{key}={value}" for key, value in (ALONE | {"accelerator": "cpu"}).items()]
    return [verb, *words, *alone]


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
        if not of_run and not named and not values(words, "--model"):
            _check_task(verb, path)
        return [*of_run, "--adapter", str(path)]
    raise ValueError(
        f"{verb}: {path} is neither the folder of a run (config.yaml) or an adapter (adapter_config.json) nor a "
        f"run's .ckpt file.{_hint(path, run)}"
    )


def _check_task(verb: str, adapter: Path) -> None:
    """Raises ValueError for an adapter alone that says it is of another model than a classifier of texts."""
    config, _, mine = open_files(adapter)
    task, built = config.get("task_type"), (config.get("auto_mapping") or {}).get("base_model_class", "")
    ours = mine is None or bool(mine.get("model"))  # a task of ours says what it is
    if (task is None and ours and (not built or built.endswith("ForSequenceClassification"))) or task == "SEQ_CLS":
        return
    what = f"of {task}" if task else f"of a {built}" if built else "of a module of somebody's own"
    raise ValueError(
        f"{verb}: {adapter} is {what} and lies in no run that would say how its model is built: give that run, "
        f"--run FOLDER, or in Python lit_peft.load(model, FOLDER), then {_IN_PYTHON[verb]}."
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
