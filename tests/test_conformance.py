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
    SparseLoRA,
    VeRA,
)
from lit_peft.testing import MODELS, MethodConformance

PLAIN = ("mlp", "conv_net")
TEXT = tuple(name for name in MODELS if name not in PLAIN)


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


class TestIA3AtInputs(MethodConformance):
    method = IA3(feedforward_modules="re:.*")

    def count(self, out_features, in_features):
        return in_features


class TestBitFit(MethodConformance):
    method = BitFit()
    models = tuple(name for name in MODELS if name not in ("llama", "t5"))
    refuses = dict.fromkeys(("llama", "t5"), "has no biases")


class TestFullFineTuning(MethodConformance):
    method = FullFineTuning()


class TestLinearProbe(MethodConformance):
    method = LinearProbe()

    def make(self, model=None, **changes):
        return super().make(model, train_also=[model.head], **changes)


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


class TestPromptTuning(MethodConformance):
    method = PromptTuning(3)
    starts_as_base = False
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "takes none")


class TestPTuning(MethodConformance):
    method = PTuning(3, hidden_size=5)
    starts_as_base = False
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "takes none")


class TestPrefixTuning(MethodConformance):
    method = PrefixTuning(3)
    starts_as_base = False
    layers = ()
    models = TEXT
    refuses = dict.fromkeys(PLAIN, "computes its attention itself")


class TestReparametrisedPrefix(MethodConformance):
    method = PrefixTuning(3, reparametrise=True)
    starts_as_base = False
    layers = ()
    models = TEXT
    refuses = TestPrefixTuning.refuses
