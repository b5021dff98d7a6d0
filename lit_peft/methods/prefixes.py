"""What prefix tuning adds to a model: the prefixes, a network that makes them, a decoder's positions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lit_peft.core.addition import Addition, Call
from lit_peft.core.sharded import in_shards
from lit_peft.core.targets import Site
from lit_peft.methods.p_tuning import init_linear
from lit_peft.methods.positions import argument_names, check_room, position_room, position_table, text_positions
from lit_peft.methods.prefix_attention import Prefix


class FreePrefix(Prefix):
    """`key`: [n, width of keys], `value`: [n, width of values]."""

    def __init__(self, n: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.key, self.value = (nn.Parameter(torch.empty(n, width)) for width in widths)

    def init(self, site: Site, generator: torch.Generator) -> None:
        nn.init.normal_(self.key, generator=generator)
        nn.init.normal_(self.value, generator=generator)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    def read(self, key: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            self.key.copy_(key[0].transpose(0, 1).flatten(1))
            self.value.copy_(value[0].transpose(0, 1).flatten(1))


class ReparametrisedPrefix(Prefix):
    """A prefix made by a network: a trunk, which all layers share, and here one linear layer of its output."""

    def __init__(self, trunk: "Trunk", widths: tuple[int, int], *, owns: bool) -> None:
        super().__init__()
        self.output = skip_init(nn.Linear, trunk.hidden.out_features, sum(widths))
        self.widths = widths
        if owns:  # the first site's; the others refer to it, so that the state holds it once
            self.trunk = trunk
        self._shared = (trunk,)

    def init(self, site: Site, generator: torch.Generator) -> None:
        init_linear(self.output, generator)
        if "trunk" in self._modules:
            nn.init.normal_(self.trunk.embedding, generator=generator)
            init_linear(self.trunk.hidden, generator)

    def pair(self) -> tuple[Tensor, Tensor]:
        h = self._shared[0]().to(self.output.weight.dtype)  # FSDP2 may compute in another one where it gathers
        key, value = self.output(h).split(self.widths, dim=-1)
        return key, value


class Trunk(nn.Module):
    """`tanh(W E + b)`, `embedding`: [n, d], `hidden`: d -> h."""

    def __init__(self, n: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(n, width))
        self.hidden = skip_init(nn.Linear, width, hidden)

    def forward(self) -> Tensor:
        embedding, weight, bias = map(_gathered, (self.embedding, self.hidden.weight, self.hidden.bias))
        return torch.tanh(F.linear(embedding, weight, bias))


def _gathered(p: Any) -> Tensor:
    """The parameter, whole: FSDP2 gathers it for the block that owns the trunk, and not for those that share it."""
    if not in_shards(p):
        return p
    from torch.distributed.tensor import Partial

    # As FSDP2 reduces a gradient: the mean over the ranks, each of which has its own.
    return p.full_tensor(grad_placements=[Partial("avg")] * p.device_mesh.ndim)


class ShiftedPositions(Addition):
    """Lets the positions of a text start at n: those before belong to the prefix."""

    reads = False

    def __init__(self, n: int, stack: nn.Module) -> None:
        super().__init__()
        self.n, self.names, self.room = n, argument_names(stack), position_room(stack)
        self.padding = getattr(position_table(stack), "padding_idx", None)

    @property
    def takes(self) -> int:
        """How many positions of the model it takes from a text."""
        return self.n

    def forward(self, layer: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if self.reads:
            return call(**given)
        text = given.get("input_ids")
        text = given["inputs_embeds"] if text is None else text
        check_room(layer, self.room, self.n, text.shape[1])
        positions, past = given.get("position_ids"), given.get("past_key_values")
        if positions is None:
            start = 0 if past is None else past.get_seq_length()
            positions = text_positions(text, given.get("input_ids"), self.padding) + start
        given["position_ids"] = positions + self.n
        return call(**given)


def key_value_widths(attention: Any, key: Site) -> tuple[int, int]:
    """Widths of all keys and all values of a token, fewer than of the queries where heads share them."""
    if len(key.roles) == 1:
        return key.out_features, key.out_features
    heads = getattr(attention.config, "num_key_value_heads", None) or attention.config.num_attention_heads
    return heads * attention.head_dim, heads * attention.head_dim


def stack_around(module: nn.Module, path: str) -> str | None:
    """Path of the stack around an attention that takes positions together with a text, None where none does."""
    while path:
        path = path.rpartition(".")[0]
        if {"position_ids", "input_ids"} <= set(argument_names(module.get_submodule(path))):
            return path
    return None
