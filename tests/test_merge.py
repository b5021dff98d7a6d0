"""Folding adapters into the weights and taking them out again; each method's own merge is in the conformance suite."""

import copy

import pytest
import torch
from models import logits, tiny
from torch import nn
from toys import Module, fit, loader, net_lora, trainer

import lit_peft
from lit_peft import DoRA, HiRA, LoRA, merge, unmerge
from lit_peft.core.active import set_active
from lit_peft.core.layers import LinearOps
from lit_peft.core.registry import registry
from lit_peft.testing.conformance import assert_same, perturb, snapshot


def adapted() -> nn.Module:
    """BERT with a LoRA, a HiRA at the same layers, and a DoRA that is off."""
    model = tiny("bert")
    LoRA(r=4, dropout=0.0, target_modules=["query", "value"], train_also=["classifier"]).attach(model)
    HiRA(r=2, target_modules=["query", "ffn_up"], name="second").attach(model)
    DoRA(r=2, target_modules=["key"], name="off").attach(model)
    perturb(model)
    set_active(model, ["default", "second"])
    return model


def test_several_adapters_merge_to_their_sum():
    model = adapted()
    before, expected = snapshot(model), logits(model, "bert")
    merge(model)
    assert list(model.state_dict()) == list(tiny("bert").state_dict())
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    unmerge(model)
    assert_same(snapshot(model), before)
    assert registry(model).active == ("default", "second")
    assert torch.equal(logits(model, "bert"), expected)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == registry(model).trainable_names()


def test_one_of_several_is_merged_by_name():
    model = adapted()
    set_active(model, "second")
    expected = logits(model, "bert")
    set_active(model, ["default"])
    merge(model, "second")
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-4, atol=1e-5)


def test_a_merged_model_copies_trains_and_comes_back():
    model = adapted()
    expected = logits(model, "bert")
    merge(model)
    twin = copy.deepcopy(model)
    logits(twin, "bert").sum().backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    unmerge(twin)
    assert torch.equal(logits(twin, "bert"), expected)


def test_a_bfloat16_weight_is_rounded_once():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).to(torch.bfloat16)
    module = nn.Sequential(layer)
    LoRA(r=4, dropout=0.0, target_modules="0").attach(module)
    perturb(module)
    delta = layer.peft["default"]
    exact = layer.weight.double() + delta.scaling * delta.lora_B.double() @ delta.lora_A.double()
    merge(module)
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))


ADAPTS = {
    "attach": lambda module, folder: net_lora(name="two").attach(module),
    "attach outside": lambda module, folder: LoRA(r=2, target_modules="0.net.first").attach(nn.Sequential(module)),
    "fit": lambda module, folder: fit(module, net_lora()),
    "test": lambda module, folder: trainer(net_lora()).test(module, verbose=False),
    "save": lambda module, folder: lit_peft.save(module, folder / "new"),
    "load": lambda module, folder: lit_peft.load(module, folder / "adapter", "two"),
    "load a checkpoint": lambda module, folder: lit_peft.load(module, folder / "run.ckpt", "two"),
    "set_active": lambda module, folder: set_active(module, None),
    "detach": lambda module, folder: lit_peft.detach(module),
    "merge": lambda module, folder: merge(module),
}


@pytest.mark.parametrize("adapts", ADAPTS)
def test_while_merged_adapters_are_out_of_reach(adapts, tmp_path):
    module, x = Module(), torch.randn(3, 4)
    fit(module, net_lora()).save_checkpoint(tmp_path / "run.ckpt")
    lit_peft.save(module, tmp_path / "adapter")
    module.eval()
    before, expected = snapshot(module), module(x)
    merge(module)
    with pytest.raises(
        ValueError, match=r"is merged: .*lit_peft\.unmerge\(module\); to score it as it is, give the trainer no method"
    ):
        ADAPTS[adapts](module, tmp_path)
    trainer().test(module, loader(), verbose=False)  # without the method it is a module like any other
    unmerge(module.eval())
    assert_same(snapshot(module), before)
    assert torch.equal(module(x), expected)


def test_an_adapter_attached_inside_since_the_merge_is_not_lost():
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    LoRA(r=2, target_modules="0.0").attach(module)
    merge(module)
    LoRA(r=2, target_modules="0").attach(module[0])
    with pytest.raises(ValueError, match=r"0\.0 has an adapter of its own, attached since the merge; detach"):
        unmerge(module)
    lit_peft.detach(module[0])
    unmerge(module)
    assert set(registry(module).adapters) == {"default"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize(("target", "other"), [("embedding", "head"), ("head", "embedding")])
def test_a_tied_weight_is_refused(target, other):
    module = Tied()
    LoRA(r=2, target_modules=target).attach(module)
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"{target} cannot be merged: its weight is also that of {other}"):
        merge(module)
    assert_same(snapshot(module), before)


def test_what_cannot_be_done_is_told():
    with pytest.raises(ValueError, match="Linear has no adapter to merge"):
        merge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no merged adapter to take out"):
        unmerge(nn.Linear(2, 2))
    model = adapted()
    with pytest.raises(KeyError, match="No adapter is named 'third'"):
        merge(model, "third")


def test_a_merge_that_breaks_off_leaves_everything_as_it_was(monkeypatch):
    model = adapted()
    before, expected = snapshot(model), logits(model, "bert")
    plain, calls = LinearOps.store, []

    def full(self, layer, W, b):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        plain(self, layer, W, b)

    monkeypatch.setattr(LinearOps, "store", full)
    with pytest.raises(MemoryError):
        merge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "bert"), expected)
