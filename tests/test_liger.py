"""Liger's kernels by one key, with a package in the place of Liger that computes the same in plain torch."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from liger_stand_in import GPU, install
from models import TINY, tiny
from torch import nn
from transformers.models.llama import modeling_llama

from lit_peft.callbacks import RunReport
from lit_peft.cli import main
from lit_peft.core.active import Adapted
from lit_peft.core.attach import detach
from lit_peft.core.remake import NotesInput
from lit_peft.core.swap import BorrowsForward, restore_class
from lit_peft.data import TextClassificationDataModule
from lit_peft.methods import BottleneckAdapter, LoRA
from lit_peft.tasks import TextClassification
from lit_peft.training import liger
from lit_peft.training.checkpointing import checkpoint_activations
from lit_peft.training.liger import LigerModel, use_liger

KERNELS = """
import torch
import torch.nn.functional as F

calls = []

class LigerRMSNorm:
    def forward(self, x):
        calls.append("norm")
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)

class LigerSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        calls.append("mlp")
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return dc * b * s * (1 + a * (1 - s)), dc * a * s

class LigerSwiGLUMLP:
    def forward(self, x):
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))

def rope(q, k, cos, sin, *args):
    calls.append("rope")
    return q, k

def lce_forward(self, input_ids, labels=None, **kwargs):
    calls.append("loss")
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    logits = hidden @ self.lm_head.weight.t()  # past whatever stands around the head
    return type("Output", (), {"loss": self.loss_function(logits, labels, vocab_size=self.config.vocab_size)})
"""


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What of the stand-in was called."""
    return install(monkeypatch, KERNELS).calls


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the loss, and the loss."""
    ids = TINY["llama"].inputs()["input_ids"]
    model.zero_grad()
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def adapt(model: nn.Module, method=None) -> nn.Module:
    torch.manual_seed(0)
    (method or LoRA(r=2, dropout=0.0, target_modules="all-linear")).attach(model)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "lora_B" in key:
                p.normal_(std=0.1)
    return model


def applied(order: str, method=None) -> nn.Module:
    model = tiny("llama")
    if order == "before":
        use_liger(model, GPU)
    adapt(model, method)
    if order == "after":
        use_liger(model, GPU)
    return model


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", [lambda: None, lambda: BottleneckAdapter(reduction_factor=4)], ids=["LoRA", "MLPs"])
def test_adapters_stand_around_it_whichever_comes_first(order, method, calls):
    expected = step(adapt(tiny("llama"), method()))
    assert not calls
    model = applied(order, method())
    assert_close(step(model), expected)
    assert {name: calls.count(name) for name in sorted({*calls})} == {"loss": 1, "mlp": 2, "norm": 4}
    assert not any("forward" in module.__dict__ for module in model.modules())
    block = model.model.layers[0]
    assert isinstance(block.mlp, BorrowsForward) and isinstance(model, LigerModel)
    assert type(block.mlp).__name__ == "LlamaMLP" and isinstance(block.mlp.gate_proj, Adapted) is (method() is None)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_head_with_an_adapter_makes_the_logits_itself(order, calls):
    def method():
        return LoRA(r=2, dropout=0.0, target_modules=["lm_head", "q_proj"])

    assert_close(step(applied(order, method())), step(adapt(tiny("llama"), method())))
    assert "loss" not in calls and "norm" in calls


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_are_copied_pickled_and_given_kernels_twice(make, calls):
    model = applied("after")
    expected = step(model)
    other = make(model)
    use_liger(other, GPU)
    assert type(other) is type(model)
    assert_close(step(other), expected)
    assert calls.count("mlp") == 4


def test_detaching_leaves_the_kernels(calls):
    model, plain = applied("before"), tiny("llama")
    use_liger(plain, GPU)
    detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def kept_by(model: nn.Module) -> int:
    """Bytes that the nodes of a forward pass keep."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ids = TINY["llama"].inputs()["input_ids"]
        model(input_ids=ids, labels=ids)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_its_gated_products_return_is_made_again(order, calls, monkeypatch):
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 1)
    model = applied(order)
    norms = [path for path, layer in model.named_modules() if isinstance(layer, NotesInput)]
    assert len(norms) == 4 and norms[0] == "model.layers.0.input_layernorm"
    expected = step(model)
    assert (calls.count("norm"), calls.count("mlp")) == (4, 2 + 2)
    kept = kept_by(model)
    for path in norms:
        restore_class(model.get_submodule(path), NotesInput)
    monkeypatch.setattr(liger, "remakable", lambda y, *_: y)
    found = step(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    tokens, config = TINY["llama"].inputs()["input_ids"].numel(), model.config
    assert kept_by(model) - kept == 4 * tokens * 2 * config.intermediate_size


def test_in_checkpointed_blocks_what_norms_return_is_too(calls, monkeypatch):
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 1)
    model = applied("before")
    expected = step(model)
    calls.clear()
    checkpoint_activations(model)
    found = step(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert calls.count("norm") == 4 + 4 + 3  # the first one's input needs no gradient, and is not kept
    assert calls.count("mlp") == 2 + 2 + 2


def test_other_models_are_as_they_were(calls):
    plain = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", "LlamaMLP")}
    rope = modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        use_liger(tiny("llama"), GPU)
    assert {name: getattr(modeling_llama, name) for name in plain} == plain
    chosen = modeling_llama.apply_rotary_pos_emb
    assert chosen.__wrapped__ is rope  # wrapped once
    q, cos = torch.rand(1, 2, 3, 4), torch.rand(1, 3, 4)
    assert torch.equal(chosen(q, q, cos, cos)[0], rope(q, q, cos, cos)[0]) and not calls
    q = q.to("meta")
    assert chosen(q, q, cos, cos)[0] is q and calls == ["rope"]


def test_a_model_of_a_class_of_ones_own_leaves_transformers_as_it_was(calls):
    class Mine(modeling_llama.LlamaForCausalLM):
        pass

    before = {name: vars(modeling_llama)[name] for name in ("LlamaRMSNorm", "LlamaMLP")}
    model = Mine(tiny("llama").config)
    use_liger(model, GPU)
    assert {name: vars(modeling_llama)[name] for name in before} == before
    assert isinstance(model, LigerModel)


def test_a_classifier_has_no_loss_to_fuse(calls):
    config = copy.deepcopy(tiny("llama").config)
    config.pad_token_id = 0
    model = modeling_llama.LlamaForSequenceClassification(config)
    use_liger(model, GPU)
    assert not isinstance(model, LigerModel)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([1])).loss.backward()
    assert "mlp" in calls and "loss" not in calls


# ----------------------------------------------------------------------------------------------- what is refused


def test_an_architecture_that_liger_does_not_know_is_refused_with_those_that_it_knows(calls):
    with pytest.raises(ValueError, match=r"^kernels: Liger has none for bert; it knows llama, olmo2\. Leave"):
        use_liger(tiny("bert"), GPU)
    with pytest.raises(ValueError, match="none for Linear"):
        use_liger(nn.Linear(2, 2), GPU)


def test_a_cpu_is_refused(calls, monkeypatch):
    with pytest.raises(ValueError, match="needs a GPU, and this model runs on a CPU"):
        use_liger(tiny("llama"), torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(ValueError, match="needs a GPU"):
        use_liger(tiny("llama"))


def test_a_fit_on_a_cpu_is_refused_before_anything_is_scored(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunReport, "measure_base", lambda *_: pytest.fail("the test set was scored first"))
    words = ["fit", "--config", "quickstart", "--model.kernels", "liger", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr("sys.argv", ["lit-peft", *words])
    with pytest.raises(SystemExit):
        main(words)
    assert "kernels: liger needs a GPU" in capsys.readouterr().err


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a package that is not there: pip install 'lit-peft\[liger\]'"):
        use_liger(tiny("llama"), GPU)


def test_the_task_applies_them_where_it_trains(monkeypatch):
    given = []
    monkeypatch.setattr("lit_peft.tasks.base.use_liger", lambda model, device: given.append(device.type))
    task = TextClassification(kernels="liger")
    data = TextClassificationDataModule(path="demo", limit_train=16, limit_val=16, limit_test=16, batch_size=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    pl.Trainer(**quiet).test(task, data)
    assert given == []
    pl.Trainer(**quiet, max_steps=1, callbacks=[LoRA(r=2)]).fit(task, data)
    assert given == ["cpu"]
    with pytest.raises(ValueError, match=r"^model\.kernels must be liger or null, not 'apex'"):
        TextClassification(kernels="apex")
