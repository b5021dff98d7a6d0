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
from typing import TYPE_CHECKING, Any

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
        _, node = self._source()
        return "" if node is None else (ast.get_docstring(node) or "").split("\n", 1)[0]

    def defaults(self) -> dict[str, Any]:
        """Argument -> default, inherited ones too, read from the source; without those that are no plain values."""
        tree, node = self._source()
        found: dict[str, Any] = {}
        for base in self._bases(tree, node):
            found = base.defaults() | found
        constants = {_name(item.targets[0]): item.value for item in tree.body if isinstance(item, ast.Assign)}
        for item in [] if node is None else node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                arguments, values = item.args.args + item.args.kwonlyargs, item.args.defaults + item.args.kw_defaults
                plain = zip(arguments[len(arguments) - len(values) :], values, strict=True)
                found |= {a.arg: value[0] for a, v in plain if (value := _literal(constants.get(_name(v), v)))}
        return found

    def class_attribute(self, name: str) -> Any:
        """The value of an attribute of the class, read from the source; None where it is no plain value."""
        tree, node = self._source()
        for item in [] if node is None else node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
                return (_literal(item.value) or [None])[0]
        found = (base.class_attribute(name) for base in self._bases(tree, node))
        return next((value for value in found if value is not None), None)

    def _source(self) -> tuple[ast.Module, ast.ClassDef | None]:
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return ast.Module([], []), None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == self.name)
        return tree, next(classes, None)

    def _bases(self, tree: ast.Module, node: ast.ClassDef | None) -> list["Entry"]:
        """The methods that the class derives from, of the same file or imported into it."""
        imports = [item for item in tree.body if isinstance(item, ast.ImportFrom) and not item.level]
        homes = {alias.asname or alias.name: item.module or "" for item in imports for alias in item.names}
        homes |= {item.name: self.module for item in tree.body if isinstance(item, ast.ClassDef)}
        names = [] if node is None else [base.id for base in node.bases if isinstance(base, ast.Name)]
        ours = [name for name in names if name in homes and homes[name].partition(".")[0] in _packages(self.module)]
        return [
            Entry(name, homes[name], self.package) for name in ours if (name, homes[name]) != (self.name, self.module)
        ]


def _packages(module: str) -> set[str]:
    """Packages whose classes may be looked up: looking up a module imports those around it."""
    return {"lit_peft", module.partition(".")[0]}


def _name(node: ast.expr | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _literal(node: ast.expr | None) -> list[Any]:
    """The value of a literal in a list, an empty one for any other expression."""
    try:
        return [] if node is None else [ast.literal_eval(node)]
    except (ValueError, TypeError, SyntaxError):
        return []


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


def class_path(cls: type) -> str:
    """What a checkpoint or folder names a method; the built-in ones under their public path."""
    module = "lit_peft.methods" if cls.__module__.startswith("lit_peft.methods.") else cls.__module__
    return f"{module}.{cls.__qualname__}"


def method_class(path: str) -> "type[Method]":
    """The class that a checkpoint or folder names: of an installed method, or one that is imported already.

    Raises:
        CheckpointMismatch: When it is neither; what a file names is never imported.
    """
    from lit_peft.core.checkpoint import CheckpointMismatch
    from lit_peft.methods.base import Method

    for entry in available().values():
        if entry.class_path == path:
            return entry.load()
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if isinstance(cls, type) and issubclass(cls, Method):
        return cls
    raise CheckpointMismatch(f"The adapter was made with {path}, which is not here: import {module or 'it'} first.")
