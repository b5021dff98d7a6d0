"""What a verb starts from: a checkpoint, what it knows, and the files that its run named from another folder."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_peft.arguments import settings
from lit_peft.core.files import check_archive, read_archive
from lit_peft.core.records import RECORD, check_checkpoint
from lit_peft.data.held_out import trained_data
from lit_peft.hub import existing
from lit_peft.runs import newest_checkpoint
from lit_peft.tasks.base import BACKBONE_PATH

HYPER_PARAMETERS = {"data": "datamodule_hyper_parameters", "model": "hyper_parameters"}
"""Where Lightning keeps the arguments of each in a checkpoint."""


def given_options(section: str) -> set[str]:
    """Arguments of the model or the data that an option of the command line sets, not a configuration."""
    found = settings(sys.argv[1:], section)
    return {name for setting in found if setting.source.startswith("--") for name in setting.init_args}


def starting_checkpoint(verb: str, config: Any) -> str | None:
    """Path of the checkpoint that a verb starts from; "hpc", which Lightning finds, stays.

    Raises:
        ValueError: When a verb other than fit has none: it would score an adapter that was never trained.
        FileNotFoundError: For a file that is not there.
    """
    given, root = config.get("ckpt_path"), Path(str(config.trainer.default_root_dir))
    if given in ("best", "last"):
        found = newest_checkpoint(root, given)
        if found is None and (verb, given) != ("fit", "last"):
            raise FileNotFoundError(f"ckpt_path {given}: no run in {root} has checkpoints/{given}.ckpt.")
        print(f"ckpt_path {given}: {found or 'none yet, the run starts anew'}")
        return None if found is None else str(found)
    if given is not None:
        if given != "hpc" and "://" not in str(given) and not existing(Path(str(given))).is_dir():
            check_archive(given, contents=True)  # a folder is a sharding strategy's to read
            content = read_archive(given, mapped=True)
            if RECORD in content:
                check_checkpoint(content[RECORD], str(given))
        return str(given)
    if verb in ("fit", "plan") or _takes_adapter(config):
        return None
    best = next((b for b in (run / "checkpoints" / "best.ckpt" for run in _runs(config)) if b.exists()), None)
    if best is None:
        raise ValueError(
            f"{verb} needs the weights of a run: --run FOLDER, a checkpoint of it, --ckpt_path "
            "FOLDER/checkpoints/best.ckpt, or an adapter, --adapter FOLDER."
        )
    return str(best)


def knowledge(config: Any) -> Mapping[str, Any]:
    """The content of the checkpoint that a verb starts from, its tensors unread.

    Of an adapter folder that of a checkpoint of the run that the folder lies in, else of the run given with it. Empty
    where there is none, or one in shards.
    """
    checkpoints = [Path(config["ckpt_path"])] if config["ckpt_path"] else []
    if _takes_adapter(config):
        runs = [*Path(str(config.method.init_args.path)).resolve().parents[:2], *_runs(config)]
        checkpoints = [run / "checkpoints" / name for run in runs for name in ("best.ckpt", "last.ckpt")]
    found = next((path for path in checkpoints if path.is_file()), None)
    return {} if found is None else read_archive(found, mapped=True)


def find_files(config: Any, known: Mapping[str, Any]) -> None:
    """Puts absolute paths of data and base where a run goes on elsewhere, and the ones it was given lead nowhere.

    Args:
        config: Configuration of the verb; what options say in it is kept.
        known: See `knowledge`.
    """
    places = {"data": ("path", trained_data(known).get("path")), "model": ("backbone", known.get(BACKBONE_PATH))}
    for section, (name, where) in places.items():
        arguments = (config.get(section) or {}).get("init_args") or {}
        given = (known.get(HYPER_PARAMETERS[section]) or {}).get(name)
        if arguments.get(name) != given or name in given_options(section):
            continue
        if given and where and not Path(given).expanduser().exists() and Path(where).exists():
            print(f"{section}.{name} {given}: {where}")
            arguments[name] = where


def _takes_adapter(config: Any) -> bool:
    return bool(config.method.class_path.endswith(".AdapterFolder"))


def _runs(config: Any) -> list[Path]:
    """Folders that configurations lie in, the last first: those of runs have checkpoints."""
    return [Path(str(path)).parent for path in reversed(config.get("config") or [])]
