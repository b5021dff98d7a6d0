"""Models with their adapters folded in, as folders of plain transformers: without a command line."""

import json

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from models import logits, tiny
from safetensors.torch import load_file
from torch import nn
from toys import Module, net_lora

from lit_peft import (
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    FullFineTuning,
    LinearProbe,
    LoRA,
    PrefixTuning,
    SparseLoRA,
    merge,
    unmerge,
)
from lit_peft.core.registry import registry
from lit_peft.saving.merged import check_foldable, find_model, left_out, read_again, save_merged
from lit_peft.testing.conformance import assert_same, perturb, snapshot

HEADS = {"distilbert": ["pre_classifier", "classifier"], "bert": ["classifier"], "roberta": ["classifier"]}
METHODS = {
    "LoRA": lambda head: LoRA(r=2, target_modules=["attention", "ffn"], train_also=head),
    "SparseLoRA": lambda head: SparseLoRA(r=4, train_also=head),
    "AdaLoRA": lambda head: AdaLoRA(init_r=4, target_r=2, train_also=head),
    "BitFit": lambda head: BitFit(train_also=head),
    "LinearProbe": lambda head: LinearProbe(train_also=head),
    "FullFineTuning": lambda head: FullFineTuning(),
}
CASES = [(name, "LoRA") for name in ("distilbert", "bert", "roberta", "gpt2", "llama", "t5")]
CASES += [("bert", method) for method in METHODS if method != "LoRA"]


def adapted(name: str, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny(name).to(dtype)
    METHODS[method](HEADS.get(name, [])).attach(model)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_plain_transformers_answers_as_the_adapted_model(name, method, tmp_path):
    model = adapted(name, method)
    before, expected = snapshot(model), logits(model, name)
    assert save_merged(model, tmp_path / "out") == tmp_path / "out"
    assert_same(snapshot(model), before)  # the module is as it was
    assert registry(model).active == ("default",)
    plain = getattr(tf, type(model).__name__).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain, name), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(plain).__name__]
    assert not any("peft" in key for key in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_base_in_bfloat16_is_written_in_it_with_what_trained_in_float32(tmp_path):
    model = adapted("bert", "LoRA", torch.bfloat16)
    assert model.classifier.weight.dtype == torch.float32
    merge(model)
    expected, before = logits(model, "bert"), snapshot(model)
    save_merged(model, tmp_path / "out")
    assert_same(snapshot(model), before)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    plain = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain, "bert"), expected)
    assert torch.equal(logits(read_again(model, tmp_path / "out"), "bert"), expected)


def test_what_is_read_again_is_held_to_what_was_written(tmp_path):
    model = adapted("bert", "LoRA")
    save_merged(model, tmp_path / "out")
    merge(model)
    read_again(model, tmp_path / "out")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] += 1e-3
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.bias is not what it was before"):
        read_again(model, tmp_path / "out")


class Own(pl.LightningModule):
    """Somebody's module, with an encoder and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny("bert").bert
        self.head = nn.Linear(16, 3)

    def forward(self, batch):
        return self.head(self.encoder(**batch).last_hidden_state[:, 0])


def test_of_a_module_of_ones_own_the_transformers_model_is_written(tmp_path):
    module = Own()
    LoRA(r=2, target_modules=["query"], train_also=["head"]).attach(module)
    perturb(module)
    root = find_model(module)
    assert root.path == "encoder" and left_out(module, root) == ["head.bias", "head.weight"]
    save_merged(module.eval(), tmp_path / "out")
    plain = tf.AutoModel.from_pretrained(tmp_path / "out").eval()
    batch = {"input_ids": torch.tensor([[3, 7, 11]])}
    expected = module.encoder(**batch).last_hidden_state
    torch.testing.assert_close(plain(**batch).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_told(tmp_path):
    module = Module()
    net_lora().attach(module)
    with pytest.raises(ValueError, match=r"Module holds no transformers model.*lit_peft\.merge\(module\).*torch\.save"):
        save_merged(module, tmp_path / "out")
    module = Own()
    LinearProbe(train_also=["head"]).attach(module)
    with pytest.raises(ValueError, match="Nothing that was trained lies in the BertModel at 'encoder'"):
        save_merged(module, tmp_path / "out")
    for method in (BottleneckAdapter(), PrefixTuning(num_virtual_tokens=2)):
        model = tiny("bert")
        method.attach(model)
        with pytest.raises(ValueError, match=f"{type(method).__name__} cannot be merged: .* Keep its adapter beside"):
            check_foldable(model)
        with pytest.raises(ValueError, match=f"{type(method).__name__} cannot be merged: .* Keep its adapter beside"):
            save_merged(model, tmp_path / "out")
    model = tiny("gpt2")
    LoRA(r=2, target_modules=["wte"]).attach(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"transformer\.wte cannot be merged: its weight is also that of lm_head.*`lit-peft export` it"
    ):
        save_merged(model, tmp_path / "out")
    assert_same(snapshot(model), before)
    assert not list(tmp_path.iterdir())


def test_folders_beside_the_weights_can_be_entered(tokenizer, tmp_path):
    """Of several chat templates, all but the first are in a folder."""
    names = tf.AutoTokenizer.from_pretrained(tokenizer)
    names.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save_merged(adapted("bert", "LoRA"), tmp_path / "out", names)
    (templates,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert templates.stat().st_mode & 0o100
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1


def test_a_writer_that_fails_leaves_neither_a_folder_nor_a_merged_model(tmp_path, monkeypatch):
    model = adapted("bert", "LoRA")
    before = snapshot(model)

    def full(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert_same(snapshot(model), before)
    with pytest.raises(ValueError, match="no merged adapter"):
        unmerge(model)
