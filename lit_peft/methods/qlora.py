"""QLoRA: LoRA on a base in 4 bit."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lit_peft.core.quantize import Quantize
from lit_peft.methods.lora import LoRA


class QLoRA(LoRA):
    """LoRA on a base that is stored in 4-bit NormalFloat: `W' = dequantise(codes) + s B A`.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3: NF4 with double quantisation,
    adapters at all linear layers, products in bfloat16, paged AdamW (which our tasks then take). It is
    `LoRA(quantize="nf4")` with the defaults of the paper and no code of its own; every other method takes `quantize`
    too.

    Args:
        r: Rank; 64 is the paper's (appendix B.2).
        alpha: 16, as there, so that `s` is 1/4.
        dropout: .1, as there for models of up to 13 B; .05 for larger ones.
        target_modules: All linear layers: with fewer, LoRA does not reach full fine-tuning (section 4, figure 2).
        quantize: nf4 with double quantisation, computing in bfloat16.
        **lora: As for `LoRA`.
    """

    learning_rate: ClassVar[float] = 2e-4
    optimizer: ClassVar[str] = "bitsandbytes.optim.PagedAdamW"

    def __init__(
        self,
        r: int = 64,
        alpha: float | None = 16,
        dropout: float = 0.1,
        target_modules: str | Sequence[str] | None = "all-linear",
        quantize: Quantize = "nf4",
        **lora: Any,
    ) -> None:
        super().__init__(r, alpha, dropout, target_modules=target_modules, quantize=quantize, **lora)
