"""P-tuning: virtual tokens before the text, made by a small network."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lit_peft.core.targets import Site
from lit_peft.methods.checks import check_range
from lit_peft.methods.prompt_method import PromptMethod
from lit_peft.methods.prompt_tuning import PromptVectors
from lit_peft.methods.prompts import Prompt


class PTuning(PromptMethod):
    """P-tuning: `X' = [f(E); X]`, `E`: [n, d], `f` three linear layers d -> h -> h -> d with ReLU between them.

    Liu et al. 2021, "GPT Understands, Too", section 3, in the variant with a perceptron. The network ties the
    virtual tokens together, which makes them easier to train than free vectors. Trains
    `n d + d h + h h + h d + 2 h + d` parameters; only the n vectors `f(E)` matter afterwards, and they lengthen every
    text, in inference too.

    Args:
        num_virtual_tokens: n, as in `PromptTuning`.
        hidden_size: h; null for d, the width of the embeddings, as in HF PEFT.
        reparametrise: Whether there is an f. Without one, the vectors are trained themselves: that is what a folder
            of HF PEFT's keeps of P-tuning.
        as_hf_peft: As in `PromptTuning`.
        **common: See `Method`.
    """

    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "P_TUNING"}
    hf_options: ClassVar[dict[str, Any]] = PromptMethod.hf_options | dict.fromkeys(
        ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    )

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        hidden_size: int | None = None,
        reparametrise: bool = True,
        as_hf_peft: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(num_virtual_tokens, as_hf_peft, **common)
        if hidden_size is not None:
            check_range("hidden_size", hidden_size, 1)
        self.hidden_size, self.reparametrise = hidden_size, reparametrise

    def vectors(self, width: int) -> Prompt:
        if not self.reparametrise:
            return PromptVectors(self.num_virtual_tokens, width, "vocabulary")
        return PromptEncoder(self.num_virtual_tokens, width, self.hidden_size or width)

    @classmethod
    def from_hf_peft(cls, options: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same prompt, whose network HF PEFT has dropped; see `lit_peft.saving.folder`."""
        return super().from_hf_peft(options, paths) | {"reparametrise": False}


class PromptEncoder(Prompt):
    """`f(E)`; `embedding`: [n, d], then three linear layers d -> h -> h -> d."""

    def __init__(self, n: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(n, width))
        sizes = [(width, hidden), (hidden, hidden), (hidden, width)]
        self.layers = nn.ModuleList(skip_init(nn.Linear, *size) for size in sizes)

    def init(self, site: Site, generator: torch.Generator) -> None:
        nn.init.normal_(self.embedding, generator=generator)
        for layer in self.layers:
            init_linear(layer, generator)

    def describe(self) -> dict[str, Any]:
        return {"n": len(self.embedding), "hidden": self.layers[1].in_features}

    def prompt(self) -> Tensor:
        first, second, third = self.layers
        vectors: Tensor = third(second(first(self.embedding).relu()).relu())
        return vectors


def init_linear(layer: Any, generator: torch.Generator) -> None:
    """The starting values that torch gives a linear layer, uniform within 1 / sqrt(in), from a generator."""
    bound = layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
