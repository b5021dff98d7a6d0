"""Prefix tuning: keys and values that stand before the text in every attention."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.hf_peft import PROMPT, find_root
from lit_peft.core.targets import Site, make_site
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import check_range
from lit_peft.methods.prefix_attention import Prefix, check_implementation, register
from lit_peft.methods.prefixes import (
    FreePrefix,
    ReparametrisedPrefix,
    ShiftedPositions,
    Trunk,
    key_value_widths,
    stack_around,
)
from lit_peft.methods.prompt_method import PromptMethod
from lit_peft.methods.prompt_text import token_ids


class PrefixTuning(TargetedMethod):
    """Prefix tuning: `attention(Q, [P_k; K], [P_v; V])`, `P_k`, `P_v`: [n, width of the keys] in each layer.

    Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4. Trains `2 n` widths
    a layer; the text keeps its length, and attention gets n keys longer, in inference too. A decoder's positions
    start at n, as if the prefix were text. With `reparametrise`, `[P_k; P_v] = W_l tanh(W E + b) + b_l`, with
    `E`: [n, d] and `W`: [h, d] for all layers and `W_l`, `b_l` for each (section 4.3).

    Args:
        num_virtual_tokens: n. The best length depends on the task: 10 for table-to-text, 200 for summaries
            (section 7.2).
        reparametrise: Whether a network makes the prefix. It steadies training at a small rate, as in the paper; off,
            because it trains many times what it leaves, `d h + 2 h width` a layer, and cannot start from a text.
        hidden_size: h; null for d, the width of the keys.
        init_text: A text whose keys and values, as the base computes them, the prefix starts from, cut off or
            repeated to n tokens; null for random ones. Real words start better on small sets (section 7.4).
        tokenizer: Hub id or folder of its tokenizer; null for the model's own.
        as_hf_peft: Whether an encoder's positions start at n too, as in HF PEFT, which then opens the folder.
        **common: See `TargetedMethod` and `Method`. `target_modules` names the key projections of the attentions that
            get a prefix; by default all of them, a decoder's cross-attention too.

    The rate suits a prefix that is trained itself: on the bundled demo 1e-2 was the best of 3e-3, 1e-2 and 3e-2. With
    `reparametrise`, where weights move, take 1e-3. The text is read at the start of a fit; in a loop of your own
    call `prepare(module, ())` once.
    """

    learning_rate: ClassVar[float] = 1e-2
    default_targets = ("key",)
    may_change = frozenset({"init_text", "tokenizer"})
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "PREFIX_TUNING"}
    hf_options: ClassVar[dict[str, Any]] = PromptMethod.hf_options | dict.fromkeys(
        ("encoder_hidden_size", "prefix_projection", "init_weights")
    )

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        reparametrise: bool = False,
        hidden_size: int | None = None,
        init_text: str | None = None,
        tokenizer: str | None = None,
        as_hf_peft: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_range("num_virtual_tokens", num_virtual_tokens, 1)
        if hidden_size is not None:
            check_range("hidden_size", hidden_size, 1)
        if reparametrise and init_text:
            raise ValueError("init_text sets keys and values, which a network makes under reparametrise: drop one.")
        self.num_virtual_tokens, self.reparametrise, self.hidden_size = num_virtual_tokens, reparametrise, hidden_size
        self.init_text, self.tokenizer, self.as_hf_peft = init_text, tokenizer, as_hf_peft

    def sites(self, module: nn.Module, avoid: Iterable[str]) -> list[Site]:
        try:
            keys = super().sites(module, avoid)
        except ValueError as error:
            if self.target_modules != list(self.default_targets) or self.layers is not None:
                raise
            raise ValueError(
                f"PrefixTuning puts keys and values before those of an attention, and {type(module).__name__} has none "
                "with a key projection that is known: use LoRA."
            ) from error
        register()
        self._widths: dict[str, tuple[int, int]] = {}
        stacks: dict[str, None] = {}
        for key in keys:
            path = key.path.rpartition(".")[0]
            attention: Any = module.get_submodule(path)
            check_implementation(attention)
            self._widths[path] = key_value_widths(attention, key)
            moves = self.as_hf_peft or getattr(attention, "is_causal", False)
            if moves and (stack := stack_around(module, path)) is not None:
                stacks[stack] = None
        return [make_site(path, module.get_submodule(path)) for path in (*self._widths, *stacks)]

    def positions_taken(self, causal: bool) -> int:
        return self.num_virtual_tokens if causal or self.as_hf_peft else 0

    def plan(self, sites: list[Site]) -> None:
        self._trunk: Trunk | None = None

    def build(self, site: Site) -> Addition:
        n, widths = self.num_virtual_tokens, self._widths.get(site.path)
        if widths is None:
            return ShiftedPositions(n, site.layer)
        if not self.reparametrise:
            return FreePrefix(n, widths)
        first = self._trunk is None
        self._trunk = self._trunk or Trunk(n, widths[0], self.hidden_size or widths[0])
        return ReparametrisedPrefix(self._trunk, widths, owns=first)

    def prepare(self, module: nn.Module, batches: Iterable[Any]) -> None:
        if self.init_text is None:
            return
        own = self.additions(module).values()
        model: Any = find_root(module).model.base_model
        ids = token_ids(module, self.init_text, self.tokenizer, self.num_virtual_tokens)[None].to(model.device)
        given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        modes = [(child, child.training) for child in model.modules()]
        for addition in own:
            addition.reads = True
        try:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, **given)
        finally:
            for addition in own:
                addition.reads = False
            for child, mode in modes:
                child.training = mode

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor | list[Tensor]]]:
        """HF PEFT's form: one row a virtual token, keys and values of layer after layer side by side."""
        own = [(site, addition) for site, addition in sites if isinstance(addition, Prefix)]
        config: Any = own[0][0].layer.config
        if len(own) != config.num_hidden_layers or config.is_encoder_decoder:
            raise ValueError(
                "HF PEFT's prefix goes into every layer of one stack, not into chosen layers or an encoder-decoder; "
                "the trainer's checkpoint keeps this one."
            )
        views = [tensor for _, prefix in own for tensor in prefix.pair()]
        entries = {
            "num_virtual_tokens": len(views[0]),
            "token_dim": views[0].shape[1],
            "num_attention_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "num_layers": len(own),
            "num_transformer_submodules": 1,
        }
        if not self.as_hf_peft and not all(site.layer.is_causal for site, _ in own):
            # HF PEFT would open it and compute something else.
            entries |= {"peft_type": f"LIT_PEFT_{self.hf_peft['peft_type']}", "task_type": None}
        tensors: dict[str, Tensor | list[Tensor]] = {PROMPT: views}
        if self.reparametrise:
            tensors |= {f"{site.path}.prompt_encoder.{k}": p for site, a in own for k, p in a.named_parameters()}
        return entries, tensors

    @classmethod
    def from_hf_peft(cls, options: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same prefix, whose network HF PEFT has dropped; see `lit_peft.saving.folder`."""
        if options["num_transformer_submodules"] == 2:
            raise CheckpointMismatch(
                "HF PEFT's prefix of an encoder-decoder gives several layers of the decoder the same keys and values, "
                "and the encoder none: there is no such method here. Train it anew."
            )
        as_hf_peft = options["task_type"] not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        return {"num_virtual_tokens": options["num_virtual_tokens"], "as_hf_peft": as_hf_peft}
