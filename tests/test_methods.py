"""The methods in the box: what they train, how many parameters, what they refuse, and where they are listed."""

import json
import math
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
import transformers as tf
from models import tiny
from torch import nn
from toys import lora

from lit_peft import methods
from lit_peft.methods import BUILT_IN, BitFit, FullFineTuning, LinearProbe, LoRA, Method, TargetedMethod, registry
from lit_peft.testing.states import assert_same, snapshot
from lit_peft.testing.subjects import MODELS


def on_meta(make):
    """A model of full size that holds no values."""
    with torch.device("meta"):
        return make()


def counted(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# -------------------------------------------------------------------------------------------------- counts

GPT2_BOTH = {"target_modules": ["c_attn", "c_proj"], "r": 8}


@pytest.mark.parametrize(
    ("make", "method", "count"),
    [
        (lambda: nn.ModuleDict({"layer": nn.Linear(4096, 4096)}), LoRA(r=16, target_modules="layer"), 131_072),
        # 12 x 8 x (768 + 2304, c_attn; 768 + 768, attention's c_proj; 3072 + 768, the feed-forward's)
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config()), LoRA(**GPT2_BOTH), 811_008),
        # 12 x 16 x 4 x (768 + 768)
        (lambda: tf.BertForSequenceClassification(tf.BertConfig()), LoRA(), 1_179_648),
        # the same, and the biases of four projections of 768 in each of 12 layers
        (lambda: tf.BertForSequenceClassification(tf.BertConfig()), LoRA(bias="lora_only"), 1_179_648 + 36_864),
        # one norm, 12 x (4 projections, 2 feed-forward layers, 2 norms), pooler, two classes
        (lambda: tf.BertForSequenceClassification(tf.BertConfig()), BitFit(), 768 + 12 * 8448 + 768 + 2),
        (lambda: tf.BertForSequenceClassification(tf.BertConfig()), LinearProbe(train_also=["classifier"]), 1538),
        (lambda: tf.DistilBertModel(tf.DistilBertConfig()), FullFineTuning(), 66_362_880),
    ],
)
def test_counts_of_full_size(make, method, count):
    module = on_meta(make)
    method.attach(module)
    assert counted(module) == count
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_device_context_does_not_reach_starting_values(name):
    """A trainer's accelerator is the default device while it configures the model, and the values are the host's."""
    plain, inside = (MODELS["distilbert"].build() for _ in range(2))
    arguments = {"train_also": ["classifier"]} | (
        {"r": 4} if name in ("HiRA", "QLoRA") else {}
    )  # defaults are too much here
    torch.manual_seed(1)
    getattr(methods, name)(**arguments).attach(plain)
    with torch.device("meta"):
        getattr(methods, name)(**arguments).attach(inside)
    assert_same(snapshot(inside), snapshot(plain))


# ------------------------------------------------------------------------------------------ selection only


def test_bitfit_trains_biases_of_every_kind():
    model = tiny("distilbert")
    assert BitFit().attach(model).base == sorted(n for n, _ in model.named_parameters() if n.endswith("bias"))
    module = nn.ModuleDict({"lstm": nn.LSTM(2, 3), "attention": nn.MultiheadAttention(4, 2)})
    assert BitFit().attach(module).base == [
        *("attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_hh_l0", "lstm.bias_ih_l0")
    ]


@pytest.mark.parametrize("name", ["llama", "t5"])  # T5's relative_attention_bias is an embedding
def test_bitfit_refuses_a_model_without_biases(name):
    model = tiny(name)
    with pytest.raises(ValueError, match=f"nothing to train: {type(model).__name__} has no biases. Use LoRA, or"):
        BitFit(train_also=["lm_head"]).attach(model)


def test_a_linear_probe_must_know_the_head():
    model = tiny("distilbert")
    with pytest.raises(ValueError, match=r"DistilBertFor\w+ does not say which it is: name it, LinearProbe\(train_a"):
        LinearProbe().attach(model)
    model.train_also = ["classifier"]  # as our tasks say
    assert LinearProbe().attach(model).base == ["classifier.bias", "classifier.weight"]


def test_a_method_that_adds_and_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="'default' trains nothing: no addition was built"):
        TargetedMethod(target_modules="query").attach(tiny("distilbert"))


# ---------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "^r must be at least 1, not 0"),
        ({"r": -1}, "^r must be at least 1, not -1"),
        ({"dropout": 2.0}, "^dropout must be at least 0 and below 1, not 2.0"),
        ({"dropout": 1.0}, "^dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": math.nan}, "^dropout must be at least 0 and below 1, not nan"),
        ({"rank_pattern": {"query": 0}}, r"^rank_pattern\['query'\] must be at least 1, not 0"),
        ({"adapter_dtype": "float16"}, "^adapter_dtype must be auto, float32 or bfloat16, not 'float16'"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 17}, r"^r = 17 exceeds the smaller side of distilbert\.\S+\.0\.attention\.q_lin, 16 x 16"),
        ({"rank_pattern": {"*.1.*k_lin": 17}}, r"^r = 17 exceeds the smaller side of \S+\.1\.attention\.k_lin"),
        ({"rank_pattern": {"lin1": 4}}, "^rank_pattern: 'lin1' matches none of the 8 adapted layers"),
        ({"alpha_pattern": {"qlin": 4}}, "^alpha_pattern: 'qlin' matches none of the 8 adapted layers"),
    ],
)
def test_arguments_that_do_not_fit_the_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora(**arguments).attach(tiny("distilbert"))


@pytest.mark.parametrize(
    ("arguments", "scaling"),
    [
        ({"r": 4}, 2.0),
        ({"r": 16}, 2.0),
        ({"r": 4, "alpha": 6}, 1.5),
        ({"r": 4, "alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 2, "alpha": 6, "rank_pattern": {"query": 4}}, 1.5),
        ({"r": 4, "alpha": 1, "alpha_pattern": {"query": 2}}, 0.5),
        ({"r": 2, "rank_pattern": {"query": 8}, "alpha_pattern": {"query": 4}, "use_rslora": True}, 2**0.5),
    ],
)
def test_scaling(arguments, scaling):
    model = tiny("distilbert")
    lora(**arguments).attach(model)
    layer = model.distilbert.transformer.layer[0].attention.q_lin
    delta = layer.peft["default"]
    nn.init.normal_(delta.lora_B)
    expected = layer.weight + scaling * delta.lora_B @ delta.lora_A
    torch.testing.assert_close(delta.weight(layer.weight), expected)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)


def test_the_first_pattern_that_matches_counts():
    model = tiny("llama")
    lora(rank_pattern={"*.0.*q_proj": 8, "query": 4, "k_proj": 3}).attach(model)
    ranks = {n: len(p) for n, p in model.named_parameters() if n.endswith("lora_A")}
    layer = "model.layers.{}.self_attn.{}_proj.peft.default.lora_A"
    expected = {layer.format(i, x): {"q": 4, "k": 3}.get(x, 2) for i in range(2) for x in "qkvo"}
    assert ranks == expected | {layer.format(0, "q"): 8}


def test_dropout_acts_in_training_only():
    model = tiny("distilbert")
    lora(dropout=0.5).attach(model)
    layer = model.distilbert.transformer.layer[0].attention.q_lin
    nn.init.normal_(layer.peft["default"].lora_B)
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), layer(x))  # from_pretrained gives eval mode, and attaching leaves it
    layer.train()
    assert not torch.equal(layer(x), layer(x))


# ----------------------------------------------------------------------------------------------- arguments

OTHER = {
    "LoRA": {"r": 3, "alpha": 5.0, "dropout": 0.0, "bias": "all", "rank_pattern": {"query": 2}, "layers": "0-1"},
    "BitFit": {"biases": ["query", "ffn_up"], "name": "biases", "layer_decay": 0.9},
    "BottleneckAdapter": {"placement": "parallel", "reduction_factor": 2, "scale": 1.0, "target_modules": ["lin2"]},
    "LinearProbe": {"train_also": ["classifier"], "adapter_dtype": "bfloat16"},
    "FullFineTuning": {"train_also": {"classifier": 1.0, "*norm*": 0.1}, "layer_decay": 0.5, "unfreeze_every": 0.1},
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_arguments_make_the_same_method_again(name):
    cls = getattr(methods, name)
    for method in (cls(), cls(**OTHER.get(name, {"name": "other"}))):
        arguments = method.arguments()
        again = cls(**arguments)
        assert again.arguments() == arguments
        assert eval(repr(method), {name: cls}).arguments() == arguments
        assert json.loads(json.dumps(arguments)) == arguments  # what a checkpoint and adapter folder can hold
        assert method.spec() == {"class_path": f"lit_peft.methods.{name}", "init_args": arguments}
    assert all(cls().arguments()[key] != value for key, value in OTHER.get(name, {}).items())


def test_one_word_will_do_where_a_list_is_meant():
    method = LoRA(target_modules="query", exclude_modules="key", train_also="classifier")
    assert (method.target_modules, method.exclude_modules, method.train_also) == (["query"], ["key"], ["classifier"])


# ------------------------------------------------------------------------------------------------ registry


def point(value: str) -> EntryPoint:
    return EntryPoint(value.rpartition(":")[2], value, registry.GROUP)


def test_built_in_methods_are_listed_without_importing_torch():
    code = (
        "import sys; from lit_peft.methods.registry import available\n"
        "for entry in available().values(): print(entry.class_path, entry.summary(), sep='|')\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    listed = dict(line.split("|", 1) for line in lines)
    assert set(listed) >= {f"lit_peft.methods.{name}" for name in BUILT_IN}
    assert listed["lit_peft.methods.LoRA"].startswith("Low-rank adaptation: ")
    assert all(listed.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_method_loads(name):
    cls = registry.find(name).load()
    assert cls is getattr(methods, name) and issubclass(cls, Method)


@pytest.mark.parametrize(("name", "hint"), [("lora", "LoRA"), ("LORA", "LoRA"), ("bit_fit", "BitFit")])
def test_a_near_miss_is_answered_with_the_name(name, hint):
    with pytest.raises(ValueError, match=rf"no method named '{name}'\. Did you mean {hint}\b.*Methods: LoRA, QLoRA"):
        registry.find(name)
    with pytest.raises(ValueError, match=r"no method named 'xyzzy'\. Methods: LoRA"):
        registry.find("xyzzy")


def test_plugins_are_listed_and_read_without_running_them(monkeypatch, tmp_path):
    (tmp_path / "my_plugin.py").write_text(
        'class Mine:\n    """Trains what is mine.\n\n    More."""\n\nraise OSError\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point("my_plugin:Mine"), point("gone:Lost")])
    entry = registry.find("Mine")
    assert (entry.class_path, entry.package) == ("my_plugin.Mine", "my_plugin")
    assert entry.summary() == "Trains what is mine."
    assert registry.find("Lost").summary() == ""
    assert "my_plugin" not in sys.modules
    with pytest.raises(OSError):
        entry.load()


def test_a_plugin_cannot_take_a_built_in_name(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [point("other_package:LoRA")])
    with pytest.warns(UserWarning, match="other_package brings a method named 'LoRA', which is taken"):
        assert registry.find("LoRA").package == "lit-peft"


def test_the_package_names_what_it_has():
    assert set(BUILT_IN) | {"Method", "TargetedMethod"} <= set(dir(methods))
    with pytest.raises(AttributeError, match="has no attribute 'Lora'"):
        methods.Lora  # noqa: B018
