"""From what the parser, Lightning or the system says of a mistake to one to three lines that help."""

import errno
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_peft.data
import lit_peft.tasks
from lit_peft.arguments import CONFIG_FLAGS, configs, nearest, options, read_config, settings, values
from lit_peft.class_path import find_fault, raised
from lit_peft.handover.paths import PLACED
from lit_peft.limits import PLUGIN_REFUSED, names_plugin
from lit_peft.methods.registry import available, find
from lit_peft.planning.gpus import gpu_bytes
from lit_peft.training import paged

CLASSES = ("model", "data", "method")
FIXED = {"trainer": pl.Trainer, "early_stopping": EarlyStopping, "checkpoint": ModelCheckpoint}
OTHERS = ("trainer.callbacks", "trainer.logger")
"""Options that name a class, too."""
KEYS = ("seed_everything", "ckpt_path", "resume_every", "base_test", "predictions")
FLAGS = ("config", "run", "adapter", "text", "text_pair", *KEYS)
OF_VERB = {"merge": ("score", "into"), "export": ("format",), "plan": ("gpu", "alternatives", "json")}
"""Options that one verb alone has."""
OPTIMIZER = ("optimizer", "lr_scheduler")
"""Sections that LightningCLI has by default."""
ELSEWHERE = {"rank": "r", "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lr": "learning_rate"}
ELSEWHERE |= dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization", "quantization_config"), "quantize")
"""What other libraries call our arguments."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
ABSTRACT = {"collections.abc.Sequence": "list", "collections.abc.Mapping": "dict"}
FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(message: str, arguments: Sequence[str]) -> str:
    """At most three lines on a mistake that the parser found.

    Args:
        message: jsonargparse's text.
        arguments: The command line, in which the option is looked up by its name.
    """
    if names_plugin(_plugins(arguments)):  # whose own arguments are not worth asking for: it is refused with them, too
        return PLUGIN_REFUSED
    for pattern, tell in _FORMS:
        if match := re.match(pattern, message.strip(), re.DOTALL):
            return tell(arguments, *match.groups())
    return shorten(message)


def shorten(text: str) -> str:
    """At most three lines of a text: of jsonargparse's report on a union of types, what was wrong with the value."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if "Errors:" in lines:
        reasons = [line.removeprefix("- ") for line in lines[lines.index("Errors:") + 1 :] if line.startswith("- ")]
        lines = [reason for reason in reasons if "NoneType" not in reason] or lines
    return "\n".join(lines[:3])


def of_built(error: Exception) -> str:
    """At most three lines on a class of the configuration that cannot be built, or on what Lightning or we raise.

    What code raises without meaning it for the reader, a KeyError, is told with its place.
    """
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    built = re.search(r"Given value: Namespace\(class_path='([\w.]+)'", str(error))
    if built and not isinstance(cause, ValueError | OSError | MisconfigurationException):
        return shorten(raised(f"Building {built[1]}", cause))
    return of_lightning(str(error))


def of_system(error: OSError, verb: str) -> str:
    """One line on a file that could not be written or read, and the way out where the disk is full."""
    where = f": {error.filename}" if error.filename else ""
    text = f"{error.strerror or error}{where}."
    if error.errno in FULL and verb in PLACED:
        text += " Nothing stays of what was written: free some space, or name a folder elsewhere."
    elif error.errno in FULL:
        text += " What was written before is whole: free some space, then go on with `lit-peft fit --run RUN`."
    return text


def of_lightning(text: str) -> str:
    """At most three lines on what Lightning, or we, raise."""
    if match := re.search(r"No supported (\w+) backend found", text):
        return f"trainer.accelerator: this machine has no {match[1].upper()}; use auto or cpu."
    if "is not in bounds, numpy accepts" in text:
        return f"seed_everything: {text}."
    if re.match(r"Expected to (be able to )?read \d+ ", text):  # Arrow's, which names no file
        from datasets.config import HF_DATASETS_CACHE

        return f"A prepared data set in {HF_DATASETS_CACHE} is cut short ({text}): delete that folder, and run again."
    return shorten(text)


# ------------------------------------------------------------------------------------------------ unknown options


def _not_accepted(arguments: Sequence[str], name: str) -> str:
    """A name that a class of the configuration does not have."""
    section, source = _home(arguments, name)
    known = _parameters(arguments, section) if section else []
    full = f"{section}.{name}" if section else name
    shown = _class_name(arguments, section) if section else "the class"
    meant = ELSEWHERE.get(name)
    homes = [f"--{s}.{n}" for s in CLASSES for n in (meant or name, name) if n in _parameters(arguments, s)]
    hint = f" Here it is {meant!r}." if meant in known else nearest(name, known)
    if meant not in known and homes:
        hint = f" It belongs to another section: {homes[0]}."
    if name in known:
        return f"{source}{full} stands before what names its class: put it behind --config and --{section}."
    return f"{source}{full}: {shown} has no argument {name!r}.{hint}{_listed(known)}"


def _unrecognized(arguments: Sequence[str], words: str) -> str:
    """An option that the verb does not have."""
    flag = words.split()[0]
    name = flag.lstrip("-").partition("=")[0]
    section, _, rest = name.partition(".")
    if not flag.startswith("--"):
        return f"{flag!r} belongs to no option; an option is --key value."
    if section in OPTIMIZER:
        return (
            f"unknown option {flag}: a module builds its own optimizer. TextClassification takes "
            "--model.learning_rate, --model.weight_decay, --model.schedule, and --model.optimizer with a class."
        )
    if rest and section in (*FIXED, *CLASSES):
        known = _parameters(arguments, section)
        return f"unknown option {flag}.{_nearest_option(section, rest, known)}{_listed(known)}"
    sections = [*OF_VERB.get(arguments[0], ()), *FLAGS, *CLASSES, *FIXED]
    names = (name, ELSEWHERE.get(name, name))
    homes = [f"--{s}.{n}" for n in names for s in CLASSES if n in _parameters(arguments, s)]
    if homes:
        return f"unknown option {flag}. It is an argument of the {homes[0][2:].partition('.')[0]}: {homes[0]}."
    if rest and (close := nearest(section, [*CLASSES, *FIXED])):
        return f"unknown option {flag}.{close.replace('?', '')}, as in --{close.split(chr(39))[1]}.{rest}?"
    return f"unknown option {flag}.{nearest(name, sections)} There are: {', '.join(sections)}."


def _no_value(arguments: Sequence[str], flag: str) -> str:
    """An option without a value, or with one that begins as an option does."""
    given = [pair for pair in pairwise([*arguments, "--"]) if re.match(r"-(?![\d.]+$)", pair[1])]
    # The parser calls an option of a class by the class, --data.
    flag, value = next((pair for pair in given if re.fullmatch(rf"{flag}(\.[\w.]+)?", pair[0])), (flag, "--"))
    if value.startswith("--"):
        return f"{flag} needs a value."
    if flag == "--gpu":
        try:
            gpu_bytes(value)  # no GPU is called so
        except ValueError as error:
            return str(error)
    return f"{flag}: {value!r} is read as an option, since it begins with '-'. As a value: {flag}={value}."


def _subcommand(arguments: Sequence[str], verb: str, name: str) -> str:
    """A key of a configuration file that the verb does not have."""
    section, _, rest = name.partition(".")
    file = next((f for f in values(arguments, "--config", "-c") if section in read_config(f)), "")
    source = f"{file}: " if file else ""
    if section in FIXED:
        known = _parameters(arguments, section)
        return f"{source}unknown key {name!r}.{_nearest_option(section, rest, known)}{_listed(known)}"
    sections = [*CLASSES, *FIXED, *KEYS]
    return f"{source}unknown key {section!r}.{nearest(section, sections)} Keys: {', '.join(sections)}."


def _nearest_option(section: str, name: str, known: Iterable[str]) -> str:
    return nearest(name, known).replace("'", f"'{section}.", 1)


def _listed(known: Sequence[str], most: int = 14) -> str:
    return f" It has {', '.join(known[:most])}{', …' if len(known) > most else ''}." if known else ""


def _required(arguments: Sequence[str], names: str) -> str:
    missing = [name.rpartition(".")[2] for name in names.split(", ")]
    if missing[0] not in CLASSES:  # an argument of a class that was named
        others = [flag for _, _, flag, _ in options(arguments) if flag.lstrip("-") in OTHERS]
        homes = [f"--{section}" for section in CLASSES if missing[0] in _parameters(arguments, section)] or others
        return f"{missing[0]} has no default: give {homes[-1] if homes else '--model'}.{missing[0]} VALUE."
    return (
        f"nothing says which {', '.join(missing)} to use. Name a configuration, --config quickstart for "
        f"instance, or give --{' … --'.join(missing)} ….\nConfigurations: {', '.join(configs())}."
    )


# --------------------------------------------------------------------------------------------------- wrong values


def _value(arguments: Sequence[str], key: str, text: str) -> str:
    """A value of the wrong type."""
    section, source = (None, "") if "." in key or key in CLASSES else _home(arguments, key)
    full = f"{section}.{key}" if section else key
    if key in FIXED:
        return (
            f"{full} takes options, such as --{full}.{_parameters(arguments, key)[0]} VALUE, and no value of its own."
        )
    for name, plain in ABSTRACT.items():
        text = text.replace(f"<class '{name}'>", f"<class '{plain}'>")
    if "class_path" in text or "dot import path" in text or re.search(r"<class '\w+\.", text):
        return f"{source}{full}: {_class(key, text)}"
    given, text = _given(text), re.sub(r"Given value type:.*|Subtypes:.*", "", text)
    choices = [word for found in re.findall(r"Literal\[(.*?)\]", text) for word in re.findall(r"'([^']*)'", found)]
    kinds = [TYPES[name] for name in dict.fromkeys(re.findall(r"<class '(\w+)'>", text)) if name in TYPES]
    expected = [kind for kind in kinds if kind != "null"] + ["null"] * ("null" in kinds)
    if choices := list(dict.fromkeys(choices)):
        also = [kind for kind in kinds if kind == TYPES["bool"]]
        expected = [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0], *also]
    if not expected:
        return f"{source}{full}: {shorten(text)}"
    return f"{source}{full}: expected {' or '.join(expected)}, not {given!r}.{nearest(given, choices)}"


def _given(text: str) -> str:
    match = re.search(r"(?:Given value|Got value): (.*)", text)
    return match[1].strip() if match else ""


def _class(key: str, text: str) -> str:
    """A class that is not there, cannot be imported, or is of another kind."""
    paths = re.findall(r"(?:Given value: |class_path'?: ?'?)((?:\w+\.)+\w+)", text)
    for path in paths:
        if (fault := find_fault(path)) is not None:
            return fault
    if "does not correspond to a subclass" in text:
        kind = re.search(r"subclass of (\w+)", text)
        return f"{''.join(paths[:1])} is not a {kind[1] if kind else 'class of that kind'}."
    unknown = re.search(r"dot import path string: (\S+)", text)
    if unknown is None:
        return shorten(text)
    name = unknown[1]
    if key == "method":
        try:
            find(name)
        except ValueError as error:
            return str(error)
    short = _short_names(key)
    known = f" {', '.join(short)}, or" if key in CLASSES else ""
    return f"there is no class {name!r}.{nearest(name, short)} Expected{known} a path such as my_package.{name}."


def _short_names(key: str) -> list[str]:
    if key == "optimizer":
        return [*paged.NAMES, *torch.optim.__all__]
    if key == "trainer.callbacks":
        return [name for name, cls in vars(pl.callbacks).items() if inspect.isclass(cls)]
    return {"model": lit_peft.tasks.__all__, "data": lit_peft.data.__all__, "method": list(available())}.get(key, [])


# ----------------------------------------------------------------------------------------------- where things are


def _home(arguments: Sequence[str], name: str) -> tuple[str | None, str]:
    """The section in which an argument of this bare name was given, and "FILE: " where a file gives it."""
    for _, _, flag, _ in options(arguments):
        if match := re.fullmatch(rf"--(\w+)\.(?:init_args\.)?{re.escape(name)}", flag):
            return match[1], ""
    for section in CLASSES:
        for setting in reversed(settings(arguments, section)):
            if name in setting.init_args:
                return section, "" if setting.source.startswith("--") else f"{setting.source}: "
    return None, ""


def _plugins(arguments: Sequence[str]) -> Any:
    """The trainer's plugins, as the last place says that sets them."""
    found: Any = None
    for _, _, flag, value in options(arguments):
        if flag in CONFIG_FLAGS:
            found = (read_config(value).get("trainer") or {}).get("plugins", found)
        elif re.fullmatch(r"--trainer(\.plugins(\.class_path|\+)?)?", flag):
            found = value
    return found


def _class_name(arguments: Sequence[str], section: str) -> str:
    if section in FIXED:
        return FIXED[section].__name__
    found = [s.class_path for s in settings(arguments, section) if s.class_path]
    return found[-1].rpartition(".")[2] if found else section


def _parameters(arguments: Sequence[str], section: str) -> list[str]:
    """Names of the arguments of a section's class, by the parser's own reading of it.

    Those that it passes on to its base classes are among them, and those that it fixes for them are not.
    """
    cls: Any = FIXED.get(section)
    if cls is None:
        found = [s.class_path for s in settings(arguments, section) if s.class_path]
        module, _, name = (found[-1] if found else "").rpartition(".")
        for home in filter(None, (module, "lit_peft.methods", "lit_peft.tasks", "lit_peft.data")):
            try:
                cls = cls or getattr(importlib.import_module(home), name, None)
            except ImportError:
                continue
    return ArgumentParser().add_class_arguments(cls, fail_untyped=False) if inspect.isclass(cls) else []


_FORMS = (
    (r"Option '([\w.]+)' is not accepted", _not_accepted),
    (r"[Uu]nrecognized arguments: (.+)", _unrecognized),
    (r"Subcommand '(\w+)' does not accept option '([\w.]+)'", _subcommand),
    (r"argument (?:\S+/)?(--[\w.]+): expected one argument", _no_value),
    (r"the following arguments are required: (.+)", _required),
    (r'Parser key "([^"]+)":(.*)', _value),
)
