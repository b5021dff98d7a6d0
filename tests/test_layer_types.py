"""No file of the methods names a layer type: what differs between types is `LayerOps`' to know."""

import ast
from pathlib import Path

import pytest
from torch import nn

from lit_peft import methods
from lit_peft.core import layers

FILES = sorted(Path(methods.__file__).parent.glob("*.py"))
MODULES = {name for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)}
TYPES = {name.rpartition(".")[2] for name in layers._REGISTRY} | MODULES - {"Module"}
SHAPE = {"ndim", "shape", "dim", "size"}


def layer_types(source: str) -> list[str]:
    """Where a source names a layer type, in code or by its name as text, or probes the shape of a layer's weight.

    A network of a method's own may be built of layers: `nn.ModuleList(...)`, `skip_init(nn.Linear, ...)`.
    """
    tree, built, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            makes = [node.func] + node.args[:1] * (ast.unparse(node.func) == "skip_init")
            built |= {id(made) for made in makes}
    for node in ast.walk(tree):
        # An attribute, a name, a text, or what is imported.
        named = next((getattr(node, key) for key in ("attr", "id", "value") if hasattr(node, key)), None)
        named = node.name if isinstance(node, ast.alias) else named
        is_type = isinstance(named, str) and named.rpartition(".")[2] in TYPES and id(node) not in built
        probes = isinstance(node, ast.Attribute) and node.attr in SHAPE and getattr(node.value, "attr", "") == "weight"
        if is_type or probes:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_method_names_a_layer_type(path):
    assert not layer_types(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(layer, nn.Linear)",
        "isinstance(layer, Embedding)",
        "type(layer).__name__ == 'Conv1D'",
        "register('transformers.pytorch_utils.Conv1D')",
        "from transformers.pytorch_utils import Conv1D",
        "layer.weight.ndim == 4",
        "len(site.layer.weight.shape)",
        "getattr(layer, 'weight').ndim; kinds = {nn.Conv2d: 1}",
    ],
)
def test_what_names_one_is_found(source):
    assert layer_types(source)


def test_a_network_of_its_own_is_none():
    assert not layer_types("self.out: nn.Module = nn.ModuleList([skip_init(nn.Linear, 4, 2)])\nself.out.weight.dtype")
