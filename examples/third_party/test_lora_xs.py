"""The suite that every method of lit-peft passes: `pytest test_lora_xs.py`."""

from your_own_method import LoRAXS

from lit_peft.testing import MethodConformance


class TestLoRAXS(MethodConformance):
    method = LoRAXS(r=4)

    def count(self, out_features: int, in_features: int) -> int:
        return 4 * 4
