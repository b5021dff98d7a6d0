"""DoRA, HiRA and LoRA+ against HF PEFT: outputs, one training step, and what they keep in memory."""

import peft
import pytest
import torch
from models import logits, tiny
from torch import nn

import lit_peft
from lit_peft import DoRA, HiRA, LoRA
from lit_peft.core.kernels import row_norms
from lit_peft.core.layers import layer_ops
from lit_peft.core.registry import registry
from lit_peft.testing.conformance import perturb
from lit_peft.testing.subjects import IN, OUT, holder, layer_input

TARGETS = {
    "distilbert": ["q_lin", "lin1"],
    "bert": ["query", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "up_proj"],
}
METHODS = {
    "DoRA": (
        lambda targets: DoRA(r=4, alpha=8, dropout=0.0, target_modules=targets),
        lambda targets: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets),
    ),
    "HiRA": (
        lambda targets: HiRA(r=4, target_modules=targets),
        lambda targets: peft.HiraConfig(r=4, target_modules=targets),
    ),
}
NAMES = {
    **{"hira_A": "hira_A.default", "hira_B": "hira_B.default"},
    **{f"lora_{x}": f"lora_{x}.default.weight" for x in ("A", "B", "magnitude_vector")},
}


def pair(method: str, name: str) -> tuple[nn.Module, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """Our model and HF PEFT's with the same values in the adapters, none of them zero; and their tensors in pairs."""
    ours, theirs = tiny(name), tiny(name)
    make, config = METHODS[method]
    make(TARGETS[name]).attach(ours)
    perturb(ours)
    theirs = peft.get_peft_model(theirs, config(TARGETS[name]), autocast_adapter_dtype=False)
    state, tensors = dict(theirs.named_parameters()), []
    for path in registry(ours).adapters["default"].sites:
        for key, value in ours.get_submodule(path).peft["default"].named_parameters():
            tensors.append((value, state[f"base_model.model.{path}.{NAMES[key]}"]))
    with torch.no_grad():
        for mine, other in tensors:
            other.copy_(mine)
    return ours, theirs.eval(), tensors


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_one_step_equal_hf_peft(method, name):
    ours, theirs, tensors = pair(method, name)
    before = logits(ours, name)
    torch.testing.assert_close(before, logits(theirs, name), rtol=1e-4, atol=1e-6)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        logits(model, name).square().mean().backward()
        optimizer.step()
    for mine, other in tensors:
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * largest)
        clear = other.grad.abs() > 1e-2 * largest  # where it is almost zero, Adam's step may have either sign
        assert largest > 0
        torch.testing.assert_close(mine[clear], other[clear], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "grouped_conv2d", "nf4"])
def test_the_closed_norm_is_the_norm(kind):
    module = holder(kind)
    DoRA(r=4, target_modules="layer").attach(module)
    perturb(module)
    delta = module.layer.peft["default"]
    W = layer_ops(module.layer).matrix(module.layer)
    direct = torch.linalg.vector_norm(W + delta.scaling * delta.lora_B @ delta.lora_A, dim=1)
    closed = row_norms(W, delta.lora_A, delta.lora_B, delta.scaling)
    torch.testing.assert_close(closed, direct, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_stays_one():
    module = holder("linear")
    module.layer.weight.data[3] = 0
    base = module(layer_input("linear"))
    DoRA(r=4, dropout=0.0, target_modules="layer").attach(module)
    x = layer_input("linear")
    torch.testing.assert_close(module(x), base)
    module(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "product"), [(HiRA(r=4), 0), (DoRA(r=4, dropout=0.0), 0), (LoRA(r=4, dropout=0.0), 0)]
)
def test_no_product_of_the_weights_size_is_kept_for_backward(method, product):
    module = holder("linear")
    type(method)(**method.arguments() | {"target_modules": "layer"}).attach(module)
    weight, kept = module.layer.weight, []

    def keep(tensor):
        if tensor.numel() == OUT * IN and tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(2, 5, IN, requires_grad=True))
    assert not kept


def test_the_rank_of_the_change():
    """HiRA's goes above r, up to that of the weight; LoRA's is at most r."""
    changes = {}
    for method in (HiRA(r=2, target_modules="layer"), LoRA(r=2, target_modules="layer")):
        module = holder("linear")
        method.attach(module)
        perturb(module)
        W = module.layer.weight.detach()
        changes[type(method)] = torch.linalg.matrix_rank(module.layer.peft["default"].weight(W) - W).item()
    assert changes[LoRA] == 2
    assert changes[HiRA] > 16


def test_hira_without_the_one_would_start_from_nothing():
    module = holder("linear")
    HiRA(r=4, target_modules="layer").attach(module)
    delta = module.layer.peft["default"]
    assert not (delta.hira_B @ delta.hira_A).any()
    assert torch.equal(delta.weight(module.layer.weight), module.layer.weight)


@pytest.mark.parametrize("grad", [True, False])
def test_hira_drops_only_the_change(grad):
    module = holder("linear")
    HiRA(r=4, dropout=0.5, target_modules="layer").attach(module)
    perturb(module)
    x, delta, W = layer_input("linear"), module.layer.peft["default"], module.layer.weight
    torch.manual_seed(7)
    found = module.train()(x)
    torch.manual_seed(7)
    expected = nn.functional.linear(x, W, module.layer.bias)
    expected = expected + nn.functional.linear(nn.functional.dropout(x, 0.5), delta.weight(W) - W)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [HiRA, DoRA, LoRA])
def test_a_rank_above_the_width_is_refused(method):
    with pytest.raises(ValueError, match="r = 33 exceeds the smaller side of layer, 32 x 64"):
        method(r=33, target_modules="layer").attach(holder("linear"))


# -------------------------------------------------------------------------------------------------- LoRA+


def test_lora_plus_gives_hf_pefts_groups():
    from peft.optimizers import create_loraplus_optimizer

    ours = tiny("bert")
    LoRA(r=4, target_modules=["query", "value"], loraplus_ratio=16.0).attach(ours)
    theirs = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=4, target_modules=["query", "value"]))
    oracle = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {
        name: group["lr"]
        for group in oracle.param_groups
        for p in group["params"]
        for name, q in theirs.named_parameters()
        if q is p
    }
    expected = {("A" if "lora_A" in name else "B"): rate for name, rate in rates.items()}
    groups = lit_peft.param_groups(ours, 1e-3)
    names = {id(p): name for name, p in ours.named_parameters()}
    found = {names[id(p)][-1]: group["lr"] for group in groups for p in group["params"]}
    assert found == pytest.approx(expected)
    assert sum(len(group["params"]) for group in groups) == 8


def test_lora_plus_takes_doras_lengths_to_the_fast_group():
    model = tiny("bert")
    DoRA(r=4, target_modules=["query"], loraplus_ratio=4.0).attach(model)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in group["params"]}, group["lr"]) for group in lit_peft.param_groups(model, 1.0)]
    assert found == [({"lora_A"}, 1.0), ({"lora_B", "lora_magnitude_vector"}, 4.0)]


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match="loraplus_ratio must be a number above 0, not"):
        LoRA(loraplus_ratio=ratio)
