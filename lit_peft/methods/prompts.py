"""Virtual tokens before the embeddings of a transformer, and out of sight behind it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call
from lit_peft.faults import TrainingFault
from lit_peft.methods.positions import check_room, text_positions


class Prompt(Addition):
    """Virtual tokens, [n, d], before the embeddings of the text, [batch, length, d]."""

    names: tuple[str, ...] = ()
    """Arguments of the transformer's forward, in their order."""
    stays = False
    """Whether the output keeps the virtual positions, for a decoder that attends to them or a head that reads one."""
    room: int | None = None
    """Rows of the table of positions, None where there is none."""
    keeps = False
    """Whether the text keeps its positions."""
    padding: int | None = None
    """RoBERTa's position of padding; it counts from behind it."""
    own_form = False
    """Whether HF PEFT would open it and compute something else."""

    def prompt(self) -> Tensor:
        """The virtual tokens, [n, d]."""
        raise NotImplementedError

    @property
    def first(self) -> int:
        """The position of a text's first token."""
        return 0 if self.padding is None else self.padding + 1

    @property
    def takes(self) -> int:
        """How many positions of the model it takes from a text."""
        return 0 if self.keeps else len(self.prompt())

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

        if mask is None and positions is not None and not self.keeps and bool((positions.diff() <= 0).any()):
            raise TrainingFault(
                "Several texts share a row here (packing), and virtual tokens stand before the first of them alone: do "
                "not pack, or take PrefixTuning, whose prefix all of them see."
            )
        x, ids = given.pop("inputs_embeds", None), given.pop("input_ids", None)
        x = layer.get_input_embeddings()(ids) if x is None else x
        check_room(layer, self.room, n, x.shape[1], shared=self.keeps)
        given["inputs_embeds"] = torch.cat([prompt.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if self.keeps and positions is None:
            positions = text_positions(x, ids, self.padding)
        if positions is not None:
            first = torch.arange(n, device=x.device) + self.first
            moved = positions if self.keeps else positions + n
            given["position_ids"] = torch.cat([first.expand(len(positions), -1), moved], dim=1)
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
