"""Why a class path on the command line names no class that can be used, in words for the one who typed it."""

import importlib
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_peft.arguments import nearest


def find_fault(class_path: str) -> str | None:
    """What is wrong with the module or the class that a path names, `my_pkg.Net`; None where nothing is.

    The module is imported. Whatever that raises is told with its place, and not taken for a wrong name.
    """
    name, _, attribute = class_path.rpartition(".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return _no_module(error.name)
        return raised(f"Importing {name}", error)
    except Exception as error:
        return raised(f"Importing {name}", error)
    found = getattr(module, attribute, None)
    if found is None:
        return _no_class(module, attribute)
    return _other_lightning(class_path, found) if isinstance(found, type) else None


def imported(class_path: str) -> Any:
    """What a class path names, where nothing is wrong with it."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _no_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    places = getattr(sys.modules[parent], "__path__", []) if parent else [str(Path.cwd())]
    close = nearest(last, [module.name for module in pkgutil.iter_modules(places)])
    where = f"in {parent}" if parent else f"in {Path.cwd()} nor among the installed packages"
    return f"There is no module {name!r} {where}.{close}"


def _no_class(module: ModuleType, name: str) -> str:
    classes = [key for key, value in vars(module).items() if isinstance(value, type)]
    own = [key for key in classes if vars(module)[key].__module__.startswith(module.__name__)]
    hint = nearest(name, classes) or (f" Its own: {', '.join(own[:5])}." if own else "")
    return f"Module {module.__name__!r} ({getattr(module, '__file__', None)}) has no class {name!r}.{hint}"


def raised(what: str, error: BaseException) -> str:
    """Two lines or more on an exception of somebody's code: what was done, the place, and the exception itself."""
    last = traceback.format_exception_only(error)[-1].strip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    own = [f for f in frames if f.filename.startswith(str(Path.cwd()))]  # rather than deep in a library
    file, line = ((own or frames)[-1].filename, (own or frames)[-1].lineno) if len(frames) > 1 else (None, None)
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    if isinstance(error, ImportError) and not own:  # a package that another one wants: the place helps nobody
        file = None
    return f"{what} failed{f' at {file}, line {line}' if file else ''}:\n{last}"


def _other_lightning(class_path: str, cls: type) -> str | None:
    """pytorch_lightning has the same classes as lightning.pytorch, and either's trainer refuses the other's."""
    base = next((b for b in cls.__mro__ if b.__module__.startswith("pytorch_lightning.")), None)
    if base is None:
        return None
    return (
        f"{class_path} is a {base.__name__} of pytorch_lightning, and this command runs on lightning, which refuses "
        f"it.\nIn {cls.__module__}, write `import lightning.pytorch as pl`, not `import pytorch_lightning as pl`."
    )
