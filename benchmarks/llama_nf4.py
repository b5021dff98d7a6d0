"""Llamas with random weights in NF4, built layer by layer: what benchmarks/qlora.py trains."""

import copy
import time
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from lit_peft.core.quantize import choose_layers, make_quantizer

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocabulary": 128_256},
    "65b": {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 64, "intermediate": 22016, "vocabulary": 32_000},
    "tiny": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "intermediate": 192, "vocabulary": 500},
}


class Built(NamedTuple):
    """A model, and what it took to build it."""

    model: Any
    seconds: float
    peak_gib: float | None
    layers: int
    """How many are in 4 bit."""


def gib(count: float, device: str) -> float | None:
    """Bytes on a GPU in GiB; on a CPU nothing is measured."""
    return count / 2**30 if device == "cuda" else None


def skeleton(shape: str, length: int) -> Any:
    """A Llama in bfloat16 on the meta device, in training mode and frozen."""
    sizes = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=length,
        use_cache=False,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).train().requires_grad_(False)


def build(shape: str, length: int, device: str) -> Built:
    """The skeleton with values, its linear layers in NF4 with double quantisation.

    One decoder layer after another gets its values on the device and is quantised, so that at most one of them is there
    in bfloat16. Embeddings, norms and the head stay in bfloat16.
    """
    start, model = time.perf_counter(), skeleton(shape, length)
    generator = torch.Generator(device).manual_seed(0)
    quantizer = make_quantizer("nf4")
    chosen = [path for path, why in choose_layers(model, quantizer).items() if why is None]
    for i, layer in enumerate(model.model.layers):
        materialise(layer, device, generator)
        for path in chosen:
            if path.startswith(f"model.layers.{i}."):
                quantizer.quantize(model.get_submodule(path), torch.device(device))
    for rest in (model.model.embed_tokens, model.model.norm, model.lm_head):
        materialise(rest, device, generator)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are computed, not drawn
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Built(model, time.perf_counter() - start, gib(peak, device), len(chosen))


def twin(model: Any) -> Any:
    """A model of its own of the same tensors, the constants of their codes included."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [state for layer in model.modules() if (state := getattr(layer, "quant_state", None)) is not None]
    return copy.deepcopy(model, {id(one): one for one in shared})


def with_liger(model: Any) -> None:
    """Puts a model on Liger's kernels as transformers itself does, its loss included."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model)


@torch.no_grad()
def materialise(module: nn.Module, device: str, generator: torch.Generator) -> None:
    """Gives a module that lies on the meta device its values: matrices from N(0, .02^2), as Llama's, norms 1."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0)
