"""What prompt methods share: where their virtual tokens go, and how a folder holds them."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_peft.core.addition import Addition
from lit_peft.core.hf_peft import PROMPT, find_root, task_type
from lit_peft.core.layers import layer_ops
from lit_peft.core.targets import Site, make_site
from lit_peft.methods.base import Method
from lit_peft.methods.checks import check_range
from lit_peft.methods.positions import argument_names, position_room, position_table
from lit_peft.methods.prompts import CrossAttended, Prompt


class PromptMethod(Method):
    """A method that puts virtual tokens before the input embeddings. `vectors(width)` allocates them.

    It goes around the transformer below the head: of a causal model or an encoder its `base_model`, or the decoder that
    this holds, as OPT's, of an encoder-decoder the encoder. What that returns has the length of the text again, so that
    heads, labels and losses see nothing of the virtual tokens: position 0 is still [CLS], and a pooler reads it there.
    Only a decoder's cross-attention sees them, as its encoder's output.

    In an encoder with a table of positions the text keeps the positions that it was pretrained on, [CLS] at the first,
    and the virtual tokens share them: moved on by n, the same prompt trains far worse there. A decoder's text
    begins at n. With `as_hf_peft`, which folders of HF PEFT's ask for, an encoder's text begins at n as well, and the
    head of a sequence classifier reads the first *virtual* token.
    """

    hf_peft: ClassVar[dict[str, Any]]
    hf_options: ClassVar[dict[str, Any]] = {
        "num_virtual_tokens": None,
        "task_type": None,
        **dict.fromkeys(("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")),
    }

    def __init__(self, num_virtual_tokens: int = 20, as_hf_peft: bool = False, **common: Any) -> None:
        super().__init__(**common)
        check_range("num_virtual_tokens", num_virtual_tokens, 1)
        self.num_virtual_tokens, self.as_hf_peft = num_virtual_tokens, as_hf_peft

    def vectors(self, width: int) -> "Prompt":
        """Allocates the virtual tokens, [n, width]."""
        raise NotImplementedError(f"{type(self).__name__} must define vectors(width).")

    def sites(self, module: nn.Module, avoid: Iterable[str]) -> list[Site]:
        model: Any = find_root(module).model
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            stacks = [model.get_encoder(), model.get_decoder()]
        else:
            stack = getattr(model, "base_model", model)
            stacks = [getattr(stack, "decoder", stack)]  # OPT's and BART's heads go past what holds their decoder
        if "inputs_embeds" not in argument_names(stacks[0]):
            raise ValueError(
                f"{type(self).__name__} puts virtual tokens before the embeddings of a text, and "
                f"{type(model).__name__} takes none (a transformers model takes them as inputs_embeds): use LoRA."
            )
        self._reads_one = task_type(model, ()) == "SEQ_CLS"
        paths = {id(child): path for path, child in module.named_modules()}
        return [make_site(paths[id(stack)], stack) for stack in stacks]

    def positions_taken(self, causal: bool) -> int:
        return self.num_virtual_tokens if causal or self.as_hf_peft else 0

    def plan(self, sites: list[Site]) -> None:
        self._decoder = sites[1].path if len(sites) > 1 else None

    def build(self, site: Site) -> Addition:
        stack: Any = site.layer
        if site.path == self._decoder:
            return CrossAttended(argument_names(stack))
        embedding = stack.get_input_embeddings()
        prompt = self.vectors(layer_ops(embedding).size(embedding)[0])
        prompt.names, prompt.stays = argument_names(stack), self._decoder is not None
        prompt.room, prompt.padding = position_room(stack), getattr(position_table(stack), "padding_idx", None)
        causal = any(getattr(child, "is_causal", False) for child in stack.modules())
        if causal or prompt.stays:
            return prompt
        if self.as_hf_peft:
            prompt.stays = self._reads_one
        else:
            prompt.keeps = prompt.room is not None and "position_ids" in prompt.names
            prompt.own_form = prompt.keeps or self._reads_one
        return prompt

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's form, which holds the finished vectors; an encoder's own tensors stand beside them."""
        site, prompt = sites[0]
        vectors, config = prompt.prompt(), site.layer.config
        entries = {
            "num_virtual_tokens": len(vectors),
            "token_dim": vectors.shape[1],
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_transformer_submodules": 1,  # of an encoder-decoder, the encoder
        }
        if prompt.own_form:
            entries |= {"peft_type": f"LIT_PEFT_{self.hf_peft['peft_type']}", "task_type": None}
        own = {f"{site.path}.prompt_encoder.{name}".lstrip("."): p for name, p in prompt.named_parameters()}
        return entries, {PROMPT: vectors} | ({} if any(p is vectors for p in own.values()) else own)

    @classmethod
    def from_hf_peft(cls, options: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same prompt; see `lit_peft.saving.folder`."""
        as_hf_peft = options["task_type"] not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        return {"num_virtual_tokens": options["num_virtual_tokens"], "as_hf_peft": as_hf_peft}
