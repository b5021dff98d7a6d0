"""`lit_peft.combine` against HF PEFT's add_weighted_adapter, value by value.

The oracle's adapters are copied by hand, not through our folders; where it draws random masks it is given ours.
"""

import copy
import warnings

import peft
import pytest
import torch
from test_combine import changes, perturb
from torch import nn

from lit_peft import LoRA, combine
from lit_peft.core.combination import draw_keep, merge_disjoint, nearest_of_rank, trim, weighted_sum
from lit_peft.core.layers import layer_ops
from lit_peft.core.registry import registry
from lit_peft.testing.subjects import MODELS

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


def their_change(reference: peft.PeftModel, path: str, name: str) -> torch.Tensor:
    layer = reference.base_model.model.get_submodule(path)
    found = layer.get_delta_weight(name).detach()
    return found.T if stored_transposed(layer.base_layer) else found.flatten(1)


def stored_transposed(layer: nn.Module) -> bool:
    return layer_ops(layer).fan_in_fan_out or layer_ops(layer).looks_up


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
            keep = draw_keep(tensor.flatten(1).shape, density, stream)
        else:
            keep = draw_keep(layer_ops(layer).size(layer), density, stream)
            keep = keep.T if stored_transposed(layer) else keep
        return tensor * keep.reshape(tensor.shape) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", random_pruning)


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


def compare(name, kind, weights, on, arguments, ranks, monkeypatch) -> nn.Module:
    """Combines in both, from the same values and masks, and compares changes and outputs."""
    model, reference = pair(name, ranks)
    give_masks(monkeypatch, model, on, 11)
    theirs(reference, kind, weights, arguments)
    combine(model, dict(zip("ab", weights, strict=True)), "new", seed=11, on=on, **arguments)
    for path, mine in changes(model, "new").items():
        torch.testing.assert_close(mine, their_change(reference, path, "new"), rtol=1e-4, atol=1e-5)
        assert mine.abs().max() > 0.05
    reference.set_adapter("new")
    expected = MODELS[name].evaluate(reference.eval())
    torch.testing.assert_close(MODELS[name].evaluate(model), expected, rtol=1e-4, atol=1e-5)
    if on == "factors":
        for path in registry(model).adapters["new"].sites:
            delta = model.get_submodule(path).peft["new"]
            for mine, its in zip((delta.lora_A, delta.lora_B), factors_of(reference, path, "new"), strict=True):
                torch.testing.assert_close(mine, its.flatten(1), rtol=1e-5, atol=1e-6)
    return model


@pytest.mark.parametrize("signs", WEIGHTS)
@pytest.mark.parametrize("kind", ON_CHANGE)
@pytest.mark.parametrize("name", TARGETS)
def test_changes_combine_as_in_hf_peft(name, kind, signs, monkeypatch):
    compare(name, kind, WEIGHTS[signs], "change", ON_CHANGE[kind], (4, 2), monkeypatch)


@pytest.mark.parametrize("signs", WEIGHTS)
@pytest.mark.parametrize("kind", ON_FACTORS)
@pytest.mark.parametrize("name", TARGETS)
def test_factors_combine_as_in_hf_peft(name, kind, signs, monkeypatch):
    compare(name, kind, WEIGHTS[signs], "factors", ON_FACTORS[kind], (4, 4), monkeypatch)


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_ties_svd"])
def test_votes_by_frequency_and_densities_are_hf_pefts(kind, density, monkeypatch):
    arguments = {"kind": "ties" if "dare" not in kind else "dare_ties", "density": density}
    arguments["majority_sign_method"] = "frequency"
    on = "change" if "svd" in kind else "factors"
    model, reference = pair("gpt2")
    give_masks(monkeypatch, model, on, 0)
    theirs(reference, kind, (0.7, 1.6), arguments)
    combine(model, {"a": 0.7, "b": 1.6}, "new", on=on, **arguments)
    for path, mine in changes(model, "new").items():
        torch.testing.assert_close(mine, their_change(reference, path, "new"), rtol=1e-4, atol=1e-5)


FAULTS = {
    "a vote of weighted changes": (
        "merge_disjoint",
        lambda T, w, m: merge_disjoint([a * b for a, b in zip(T, w, strict=True)], [1.0] * len(w), m),
    ),
    "no signs": ("merge_disjoint", lambda T, w, m: weighted_sum(T, w)),
    "one entry more": ("trim", lambda T, d: trim(T, d + 1 / T.numel())),
    "a rank less": ("nearest_of_rank", lambda T, r: nearest_of_rank(T, r - 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(fault, monkeypatch):
    place, wrong = FAULTS[fault]
    monkeypatch.setattr(f"lit_peft.methods.combine.{place}", wrong)
    with pytest.raises(AssertionError, match="not close"):
        compare("gpt2", "ties_svd", (1.3, -0.4), "change", ON_CHANGE["ties_svd"], (4, 2), monkeypatch)
