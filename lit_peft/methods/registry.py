"""All methods by short name: the built-in ones and those that installed packages bring."""

import ast
import difflib
import importlib.util
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lit_peft.methods import BUILT_IN

if TYPE_CHECKING:
    from lit_peft.methods.base import Method

GROUP = "lit_peft.methods"
"""Entry-point group through which a package brings a method: `MyMethod = "my_package.module:MyMethod"`."""


@dataclass(frozen=True)
class Entry:
    """A method that can be named on the command line: where its class is, without having imported it."""

    name: str
    module: str
    package: str

    @property
    def class_path(self) -> str:
        """What LightningCLI imports; the built-in ones under their public path."""
        return f"lit_peft.methods.{self.name}" if self.package == "lit-peft" else f"{self.module}.{self.name}"

    def load(self) -> "type[Method]":
        """Imports the class."""
        return getattr(import_module(self.module), self.name)

    def summary(self) -> str:
        """First line of the class's docstring, read from the source without importing it; "" where there is none."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return ""
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == self.name:
                return (ast.get_docstring(node) or "").split("\n", 1)[0]
        return ""


def available() -> dict[str, Entry]:
    """Short name -> entry, built-in methods first. A plugin that takes a built-in's name is left out with a warning."""
    found = {name: Entry(name, f"lit_peft.methods.{module}", "lit-peft") for name, module in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.module
        if point.attr in found:
            warnings.warn(f"Package {package} brings a method named {point.attr!r}, which is taken.", stacklevel=2)
        else:
            found[point.attr] = Entry(point.attr, point.module, package)
    return found


def find(name: str) -> Entry:
    """The entry of a short name.

    Raises:
        ValueError: When there is none, with the nearest names.
    """
    methods = available()
    if name in methods:
        return methods[name]
    folded, low = {known.lower(): known for known in methods}, name.lower()
    close = [low] if low in folded else difflib.get_close_matches(low, list(folded), n=2, cutoff=0.5)
    close = close or [known for known in folded if name and known.startswith(low)]
    hint = f" Did you mean {' or '.join(folded[c] for c in close)}?" if close else ""
    raise ValueError(f"There is no method named {name!r}.{hint} Methods: {', '.join(methods)}.")


def method_class(class_path: str) -> "type[Method]":
    """The class that a checkpoint or folder names: of an installed method, or one that is imported already.

    Raises:
        CheckpointMismatch: When it is neither; what a file names is never imported.
    """
    from lit_peft.core.checkpoint import CheckpointMismatch
    from lit_peft.methods.base import Method

    for entry in available().values():
        if entry.class_path == class_path:
            return entry.load()
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if isinstance(cls, type) and issubclass(cls, Method):
        return cls
    raise CheckpointMismatch(
        f"The adapter was made with {class_path}, which is not here: import {module or 'it'} first."
    )
