"""What prompt methods share: virtual tokens before the embeddings of a transformer, and out of sight behind it."""

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft import hub
from lit_peft.core.addition import Addition, Call
from lit_peft.core.layers import layer_ops
from lit_peft.core.swap import Swapped
from lit_peft.core.targets import Site, make_site
from lit_peft.methods.base import Method, check_range
from lit_peft.methods.hf_peft import PROMPT, find_root

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")


class PromptMethod(Method):
    """A method that puts virtual tokens before the input embeddings. `vectors(width)` allocates them.

    They go around the transformer below the head: of a causal model or an encoder its `base_model`, of an
    encoder-decoder the encoder. What that returns has the length of the text again, so that heads, labels and
    losses see nothing of the virtual tokens: position 0 is still [CLS], and a pooler reads it there. Only a
    decoder's cross-attention sees them, as its encoder's output.
    """

    hf_options: ClassVar[dict[str, Any]] = {
        "num_virtual_tokens": None,
        **dict.fromkeys(("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")),
    }

    def __init__(self, num_virtual_tokens: int = 20, **common: Any) -> None:
        super().__init__(**common)
        check_range("num_virtual_tokens", num_virtual_tokens, 1)
        self.num_virtual_tokens = num_virtual_tokens

    def vectors(self, width: int) -> "Prompt":
        """Allocates the virtual tokens, [n, width]."""
        raise NotImplementedError(f"{type(self).__name__} must define vectors(width).")

    def sites(self, module: nn.Module, avoid: Iterable[str]) -> list[Site]:
        model: Any = find_root(module).model
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            stacks = [model.get_encoder(), model.get_decoder()]
        else:
            stacks = [getattr(model, "base_model", model)]
        if "inputs_embeds" not in argument_names(stacks[0]):
            raise ValueError(
                f"{type(self).__name__} puts virtual tokens before the embeddings of a text, and "
                f"{type(model).__name__} takes none (a transformers model takes them as inputs_embeds): use LoRA."
            )
        paths = {id(child): path for path, child in module.named_modules()}
        return [make_site(paths[id(stack)], stack) for stack in stacks]

    def plan(self, sites: list[Site]) -> None:
        self._decoder = sites[1].path if len(sites) > 1 else None

    def build(self, site: Site) -> Addition:
        stack: Any = site.layer
        if site.path == self._decoder:
            return CrossAttended(argument_names(stack))
        embedding = stack.get_input_embeddings()
        prompt = self.vectors(layer_ops(embedding).size(embedding)[0])
        prompt.names, prompt.stays = argument_names(stack), self._decoder is not None
        tables = [m for path, m in stack.named_modules() if path.rpartition(".")[2] in _POSITIONS]
        if tables:
            padding = getattr(tables[0], "padding_idx", None)  # RoBERTa counts from behind it
            prompt.room = layer_ops(tables[0]).size(tables[0])[1] - (0 if padding is None else padding + 1)
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
        own = {f"{site.path}.prompt_encoder.{name}".lstrip("."): p for name, p in prompt.named_parameters()}
        return entries, {PROMPT: vectors} | ({} if any(p is vectors for p in own.values()) else own)

    @classmethod
    def from_hf_peft(cls, options: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same prompt; see `lit_peft.methods.folder`."""
        return {"num_virtual_tokens": options["num_virtual_tokens"]}


class Prompt(Addition):
    """Virtual tokens, [n, d], before the embeddings of the text, [batch, length, d]."""

    names: tuple[str, ...] = ()
    """Arguments of the transformer's forward, in their order."""
    stays = False
    """Whether the output keeps the virtual positions, for a decoder that attends to them."""
    room: int | None = None
    """Rows of the table of positions, None where there is none."""

    def prompt(self) -> Tensor:
        """The virtual tokens, [n, d]."""
        raise NotImplementedError

    def forward(self, layer: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        prompt, past = self.prompt(), given.get("past_key_values")
        n = len(prompt)
        mask, positions, types = (given.get(k) for k in ("attention_mask", "position_ids", "token_type_ids"))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "attention_mask must be [batch, length] before virtual tokens; a static cache has none."
                )
            given["attention_mask"] = F.pad(mask, (n, 0), value=1)
        if past is not None and past.get_seq_length() > 0:  # later steps of a generation: the prompt is in the cache
            if positions is not None:
                given["position_ids"] = positions + n
            return call(**given)

        x, ids = given.pop("inputs_embeds", None), given.pop("input_ids", None)
        x = layer.get_input_embeddings()(ids) if x is None else x
        if self.room is not None and n + x.shape[1] > self.room:
            raise ValueError(
                f"{n} virtual tokens and {x.shape[1]} of the text exceed the {self.room} positions of "
                f"{type(layer).__name__}: cut texts off at {self.room - n} tokens (max_length)."
            )
        given["inputs_embeds"] = torch.cat([prompt.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if positions is not None:
            first = torch.arange(n, device=positions.device).expand(len(positions), -1)
            given["position_ids"] = torch.cat([first, positions + n], dim=1)
        if types is not None:
            given["token_type_ids"] = F.pad(types, (n, 0))
        as_dict = given.pop("return_dict", None)
        output = call(**given, return_dict=True)
        if not self.stays:
            output = _without_virtual(layer, output, n)
        return output if (layer.config.return_dict if as_dict is None else as_dict) else output.to_tuple()


class CrossAttended(Addition):
    """Lets a decoder attend to the virtual positions of its encoder's output, which the mask does not know of."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def forward(self, layer: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and states is not None:
            given["encoder_attention_mask"] = F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
        return call(**given)


def _without_virtual(layer: Any, output: Any, n: int) -> Any:
    """The output for the text alone."""
    output.last_hidden_state = output.last_hidden_state[:, n:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(h[:, n:] for h in output.hidden_states)
    if output.get("pooler_output") is not None:
        output.pooler_output = layer.pooler(output.last_hidden_state)
    return output


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in their order."""
    own = next(c for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, Swapped))
    return tuple(inspect.signature(own.forward).parameters)[1:]


def token_ids(module: nn.Module, text: str, tokenizer: str | None, n: int) -> Tensor:
    """The first n token ids of a text, [n], which is repeated where it is shorter.

    Args:
        module: What the method is attached to; a task's `backbone` or the model's own folder has the tokenizer.
        text: The text; special tokens are left out.
        tokenizer: Hub id or folder, in the place of the model's.
        n: How many.

    Raises:
        ValueError: When no tokenizer is known or the text has no token.
    """
    model: Any = find_root(module).model
    name = tokenizer or getattr(module, "backbone", None) or getattr(model.config, "_name_or_path", None)
    if not name:
        raise ValueError("tokenizer: the model does not say where its tokenizer is; give a folder or a hub id.")
    from transformers import AutoTokenizer

    source = hub.locate(name)
    with hub.explained(name):
        loaded = AutoTokenizer.from_pretrained(source)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The text {text!r} has no token for the tokenizer of {name}.")
    return torch.tensor((ids * (n // len(ids) + 1))[:n])
