"""The rows of benchmarks/qlora.py: what puts adapters of either library on one base and takes them off again."""

import argparse
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import bitsandbytes
import peft
import torch
from llama import TARGETS, theirs
from llama_nf4 import SHAPES, skeleton, twin, with_liger
from torch import Tensor, nn

from lit_peft.core.quantized import Frozen4bit
from lit_peft.core.swap import restore_class
from lit_peft.methods import LoRA
from lit_peft.training.checkpointing import checkpoint_activations
from lit_peft.training.liger import use_liger


class Row(NamedTuple):
    """How a row trains."""

    library: str
    dtype: str | None
    """That of the adapters; None: there are none."""
    autocast: bool
    memory: str = ""
    """"checkpointing", "offload" or nothing of the kind."""


KINDS = {
    "floor": Row("floor", None, False),
    "hf-float32": Row("hf", "float32", False),
    "hf-float32-autocast": Row("hf", "float32", True),
    "hf-bfloat16": Row("hf", "bfloat16", False),
    "ours-float32": Row("ours", "float32", False),
    "ours-float32-autocast": Row("ours", "float32", True),
    "ours-bfloat16": Row("ours", "bfloat16", False),
}
ROWS = {
    name + (memory and f"+{memory}"): row._replace(memory=memory)
    for memory in ("", "checkpointing", "offload")
    for name, row in KINDS.items()
    if memory != "offload" or row.library == "ours"
}
THEIRS = "hf-float32-autocast"


def lora(row: Row, args: argparse.Namespace, **more: Any) -> LoRA:
    return LoRA(args.r, args.alpha, 0.0, target_modules=TARGETS, adapter_dtype=row.dtype, **more)


def by_library(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The base of each library's rows, of the same tensors.

    Liger is in it as a user of that library has it, and HF PEFT's is on the layers of bitsandbytes as they come.
    """
    models = {"ours": twin(model), "hf": model, "floor": model}
    for layer in model.modules():
        if isinstance(layer, Frozen4bit):
            restore_class(layer, Frozen4bit)
    model.is_loaded_in_4bit = True  # by which HF PEFT chooses its 4-bit layers; transformers' loader sets it
    if args.liger:
        use_liger(models["ours"])
        with_liger(model)
    return models


@contextmanager
def adapted(models: dict[str, Any], row: Row, args: argparse.Namespace) -> Iterator[nn.Module]:
    """A row's base with its adapters; afterwards it is what it was."""
    model = models[row.library]
    if row.library == "ours":
        method = lora(row, args)
        method.attach(model)
        yield model
        method.detach(model)
    elif row.library == "floor":
        handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, y: y.requires_grad_())
        yield model
        handle.remove()
    else:
        config = peft.LoraConfig(r=args.r, lora_alpha=args.alpha, target_modules=TARGETS)
        outer: Any = theirs(config, None if row.dtype == "float32" else torch.bfloat16)(model)
        yield outer
        outer.unload()


def checkpoint(model: Any, row: Row) -> None:
    """Switches on the gradient checkpointing of a row."""
    if row.memory == "offload":
        checkpoint_activations(model, offload=True)
    elif row.memory:
        model.gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def checkpointed(model: Any, row: Row) -> Iterator[None]:
    """The model with the gradient checkpointing of a row."""
    checkpoint(model, row)
    try:
        yield
    finally:
        if row.memory:
            model.gradient_checkpointing_disable()


def autocast(row: Row, args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(args.device, torch.bfloat16) if row.autocast else nullcontext()


def optimizer_of(trainable: list[nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.paged:
        return bitsandbytes.optim.PagedAdamW32bit(trainable, lr=args.rate)
    return torch.optim.AdamW(trainable, lr=args.rate, fused=True)


def tokens(args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, args.length)
    return torch.randint(0, SHAPES[args.shape]["vocabulary"], shape, generator=generator).to(args.device)


def planned(row: Row, args: argparse.Namespace) -> Any:
    """What `lit_peft.planning` says of a row of ours, which takes neither weights nor a GPU."""
    from lit_peft.planning import plan

    ids, model = tokens(args), skeleton(args.shape, args.length)
    if args.liger:
        use_liger(model, torch.device("cuda"))
    return plan(
        model,
        lora(row, args, quantize="nf4"),
        {"input_ids": ids, "labels": ids},
        optimizer=lambda trainable: optimizer_of(trainable, args),
        precision="bf16-mixed" if row.autocast else "32-true",
        keeps_gradients=False,
        prepare=lambda model: checkpoint(model, row),
    )


def agreement(models: dict[str, Any], args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """What is compared -> difference of the losses, and of all gradients, |a - b| / |b|, with equal adapters.

    The last one is HF PEFT beside itself, its adapters computing in float32 and in bfloat16: how far rounding carries.

    Raises:
        RuntimeError: When ours is three times as far from HF PEFT as that.
    """
    losses, gradients = dict[str, float](), dict[str, dict[str, Tensor]]()
    pairs = (("ours-float32", THEIRS), ("ours-bfloat16", "hf-bfloat16"), ("hf-float32", "hf-bfloat16"))
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        row = ROWS[name]
        with adapted(models, row, args) as outer:
            factors = {_common(key): p for key, p in outer.named_parameters() if p.requires_grad}
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for key in sorted(factors):
                    values = 0.02 * torch.randn(factors[key].shape, generator=generator)
                    factors[key].copy_(values.to(torch.bfloat16))
            ids = tokens(args)[:1]
            with autocast(row, args):
                loss = outer(input_ids=ids, labels=ids).loss
            loss.backward()
            losses[name] = loss.item()
            gradients[name] = {key: p.grad.float() for key, p in factors.items() if p.grad is not None}
    found = {}
    for a, b in pairs:
        ours, their = gradients[a], gradients[b]
        if ours.keys() != their.keys():
            raise RuntimeError(f"{a} and {b} train other tensors: {sorted(ours.keys() ^ their.keys())[:4]}.")
        apart = _norm(ours[key] - their[key] for key in their) / _norm(their.values())
        found[f"{a} and {b}"] = abs(losses[a] - losses[b]), apart
    *own, (_, noise) = found.values()
    if any(apart > 3 * noise for _, apart in own):
        raise RuntimeError(f"The gradients are not HF PEFT's: {found}.")
    return found


def _common(name: str) -> str:
    """A factor's name in both libraries."""
    name = name.removeprefix("base_model.model.").replace(".peft.default", "")
    return re.sub(r"\.default\.weight$", "", name)


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.square().sum() for t in tensors)) ** 0.5
