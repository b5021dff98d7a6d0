"""Which layers a method quantises, what it leaves alone, and what it refuses."""

import pytest
import torch
from models import logits, tiny
from torch import nn
from toys import Module, fit, lora, net_lora

from lit_peft import FullFineTuning, LinearProbe, LoRA, PrefixTuning, PromptTuning, PTuning, QLoRA
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import choose_layers, make_quantizer, parse, stored_as
from lit_peft.core.registry import registry
from lit_peft.testing.states import perturb
from lit_peft.testing.subjects import MODELS

EXACT = {"mode": "nf4", "compute_dtype": "float32"}
NF4 = "nf4 in blocks of 64, double"


def quantised(module: nn.Module) -> set[str]:
    found = stored_as(module)
    assert set(found.values()) <= {NF4}
    return set(found)


# -------------------------------------------------------------------------------------------- which layers


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mlp", "conv_net")])
def test_the_bodies_of_transformers_models_are_quantised_and_their_heads_are_not(name):
    plain, module = tiny(name), tiny(name)
    with torch.no_grad():
        for parameter in (*plain.parameters(), *module.parameters()):
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # so that the logits hear every layer
    LoRA(r=2, dropout=0.0, quantize=EXACT).attach(module)
    linear = {path for path, layer in plain.named_modules() if type(layer).__name__ in ("Linear", "Conv1D")}
    body = {path for path in linear if path.startswith(plain.base_model_prefix + ".")} or linear
    in_float32 = {path for path in body if path.endswith(".wo")}  # T5's, which transformers keeps so
    assert quantised(module) == body - {"lm_head"} - in_float32
    exact = logits(plain, name)
    for path in quantised(module):
        layer, before = module.get_submodule(path), plain.get_submodule(path)
        assert type(layer).__name__ == "Linear4bit"
        assert layer.bias is None or torch.equal(layer.bias, before.bias)
        ops = layer_ops(before)
        ops.store(before, layer_ops(layer).matrix(layer), None)
    torch.testing.assert_close(logits(module, name), logits(plain, name), rtol=1e-3, atol=5e-5)
    assert (logits(module, name) - exact).abs().max() > 1e-3


def test_adapters_and_what_trains_are_never_quantised():
    module = tiny("distilbert")
    LoRA(
        r=2,
        dropout=0.0,
        quantize=EXACT,
        train_also=["pre_classifier", "classifier", "*.layer.1.ffn"],
        target_modules="all-linear",
    ).attach(module)
    assert not {path for path in quantised(module) if "layer.1.ffn" in path or "classifier" in path or "peft" in path}
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
    logits(module, "distilbert").sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert module.distilbert.transformer.layer[1].ffn.lin1.weight.grad.any()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_weights_are_left_alone(name):
    module = tiny(name)
    LoRA(r=2, quantize="nf4").attach(module)
    embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
    assert output.weight is embedding.weight and output.weight.is_floating_point()


class Two(nn.Module):
    """Layers whose weight is used twice: as one module, or as one parameter of two."""

    def __init__(self):
        super().__init__()
        self.once, self.twice, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.same, self.tied, self.last = self.twice, nn.Linear(8, 8), nn.Linear(8, 2)
        self.tied.weight = self.other.weight

    def forward(self, x):
        for layer in (self.once, self.twice, self.other, self.same, self.tied):
            x = torch.tanh(layer(x))
        return self.last(x)


def test_of_a_plain_module_all_but_the_last_and_the_tied():
    reasons = choose_layers(Two(), make_quantizer("nf4"))
    assert reasons == {
        "once": None,
        "twice": None,
        "other": "its weight is used elsewhere too",
        "tied": "its weight is used elsewhere too",
        "last": "it is the last layer",
    }
    module = Two()
    lora(target_modules=["once", "twice", "other"], quantize=EXACT).attach(module)
    assert quantised(module) == {"once", "twice"} and module.same is module.twice
    perturb(module)
    module(torch.randn(3, 8)).sum().backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)


def test_one_layer_alone_is_what_the_user_is_after():
    assert choose_layers(nn.Sequential(nn.Linear(8, 8)), make_quantizer("nf4")) == {"0": None}


def test_an_attention_that_reads_its_weights_itself_is_left_alone():
    module = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2))
    lora(target_modules=["linear1", "linear2"], quantize=EXACT).attach(module)
    assert quantised(module) == {"0.linear1", "0.linear2"}


@pytest.mark.parametrize("stacked", [False, True])
def test_the_fast_path_of_an_encoder_layer_does_not_read_codes(stacked):
    """nn.TransformerEncoderLayer reads the weights of its layers itself, in evaluation, whatever they are."""

    def build(**arguments):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        module = nn.TransformerEncoder(layer, 2) if stacked else layer
        # Adapters stand elsewhere: only the quantiser keeps these layers from the fast path.
        module = nn.ModuleDict({"encoder": module, "head": nn.Linear(16, 4)})
        LoRA(r=2, dropout=0.0, target_modules=["head"], **arguments).attach(module)
        return module

    module, x = build(quantize=EXACT), torch.randn(3, 5, 16)
    assert {path.rpartition(".")[2] for path in quantised(module)} == {"linear1", "linear2"}
    slow = module.train().encoder(x)
    with torch.no_grad():
        fast = module.eval().encoder(x)
    torch.testing.assert_close(fast, slow)
    assert (fast - build().eval().encoder(x)).abs().max() > 1e-4


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_layer_whose_weight_is_computed_is_left_alone(norm):
    module = nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)), nn.Linear(8, 2))
    lora(target_modules=["0", "1"], quantize=EXACT).attach(module)
    assert quantised(module) == {"0"}
    perturb(module)
    module(torch.randn(3, 8)).sum().backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)


def test_what_transformers_keeps_in_float32_is_left_alone_by_name_path_and_weight():
    module = tiny("distilbert")
    module._keep_in_fp32_modules = {"lin1", "attention.q_lin"}
    module._keep_in_fp32_modules_strict = {"attention.k_lin.weight", "n.v_lin"}
    reasons = choose_layers(module, make_quantizer("nf4"))
    kept = {path.rpartition(".")[2] for path, why in reasons.items() if why == "transformers keeps it in float32"}
    assert kept == {"lin1", "q_lin", "k_lin"}


def test_modules_that_are_named_are_left_alone():
    module = tiny("distilbert")
    LoRA(r=2, quantize=EXACT | {"skip_modules": ["lin2", "*.layer.1"]}).attach(module)
    assert quantised(module) == {
        *(f"distilbert.transformer.layer.0.attention.{x}_lin" for x in ("q", "k", "v", "out")),
        "distilbert.transformer.layer.0.ffn.lin1",
    }


def test_embeddings_are_adapted_beside_quantised_layers():
    module = tiny("distilbert")
    lora(target_modules=["word_embeddings", "query"], quantize=EXACT).attach(module)
    perturb(module)
    logits(module, "distilbert").square().sum().backward()
    sites = registry(module).adapters["default"].sites
    assert any("word_embeddings" in path for path in sites)
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)
    assert module.distilbert.embeddings.word_embeddings.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------- every method


def test_a_linear_probe_on_a_quantised_base():
    module = tiny("distilbert")
    LinearProbe(train_also=["pre_classifier", "classifier"], quantize=EXACT).attach(module)
    assert len(quantised(module)) == 12
    logits(module, "distilbert").sum().backward()
    assert module.classifier.weight.grad.any()


def test_full_fine_tuning_leaves_nothing_to_quantise():
    module = tiny("distilbert")
    told = (
        r"quantize: DistilBertFor.* has no linear layer that could be quantised\. Left alone: 14 of 14, .*\(it trains\)"
    )
    with pytest.raises(ValueError, match=told):
        FullFineTuning(quantize="nf4").attach(module)
    assert not stored_as(module) and registry(module) is None


@pytest.mark.parametrize(
    "method", [PromptTuning(3), PTuning(3, hidden_size=5), PrefixTuning(3)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_virtual_tokens_on_a_quantised_base(method, name):
    module = tiny(name)
    type(method)(**method.arguments() | {"quantize": parse(EXACT)}).attach(module)
    assert len(quantised(module)) == {"bert": 13, "llama": 14}[name]
    perturb(module)
    module.train()
    logits(module, name).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)


def test_a_second_adapter_stands_on_the_quantised_base():
    module = tiny("distilbert")
    lora(quantize=EXACT).attach(module)
    before = logits(module, "distilbert")
    lora(name="second", target_modules="ffn").attach(module)  # takes the base as it is
    lora(name="third", quantize=EXACT).attach(module)  # says what it is
    assert torch.equal(logits(module, "distilbert"), before)
    perturb(module, only=".second.")
    assert not torch.equal(logits(module, "distilbert"), before)
    with pytest.raises(
        ValueError, match=r"is quantised already, nf4 in blocks of 64, double, not int8 by rows\. Take it as it is"
    ):
        lora(name="fourth", quantize="int8").attach(module)
    assert "fourth" not in registry(module).adapters


def test_a_base_with_adapters_is_not_quantised_below_them():
    module = tiny("distilbert")
    lora().attach(module)
    with pytest.raises(
        ValueError, match=r"the base has adapters already, which stand on it as it is\. Quantise with the f"
    ):
        lora(name="second", quantize="nf4").attach(module)
    assert not stored_as(module)


# ---------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("nf5", r"there is no mode 'nf5'\. Did you mean nf4\b.*Modes: "),
        ("NF4", r"there is no mode 'NF4'\. Did you mean nf4\b"),
        ({"mode": "nf4", "blocksize": 32}, r"nf4 has no option 'blocksize'\. Did you mean block_size\?"),
        ({"double_quant": False}, "names no mode; modes: .*fp4.*int8.*nf4"),
    ],
)
def test_words_that_mean_nothing(quantize, message):
    with pytest.raises(ValueError, match=message):
        LoRA(quantize=quantize)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nf4", "block_size": 48}, "block_size is 48, expected one of 32, 64"),
        ({"mode": "nf4", "double_quant": "yes"}, "double_quant is 'yes', expected true or false"),
        ({"mode": "nf4", "compute_dtype": "int8"}, "compute_dtype must be .*not 'int8'"),
        ({"mode": "nf4", "storage_dtype": "int8"}, "storage_dtype must be .*not 'int8'"),
        ({"mode": "int8", "threshold": -1.0}, r"threshold must be at least 0, not -1\.0"),
        (
            {"mode": "nf4", "skip_modules": ["lin9"]},
            r"skip_modules 'lin9' matches nothing\. Did you mean lin2 or lin1\?",
        ),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"quantize: {message}"):
        lora(quantize=options).attach(tiny("distilbert"))


def test_a_layer_without_values_is_refused():
    with torch.device("meta"):
        module = tiny("distilbert")
    with pytest.raises(ValueError, match=r"quantize: distilbert\.\S+ has no values yet; load the base first"):
        lora(quantize="nf4").attach(module)


def test_qlora_is_lora_with_the_defaults_of_its_paper():
    method = QLoRA()
    assert isinstance(method, LoRA) and (method.r, method.alpha, method.dropout) == (64, 16, 0.1)
    assert method.target_modules == ["all-linear"]
    assert method.quantize == parse("nf4") and method.quantize["double_quant"] is True
    assert method.quantize["compute_dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------ the trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_fit_trains_beside_a_quantised_base(precision):
    module = Module()
    fit(module, net_lora(quantize="nf4"), precision=precision, max_epochs=2)
    assert quantised(module) == {"net.first", "net.second", "net.unused"}
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and {p.dtype for p in trained.values()} == {dtype}
    assert all(trained[name].any() for name in trained)
    assert layer_ops(module.net.first).codes(module.net.first).dtype == torch.uint8
