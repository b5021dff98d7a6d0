"""Prompt tuning: virtual tokens before the text."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.core.targets import Site
from lit_peft.methods.checks import check_choice
from lit_peft.methods.prompt_method import PromptMethod
from lit_peft.methods.prompt_text import token_ids
from lit_peft.methods.prompts import Prompt


class PromptTuning(PromptMethod):
    """Prompt tuning: `X' = [P; X]`, with `P`: [n, d] trained and `X`: [length, d] the embeddings of the text.

    Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2. Trains `n d`
    parameters, the fewest of all methods, and lengthens every text by n tokens, in inference too. Small models
    learn less by it than by a change of weights (section 3.1).

    Args:
        num_virtual_tokens: n. Beyond 20 little is gained (section 3.2).
        init: How P starts: vocabulary, embeddings of n tokens drawn at random; text, those of `init_text`; random,
            uniform within .5. Vectors that the model knows start far better than random ones (section 3.2).
        init_text: The text for init text, cut off or repeated to n tokens. Say the task: "Is this review good?"
        tokenizer: Hub id or folder of its tokenizer; null for the model's own.
        as_hf_peft: Whether an encoder's text moves on by n positions and the head of its sequence classifier reads the
            first virtual token, as in HF PEFT, which then opens the folder. Off, because it trains far worse.
        **common: See `Method`.

    The rate is high because nothing moves but n vectors, which are far from where they shall go. On the bundled demo
    1e-2 was the best of 1e-3, 3e-3, 1e-2 and 3e-2; the authors use .3 with Adafactor on a large model.
    The text is read at the start of a fit; in a loop of your own call `prepare(module, ())` once.
    """

    learning_rate: ClassVar[float] = 1e-2
    may_change = frozenset({"init", "init_text", "tokenizer"})
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "PROMPT_TUNING"}
    hf_options: ClassVar[dict[str, Any]] = PromptMethod.hf_options | dict.fromkeys(
        ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    )

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        init: Literal["vocabulary", "text", "random"] = "vocabulary",
        init_text: str | None = None,
        tokenizer: str | None = None,
        as_hf_peft: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(num_virtual_tokens, as_hf_peft, **common)
        check_choice("init", init, ("vocabulary", "text", "random"))
        if (init == "text") != bool(init_text):
            raise ValueError(f"init text and init_text go together, not init {init} with init_text {init_text!r}.")
        self.init, self.init_text, self.tokenizer = init, init_text, tokenizer

    def vectors(self, width: int) -> Prompt:
        return PromptVectors(self.num_virtual_tokens, width, self.init)

    def prepare(self, module: nn.Module, batches: Iterable[Any]) -> None:
        if self.init_text is None:
            return
        ids = token_ids(module, self.init_text, self.tokenizer, self.num_virtual_tokens)
        path, vectors = next(iter(self.additions(module).items()))
        with torch.no_grad():
            vectors.prompt_embeddings.copy_(_rows(module.get_submodule(path), ids))


class PromptVectors(Prompt):
    """`prompt_embeddings`: [n, d]."""

    def __init__(self, n: int, width: int, init: str) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.empty(n, width))
        self.init_kind = init

    def init(self, site: Site, generator: torch.Generator) -> None:
        if self.init_kind == "random":
            nn.init.uniform_(self.prompt_embeddings, -0.5, 0.5, generator=generator)
            return
        stack: Any = site.layer
        vocabulary = stack.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (len(self.prompt_embeddings),), generator=generator)
        self.prompt_embeddings.copy_(_rows(stack, ids))

    def describe(self) -> dict[str, Any]:
        return {"n": len(self.prompt_embeddings), "init": self.init_kind}

    def prompt(self) -> Tensor:
        return self.prompt_embeddings


def _rows(stack: Any, ids: Tensor) -> Tensor:
    embedding = stack.get_input_embeddings()
    rows: Tensor = embedding(ids.to(next(embedding.parameters()).device))  # the module's own way: some scale
    return rows
