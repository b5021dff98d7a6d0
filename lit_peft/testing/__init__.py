"""The conformance suite that every method passes, those of other packages too; it needs pytest.

from lit_peft.testing import MethodConformance

class TestMine(MethodConformance):
    method = Mine(r=2)
"""

from lit_peft.testing.conformance import MethodConformance
from lit_peft.testing.subjects import LAYERS, MODELS, Model

__all__ = ["LAYERS", "MODELS", "MethodConformance", "Model"]
