"""Every built-in method passes the suite that is shipped for methods of other packages.

docs/conformance.md is made from its outcomes: `make conformance`.
"""

from collections.abc import Iterator
from typing import ClassVar

import pytest
from matrix import Matrix

from lit_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    HiRA,
    LinearProbe,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QLoRA,
    SparseLoRA,
    VeRA,
)
from lit_peft.core.layers import layer_ops
from lit_peft.core.registry import registry
from lit_peft.core.targets import roles_of
from lit_peft.testing import MODELS, MethodConformance

PLAIN = ("mlp", "conv_net")
TEXT = tuple(name for name in MODELS if name not in PLAIN)
WIDTH = 16  # of the text models


def adapted(module):
    """Path and layer of the sites of a method."""
    return [(path, module.get_submodule(path)) for path in registry(module).adapters["default"].sites]


def attention_shape(model):
    """How many attentions a model has, and the width of their keys."""
    return {"t5": 6}.get(model.name, 2), {"llama": WIDTH // 2}.get(model.name, WIDTH)


@pytest.fixture(scope="module", autouse=True)
def _matrix(request: pytest.FixtureRequest) -> Iterator[None]:
    matrix = Matrix(MethodConformance.__subclasses__())
    request.config.pluginmanager.register(matrix)
    yield
    matrix.check_docs()


class TestLoRA(MethodConformance):
    method = LoRA(r=4, dropout=0.0)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features)


class TestQLoRA(MethodConformance):
    method = QLoRA(
        r=4,
        dropout=0.0,
        target_modules=["attention", "ffn"],  # heads of two classes are narrower than r
        # Computing in float32, so that equal is equal; stored in it, so that the codes are sharded with the rest.
        quantize={"mode": "nf4", "compute_dtype": "float32", "storage_dtype": "float32"},
    )
    layers = ("linear", "conv1d", "nf4")

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features)


class TestDoRA(MethodConformance):
    method = DoRA(r=4, dropout=0.0)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features) + out_features


class TestHiRA(MethodConformance):
    method = HiRA(r=4)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features)


class TestSparseLoRA(MethodConformance):
    method = SparseLoRA("structured", r=4, dropout=0.0)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features + 1)


class TestSparseLoRAByMagnitude(MethodConformance):
    method = SparseLoRA("magnitude", r=4, dropout=0.0)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features)


class TestSparseLoRAByL1(MethodConformance):
    method = SparseLoRA("l1", r=4, dropout=0.0)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features)


class TestAdaLoRA(MethodConformance):
    method = AdaLoRA(init_r=4, target_r=2)

    def count(self, out_features, in_features):
        return 4 * (out_features + in_features + 1)


class TestVeRA(MethodConformance):
    method = VeRA(r=8)

    def count(self, out_features, in_features):
        return 8 + out_features


class TestIA3(MethodConformance):
    method = IA3()

    def count(self, out_features, in_features):
        return out_features

    def total(self, model, module):
        layers = ((path, layer_ops(layer).size(layer)) for path, layer in adapted(module))
        return sum(size["ffn_down" in roles_of(path)] for path, size in layers)


class TestIA3AtInputs(MethodConformance):
    method = IA3(feedforward_modules="re:.*")

    def count(self, out_features, in_features):
        return in_features


class TestBitFit(MethodConformance):
    method = BitFit()
    models = tuple(name for name in MODELS if name not in ("llama", "t5"))
    refuses = dict.fromkeys(("llama", "t5"), "has no biases")

    def total(self, model, module):
        return sum(p.numel() for name, p in module.named_parameters() if name.endswith("bias"))


class TestFullFineTuning(MethodConformance):
    method = FullFineTuning()

    def total(self, model, module):
        return sum(p.numel() for p in model.build().parameters())


class TestLinearProbe(MethodConformance):
    method = LinearProbe()

    def make(self, model=None, **changes):
        return super().make(model, train_also=[model.head], **changes)

    def total(self, model, module):
        return sum(p.numel() for name, p in module.named_parameters() if f".{model.head}." in f".{name}")


class TestHoulsbyAdapter(MethodConformance):
    method = BottleneckAdapter("houlsby", reduction_factor=4)
    layers = ("linear", "conv1d", "embedding", "nf4")
    models = tuple(name for name in MODELS if name != "conv_net")
    refuses: ClassVar[dict[str, str]] = {"conv_net": "first is a Conv2d, whose features are channels"}

    def count(self, out_features, in_features):
        width = out_features // 4
        return 2 * out_features * width + width + out_features


class TestParallelAdapter(MethodConformance):
    method = BottleneckAdapter("parallel", reduction_factor=4)
    layers = ("linear", "conv1d", "nf4")
    models = TestHoulsbyAdapter.models
    refuses = TestHoulsbyAdapter.refuses

    def count(self, out_features, in_features):
        width = in_features // 4
        return (in_features + out_features) * width + width + out_features

    def total(self, model, module):  # each reads what the up projection before it reads, as wide as what it returns
        if model.targets is not None:
            return super().total(model, module)
        downs = [layer for path, layer in adapted(module) if "ffn_down" in roles_of(path)]
        return sum(self.count(layer_ops(layer).size(layer)[0], layer_ops(layer).size(layer)[0]) for layer in downs)


class TestPromptTuning(MethodConformance):
    method = PromptTuning(3)
    starts_as_base = False
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "takes none")

    def total(self, model, module):
        return 3 * WIDTH


class TestPTuning(MethodConformance):
    method = PTuning(3, hidden_size=5)
    starts_as_base = False
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "takes none")

    def total(self, model, module):
        return 3 * WIDTH + (WIDTH + 1) * 5 + (5 + 1) * 5 + (5 + 1) * WIDTH


class TestPrefixTuning(MethodConformance):
    method = PrefixTuning(3)
    starts_as_base = False
    layers = ()
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "computes its attention itself")

    def total(self, model, module):
        attentions, width = attention_shape(model)
        return attentions * 3 * 2 * width


class TestReparametrisedPrefix(MethodConformance):
    method = PrefixTuning(3, reparametrise=True)
    starts_as_base = False
    layers = ()
    models = TEXT
    refuses = TestPrefixTuning.refuses

    def total(self, model, module):
        attentions, width = attention_shape(model)
        return 3 * width + (width + 1) * width + attentions * (width + 1) * 2 * width
