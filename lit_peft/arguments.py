"""What stands on the command line before any parser sees it: names of configurations and runs, a changed method.

Nothing here imports torch or Lightning, so that mistakes in names and files are answered at once; only a method
that is changed on the command line is imported.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

CONFIG_FLAGS = ("--config", "-c")
MAPPINGS = ("trainer", "early_stopping", "checkpoint")
"""Sections of a configuration that hold options and name no class."""


def closest(word: str, known: Iterable[object]) -> str | None:
    """The known word that is most like this one, whatever the case; None where none is."""
    folded = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def nearest(word: str, known: Iterable[object]) -> str:
    """A question, did you mean …?, with the closest of the known words; empty where none is close."""
    close = closest(word, known)
    return f" Did you mean {close!r}?" if close else ""


# ---------------------------------------------------------------------------------------- reading the options


def options(arguments: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """The options with a value: (index of the first word, index after the last, flag, value)."""
    i = 0
    while i < len(arguments):
        flag, equals, value = arguments[i].partition("=")
        if flag.startswith("-") and equals:
            yield i, i + 1, flag, value
        elif flag.startswith("-") and i + 1 < len(arguments) and not re.match(r"--\w", arguments[i + 1]):
            yield i, i + 2, flag, arguments[i + 1]
            i += 1
        i += 1


def values(arguments: Sequence[str], *flags: str) -> list[str]:
    """The values that these flags are given, in order."""
    return [value for _, _, flag, value in options(arguments) if flag in flags]


def take(arguments: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Splits a flag off: (the other arguments, its values).

    Raises:
        ValueError: When it stands without a value.
    """
    spans = [(start, end) for start, end, name, _ in options(arguments) if name == flag]
    gone = {i for start, end in spans for i in range(start, end)}
    rest = [word for i, word in enumerate(arguments) if i not in gone]
    if flag in rest:
        raise ValueError(f"{flag} needs a value.")
    return rest, values(arguments, flag)


# ------------------------------------------------------------------------------------- configurations and runs


def configs() -> dict[str, Path]:
    """The configurations that come with the package: name, "sst2/lora", -> file."""
    here = Path(__file__).parent
    folder = next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())  # installed, or a checkout
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def resolve(arguments: Sequence[str]) -> list[str]:
    """Puts files in the place of names: of each `--config NAME`, and of `--run FOLDER`.

    A run stands for its configuration and a checkpoint, unless `--ckpt_path` or `--adapter` names another: for `fit`
    the last one, so that training goes on; for the other verbs the best.

    Raises:
        FileNotFoundError: For what is neither a file nor a name, and for a folder that is no run.
        ValueError: For a file that is no configuration; for a run of several checkpoints, none of them called best.
    """
    words, runs = take(arguments, "--run")
    if runs:
        run = _run(Path(runs[-1]))
        words[1:1] = ["--config", str(run / "config.yaml")]
        if not values(words, "--ckpt_path", "--adapter"):
            words += ["--ckpt_path", str(_checkpoint(run, words[0]))]
    resolved = list(words)
    for start, end, flag, value in options(words):
        if flag in CONFIG_FLAGS:
            path = _config(value)
            read_config(path)
            resolved[start:end] = [f"{flag}={path}"] if end - start == 1 else [flag, path]
    return resolved


def _checkpoint(run: Path, verb: str) -> Path:
    """The checkpoint of a run that a verb starts from.

    Raises:
        FileNotFoundError: When it has none.
        ValueError: When it has several, and none is called best.
    """
    folder = run / "checkpoints"
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if verb != "fit" and best.exists():
        return best
    if verb != "fit" and (chosen := sorted(path for path in folder.rglob("*.ckpt") if path != last)):
        if len(chosen) > 1:
            there = ", ".join(str(path.relative_to(folder)) for path in chosen)
            raise ValueError(f"--run: {folder} holds several checkpoints, {there}: choose one, --ckpt_path FILE.")
        return chosen[0]
    if not last.exists():
        again = f" Start it again: lit-peft fit --config {run / 'config.yaml'}" if verb == "fit" else ""
        raise FileNotFoundError(f"--run: {run} holds no checkpoint, so that there is nothing to {verb}.{again}")
    if verb != "fit":
        print(f"{run} holds no best checkpoint: {verb} takes the last one.")
    return last


def _run(folder: Path) -> Path:
    """The folder, if it is a run's.

    Raises:
        FileNotFoundError: When it is not, with the runs in it, or the nearest folder.
    """
    if (folder / "config.yaml").is_file():
        return folder
    if not folder.is_dir():
        parent = folder.parent
        there = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise FileNotFoundError(f"--run: there is no folder {str(folder)!r}.{nearest(folder.name, there)}")
    inside = sorted((p.parent for p in folder.glob("*/config.yaml")), key=lambda p: p.stat().st_mtime)
    hint = f" The newest run in it: --run {inside[-1]}" if inside else ""
    raise FileNotFoundError(f"--run: {str(folder)!r} is not the folder of a run: it has no config.yaml.{hint}")


def _config(value: str) -> str:
    if os.path.isfile(value):  # noqa: PTH113  (a Path would be made of any text)
        return value
    known = configs()
    name = value.removesuffix(".yaml")
    if name not in known:
        raise FileNotFoundError(
            f"--config: there is no file {value!r} and no configuration of that name.{nearest(name, known)}"
            f" Configurations: {', '.join(known)}."
        )
    return str(known[name])


def read_config(path: str) -> dict[str, Any]:
    """The content of a configuration.

    Raises:
        ValueError: When it is not YAML, or not a mapping of sections; names the file and the line.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{where}: this is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds {str(content)[:40]!r}"
        raise ValueError(f"{path} {kind}; a configuration is a mapping: model, data, method, trainer, …")
    for section in MAPPINGS:
        if not isinstance(content.get(section, {}), dict | None):
            raise ValueError(f"{path}: {section} must be a mapping of options, not {content[section]!r}.")
    return content


# ------------------------------------------------------------------------------------------- classes by section


@dataclass(frozen=True)
class Setting:
    """One place that sets a section's class or its arguments.

    Attributes:
        start: Index of its first word in the arguments.
        end: Index after its last word.
        source: The file, or the flag.
        class_path: Class path or short name, None where only arguments are set.
        init_args: Arguments.
    """

    start: int
    end: int
    source: str
    class_path: str | None
    init_args: dict[str, Any]


def settings(arguments: Sequence[str], section: str) -> list[Setting]:
    """Where `model`, `data` or `method` is set, in the order in which it takes effect."""
    found = []
    for start, end, flag, value in options(arguments):
        if flag in CONFIG_FLAGS:
            content = read_config(value)
            if section in content:
                found.append(_setting(start, end, value, content[section]))
        elif flag in (f"--{section}", f"--{section}.class_path"):
            given = _mapping(value)
            found.append(_setting(start, end, f"--{section}", value if given is None else given))
        elif flag.startswith(f"--{section}."):
            name = flag.removeprefix(f"--{section}.").removeprefix("init_args.")
            found.append(Setting(start, end, flag, None, {name: _plain(value)}))
    return found


def _setting(start: int, end: int, source: str, content: Any) -> Setting:
    if not isinstance(content, dict):
        return Setting(start, end, source, None if content is None else str(content), {})
    arguments = content.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{source}: init_args must be a mapping of arguments, not {arguments!r}.")
    return Setting(start, end, source, content.get("class_path"), dict(arguments))


def _plain(value: str) -> Any:
    """An option's value as YAML reads it."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _mapping(value: str) -> dict[str, Any] | None:
    """The mapping that an option's value is: written out, or in a file."""
    if os.path.isfile(value):  # noqa: PTH113
        return read_config(value)
    content = _plain(value)
    return content if isinstance(content, dict) else None


def name_optimizers(arguments: Sequence[str], names: Iterable[str], package: str) -> list[str]:
    """Puts class paths in the place of short names of optimizers, which other packages may have too, as torchao has."""
    words, flags = list(arguments), ("optimizer", "optimizer.class_path")
    for start, end, flag, value in options(arguments):
        if re.sub(r"^--model\.(init_args\.)?", "", flag) in flags and value in names:
            full = f"{package}.{value}"
            words[start:end] = [flag, full] if end - start == 2 else [f"{flag}={full}"]
    return words


# ------------------------------------------------------------------------------------------- a changed method


def join_quantize(arguments: Sequence[str]) -> list[str]:
    """Adds each `--method.quantize.OPTION VALUE` to the `quantize` that is in force where it stands.

    The parser has only the value itself to add to, and a mode may stand there as a name, or by default.
    """
    words, shift = list(arguments), 0
    given: Any = None
    default: Any = None
    for setting in settings(arguments, "method"):
        if setting.class_path is not None and (method := _method(setting.class_path)) is not None:
            default = method.parameters()["quantize"].default
        given = setting.init_args.get("quantize", given)
        options = {k.removeprefix("quantize."): v for k, v in setting.init_args.items() if k.startswith("quantize.")}
        if options:
            now = default if given is None else given
            given = ({"mode": now} if isinstance(now, str) else dict(now or {})) | options
            insert = ["--method.quantize", json.dumps(given)]
            words[setting.start + shift : setting.end + shift] = insert
            shift += len(insert) - (setting.end - setting.start)
    return words


def change_method(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Gives a method that takes the place of a configuration's its own defaults, not the other one's leftovers.

    An argument that the old method was given, other than its default, was chosen, and is carried over where the new
    method has one of that name; what merely repeats a default is not. A learning rate that a configuration sets
    beside its method is for that method and is dropped, unless an option sets it.

    Returns:
        The arguments, and lines that say what was carried over and what was dropped.
    """
    words, lines, shift = list(arguments), [], 0
    given: dict[str, Any] = {}
    old: Setting | None = None
    for setting in settings(arguments, "method"):
        method = None if setting.class_path is None else _method(setting.class_path)
        before = None if old is None else _method(str(old.class_path))
        if method is None or before is None or method is before:
            given |= setting.init_args
            old = old if setting.class_path is None else setting  # a class that is not there is the parser's to tell
            continue
        name, parameters = method.__name__, method.parameters()
        defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
        written = {key: p.default for key, p in before.parameters().items()}  # nf4, which is kept with all its options
        try:
            kept = before().arguments()
        except TypeError:  # it has arguments without a default
            kept = {}
        usual = (written, kept)
        chosen = {
            k: v
            for k, v in given.items()
            if k not in setting.init_args and not any(k in of and _equal(v, of[k]) for of in usual)
        }
        lines.append(f"Method: {name} with its own defaults, instead of {before.__name__}.")
        for key, value in chosen.items():
            what = "carried over" if key in parameters else f"dropped, {name} has no such argument"
            lines.append(f"  method.{key} {json.dumps(value)}: {what}")
        carried = {key: value for key, value in chosen.items() if key in parameters}
        # The parser keeps what the old method was given wherever the new one has the name: all of it is set again.
        again = {key: value for key, value in defaults.items() if key in given} | carried | setting.init_args
        insert = ["--method", json.dumps({"class_path": setting.class_path, "init_args": again})]
        rate = _rate_beside(arguments, old) if old is not None else None
        if rate is not None:
            insert += ["--model.learning_rate", "null"]
            lines.append(f"  model.learning_rate {rate}: dropped, it was set for {before.__name__}")
        start = setting.start if setting.source == "--method" else setting.end
        words[start + shift : setting.end + shift] = insert
        shift += len(insert) - (setting.end - start)
        given, old = carried | setting.init_args, setting
    return words, lines


def _method(class_path: str) -> Any:
    """The class of a method; None where there is none that can be used, which the parser tells."""
    from lit_peft.methods.base import Method
    from lit_peft.methods.registry import available

    known = available()
    module, _, name = class_path.rpartition(".")
    try:
        found = known[class_path].load() if class_path in known else getattr(import_module(module), name)
    except Exception:  # whatever the user's module raises is told, with its place, by `class_path.find_fault`
        return None
    return found if isinstance(found, type) and issubclass(found, Method) else None


def _equal(value: Any, default: Any) -> bool:
    """Whether a value from YAML, where 1e-3 is a text and every sequence a list, is this default."""
    if isinstance(value, str) and isinstance(default, float):
        return re.fullmatch(r"[-+]?\d+\.?\d*e[-+]?\d+", value, re.IGNORECASE) is not None and float(value) == default
    sequence = default is None or isinstance(default, list | tuple)
    return bool(value == default or (isinstance(value, list) and sequence and value == list(default or ())))


def _rate_beside(arguments: Sequence[str], method: Setting) -> Any:
    """The learning rate that the file which sets this method sets for a task of ours, unless an option does."""
    import lit_peft.tasks

    found = settings(arguments, "model")
    task = next((s.class_path for s in reversed(found) if s.class_path), "").rpartition(".")[2]
    rates = [s for s in found if "learning_rate" in s.init_args]
    if task not in lit_peft.tasks.__all__ or not rates or rates[-1].source != method.source:
        return None
    return rates[-1].init_args["learning_rate"]
