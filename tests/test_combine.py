"""`lit_peft.combine` against HF PEFT's add_weighted_adapter, value by value, and what it refuses.

The oracle's adapters are copied by hand, not through our folders; where it draws random masks it is given ours.
"""

import copy
import math
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import logits, tiny
from torch import nn
from toys import Module, fit, net_lora, trainable

import lit_peft
from lit_peft import AdaLoRA, BitFit, BottleneckAdapter, DoRA, HiRA, IA3, LoRA, SparseLoRA, VeRA, combine, set_active
from lit_peft.core.addition import Call
from lit_peft.core.attach import registry
from lit_peft.core.combination import Factors, draw_keep, drop, nearest_of_rank, trim, truncate
from lit_peft.core.layers import layer_ops
from lit_peft.core.merge import merge, unmerge
from lit_peft.methods import combine as module_of_combine
from lit_peft.testing.conformance import assert_same, snapshot
from lit_peft.testing.subjects import LAYERS, MODELS, holder, layer_input


def perturb(module: nn.Module, seed: int = 1) -> None:
    """Gives every tensor of an adapter, and other trained parameters a little, values of the size training gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.add_((0.5 if ".peft." in name else 0.1) * torch.randn(p.shape, generator=generator).to(p.dtype))


def change(module: nn.Module, path: str, name: str) -> torch.Tensor:
    """What one adapter adds to the weight of a layer, [out, in]: by its equation, not by its factors."""
    layer = module.get_submodule(path)
    out, in_ = layer_ops(layer).size(layer)
    return layer.peft[name].weight(torch.zeros(out, in_)).detach()


def changes(module: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {path: change(module, path, name) for path in registry(module).adapters[name].sites}


# ----------------------------------------------------------------------------------------------- the oracle

# model -> the targets of "a" and of "b" in our language, and in HF PEFT's
TARGETS = {
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["attn.c_attn", "c_fc"]),
    "llama": (["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "down_proj"]),
    "conv_net": (["first", "second"], ["second"]),
}


def pair(name: str, ranks=(4, 4)) -> tuple[nn.Module, peft.PeftModel]:
    """A model with two adapters, one rank-stabilised, and the same in HF PEFT."""
    model = MODELS[name].build()
    reference, mixed = copy.deepcopy(model), False
    for key, targets, r, rslora in zip("ab", TARGETS[name], ranks, (False, True), strict=True):
        LoRA(r=r, alpha=3, dropout=0.0, target_modules=targets, use_rslora=rslora, name=key).attach(model)
        config = peft.LoraConfig(
            r=r, lora_alpha=3, target_modules=targets, use_rslora=rslora, fan_in_fan_out=name == "gpt2"
        )
        if mixed:
            reference.add_adapter(key, config)
        else:
            reference, mixed = peft.get_peft_model(reference, config, adapter_name=key), True
    perturb(model)
    with torch.no_grad():
        for key in "ab":
            for path in registry(model).adapters[key].sites:
                delta = model.get_submodule(path).peft[key]
                for its, mine in zip(factors_of(reference, path, key), (delta.lora_A, delta.lora_B), strict=True):
                    its.copy_(mine.view_as(its))
    return model, reference


def factors_of(reference: peft.PeftModel, path: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = reference.base_model.model.get_submodule(path)
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def their_change(reference: peft.PeftModel, path: str, name: str, like: torch.Tensor) -> torch.Tensor:
    layer = reference.base_model.model.get_submodule(path)
    found = layer.get_delta_weight(name).detach()
    return found if found.shape == like.shape and found.dim() == 2 and not transposes(layer) else arranged(found, layer)


def transposes(layer: nn.Module) -> bool:
    return getattr(layer, "fan_in_fan_out", False) or isinstance(layer.base_layer, nn.Embedding)


def arranged(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return tensor.T if transposes(layer) else tensor.flatten(1)


def give_masks(monkeypatch, model: nn.Module, on: str, seed: int) -> None:
    """Lets HF PEFT drop what we do, in the order in which it asks: layer by layer, of factors first all A."""
    names = registry(model).adapters
    asked = []
    for path, layer in model.named_modules():
        here = [key for key in "ab" if path in names[key].sites]
        asked += [
            (layer, f"{seed}/{key}/{path}{x}") for x in (("/A", "/B") if on == "factors" else ("",)) for key in here
        ]
    queue = iter(asked)

    def random_pruning(tensor, density, rescale):
        layer, stream = next(queue)
        if on == "factors":
            keep = draw_keep(tensor.flatten(1).shape, density, stream).view_as(tensor)
        else:
            kept = draw_keep(layer_ops(layer).size(layer), density, stream)
            keep = (kept.T if kept.T.shape == tensor.shape and stored_transposed(layer) else kept).reshape(tensor.shape)
        return tensor * keep / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", random_pruning)


def stored_transposed(layer: nn.Module) -> bool:
    return layer_ops(layer).fan_in_fan_out or layer_ops(layer).looks_up


# HF PEFT's type, and our arguments
ON_CHANGE = {
    "cat": {},
    "svd": {"r": 3},
    "ties_svd": {"kind": "ties", "density": 0.37},
    "dare_linear_svd": {"kind": "dare", "density": 0.6, "r": 5},
    "dare_ties_svd": {"kind": "dare_ties", "density": 0.7},
}
ON_FACTORS = {
    "linear": {},
    "ties": {"kind": "ties", "density": 0.37},
    "dare_linear": {"kind": "dare", "density": 0.6},
    "dare_ties": {"kind": "dare_ties", "density": 0.7},
}
WEIGHTS = {"positive": (0.7, 1.6), "one negative": (1.3, -0.4)}


def theirs(reference, kind: str, weights, arguments) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.base_model.add_weighted_adapter(
            ["a", "b"],
            list(weights),
            "new",
            combination_type=kind,
            svd_rank=arguments.get("r"),
            density=arguments.get("density"),
            majority_sign_method=arguments.get("majority_sign_method", "total"),
        )


@pytest.mark.parametrize("signs", WEIGHTS)
@pytest.mark.parametrize("kind", ON_CHANGE)
@pytest.mark.parametrize("name", TARGETS)
def test_changes_combine_as_in_hf_peft(name, kind, signs, monkeypatch):
    model, reference = pair(name, (4, 2))
    weights, arguments = dict(zip("ab", WEIGHTS[signs], strict=True)), ON_CHANGE[kind]
    give_masks(monkeypatch, model, "change", 11)
    theirs(reference, kind, weights.values(), arguments)
    combine(model, weights, "new", seed=11, **arguments)
    for path, mine in changes(model, "new").items():
        its = their_change(reference, path, "new", mine)
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert mine.abs().max() > 0.05
    reference.set_adapter("new")
    torch.testing.assert_close(
        MODELS[name].evaluate(model), MODELS[name].evaluate(reference.eval()), rtol=1e-4, atol=1e-5
    )
