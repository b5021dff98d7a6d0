"""Which biases BitFit trains."""

import copy

import pytest
import torch
from models import logits, tiny
from torch import nn
from toys import Module, fit, saved, trainable

import lit_peft
from lit_peft import BitFit
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.testing.conformance import perturb, snapshot


def chosen(name: str, *biases: str) -> set[str]:
    return set(BitFit(list(biases)).attach(tiny(name)).base)


def test_the_subset_of_the_paper():
    layer = "bert.encoder.layer.{}."
    expected = {layer.format(i) + n for i in range(2) for n in ("attention.self.query.bias", "intermediate.dense.bias")}
    assert chosen("bert", "query", "ffn_up") == expected
    import transformers as tf

    with torch.device("meta"):
        model = tf.BertForSequenceClassification(tf.BertConfig())
    BitFit(["query", "ffn_up"]).attach(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * (768 + 3072)


def test_patterns_mean_layers_with_their_biases():
    every = {n for n, _ in tiny("bert").named_parameters() if n.endswith("bias")}
    assert chosen("bert", "all") == every == set(BitFit().attach(tiny("bert")).base)
    assert chosen("bert", "LayerNorm") == {n for n in every if n.endswith("LayerNorm.bias")}
    assert chosen("bert", "attention") == {
        n for n in every if ".self." in n or n.endswith("attention.output.dense.bias")
    }
    assert chosen("bert", "*.layer.1.*", "re:classifier") == {n for n in every if ".1." in n} | {"classifier.bias"}
    assert BitFit("query").attach(tiny("distilbert")).base == [
        f"distilbert.transformer.layer.{i}.attention.q_lin.bias" for i in range(2)
    ]
    packed = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    assert BitFit("re:attention").attach(packed).base == ["attention.in_proj_bias"]


def test_a_head_and_train_also_come_beside():
    model = tiny("distilbert")
    BitFit("ffn_up", train_also=["classifier"]).attach(model)
    assert trainable(model) == {"classifier.weight", "classifier.bias"} | {
        f"distilbert.transformer.layer.{i}.ffn.lin1.bias" for i in range(2)
    }


def test_a_fused_bias_trains_whole_and_says_so():
    model = tiny("gpt2")
    with pytest.warns(UserWarning, match=r"'query' is one with query, key, value in transformer\.h\.0\.attn\.c_attn"):
        adapter = BitFit(["query"]).attach(model)
    assert adapter.base == [f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)]


@pytest.mark.parametrize(
    ("name", "biases", "message"),
    [
        ("llama", "all", "nothing to train: LlamaForCausalLM has no biases"),
        ("llama", "query", "nothing to train: LlamaForCausalLM has no biases"),
        ("bert", ["query", "qury"], "^biases: 'qury' matches no layer of BertFor.*Nearest with a bias: query"),
        ("bert", "ffn_gate", "^biases: 'ffn_gate' matches no layer of Bert"),
        ("bert", "word_embeddings", r"^biases: 'word_embeddings' means bert\.\S+\.word_embeddings .* have no bias"),
        ("gpt2", ["ffn", "*.lm"], "^biases: '\\*.lm' matches no layer of GPT2LMHeadModel"),
    ],
)
def test_what_means_no_bias_is_refused(name, biases, message):
    model = tiny(name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        BitFit(biases).attach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="biases is empty"):
        BitFit([])


def test_a_folder_is_loaded_from_another_root(tmp_path):
    """Patterns over whole paths mean nothing there; the folder says which biases they were."""
    holder = nn.ModuleDict({"net": tiny("bert")})
    base = copy.deepcopy(holder["net"])
    BitFit("net.*.layer.1.*dense").attach(holder)
    perturb(holder)
    lit_peft.save(holder, tmp_path)
    adapter = lit_peft.load(base, tmp_path)
    assert torch.equal(logits(base, "bert"), logits(holder["net"], "bert"))
    assert adapter.spec["init_args"]["biases"] == "net.*.layer.1.*dense"
    assert len(adapter.base) == 3 and trainable(base) == set(adapter.base)


def test_only_the_chosen_move_and_a_checkpoint_holds_only_them(tmp_path):
    module = Module()
    before = snapshot(module)
    path = saved(tmp_path, module, BitFit("first"))
    after = snapshot(module)
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["net.first.bias"]
    assert list(torch.load(path)["state_dict"]) == ["net.first.bias"]
    with pytest.raises(CheckpointMismatch, match=r"made with BitFit\(biases='first'\), not 'second'"):
        fit(Module(), BitFit("second"), ckpt_path=path)
