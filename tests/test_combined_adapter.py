"""What `lit_peft.combine` leaves: an adapter with heads and arguments of its own, which saves, loads and trains."""

import warnings

import peft
import pytest
import torch
from models import logits, tiny
from test_combine import change, changes, perturb, refused, three
from torch import nn
from toys import Module, fit, net_lora, trainable

import lit_peft
from lit_peft import LoRA, combine, set_active
from lit_peft.core.merge import merge, unmerge
from lit_peft.core.registry import registry
from lit_peft.testing.subjects import MODELS

# ----------------------------------------------------------------------------- what trains beside adapters


def with_heads(**heads) -> nn.Module:
    """A model whose adapters train what is given beside them."""
    model = tiny("distilbert")
    for name, arguments in heads.items():
        LoRA(r=2, dropout=0.0, target_modules=["q_lin", "lin1"], name=name, **arguments).attach(model)
    perturb(model)
    return model


def test_what_one_adapter_trains_beside_comes_along():
    model = with_heads(a={}, b={"train_also": {"classifier": 0.5}, "bias": "lora_only"})
    adapter = combine(model, ["a", "b"], "new")
    b = registry(model).adapters["b"]
    assert (adapter.base, adapter.head, adapter.scales) == (b.base, b.head, b.scales)
    assert adapter.spec["init_args"]["bias"] == "lora_only"
    lit_peft.detach(model, "a")
    lit_peft.detach(model, "b")
    assert trainable(model) == registry(model).trainable_names()
    assert {"classifier.weight", "distilbert.transformer.layer.0.attention.q_lin.bias"} <= trainable(model)


HEADS = {
    "all biases": ({"a": {"bias": "all"}, "b": {}}, "all", []),
    "biases of some": (
        {"a": {"bias": "lora_only"}, "b": {"target_modules": "lin2"}},
        "none",
        ["distilbert.transformer.layer.0.attention.q_lin.bias", "distilbert.transformer.layer.1.attention.q_lin.bias"],
    ),
    # by its name alone, pre_classifier would not be meant: names end at dots
    "a head and another": (
        {"a": {"train_also": ["classifier"]}, "b": {"train_also": ["pre_classifier"]}},
        "none",
        ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"],
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_its_arguments_make_the_same_adapter_again(case):
    heads, bias, also = HEADS[case]
    model = tiny("distilbert")
    for name, arguments in heads.items():
        LoRA(**{"r": 2, "dropout": 0.0, "target_modules": "q_lin", "name": name} | arguments).attach(model)
    perturb(model)
    check_made_again(model, tiny("distilbert"), combine(model, list(heads), "new"))
    arguments = registry(model).adapters["new"].spec["init_args"]
    assert (arguments["bias"], arguments["train_also"]) == (bias, also)


def check_made_again(model: nn.Module, fresh: nn.Module, adapter) -> None:
    again = LoRA(**adapter.spec["init_args"]).attach(fresh)
    assert {**vars(again), "prepared": True} == vars(adapter)
    for path in adapter.sites:
        old, new = (m.get_submodule(path).peft[adapter.name] for m in (model, fresh))
        assert (old.lora_A.shape, old.lora_B.shape) == (new.lora_A.shape, new.lora_B.shape)
        assert (old.scaling, old.alpha) == (new.scaling, new.alpha)


class Confusing(nn.Module):
    """Names that are roles, and that end with one another."""

    def __init__(self):
        super().__init__()
        self.query, self.lin1 = nn.Linear(5, 6), nn.Linear(5, 6)
        self.inner = nn.ModuleDict({"query": nn.Linear(5, 6), "q_lin": nn.Linear(5, 6), "deep": nn.ModuleDict()})
        self.inner["deep"]["query"] = nn.Linear(5, 6)


@pytest.mark.parametrize("a", ["re:query", "re:inner.query", "re:.*query", "q_lin"])
@pytest.mark.parametrize("b", ["re:query", "re:inner.query", "lin1"])
def test_names_mean_no_other_layer(a, b):
    model = Confusing()
    LoRA(r=2, alpha=3, target_modules=a, name="a").attach(model)
    LoRA(r=3, alpha=2, target_modules=b, name="b").attach(model)
    perturb(model)
    check_made_again(model, Confusing(), combine(model, ["a", "b"], "new"))


def test_a_module_that_is_one_layer():
    layer = nn.Linear(6, 5)
    LoRA(r=2, target_modules="re:", name="a").attach(layer)
    check_made_again(layer, nn.Linear(6, 5), combine(layer, ["a"], "new", r=1))


def test_values_that_differ_are_not_chosen_in_silence():
    model = with_heads(ant={"train_also": ["classifier"]}, bee={"train_also": ["classifier"]}, cat={})
    base = {key: value.clone() for key, value in tiny("distilbert").state_dict().items()}
    for name, value in (("ant", 1.0), ("bee", 2.0)):
        set_active(model, name)
        with torch.no_grad():
            for p in model.classifier.parameters():
                p.fill_(value)
    message = r"'ant' and 'bee' have both trained or moved classifier\.\w+, to different values, .*head='bee'"
    refused(model, message, ["ant", "bee", "cat"], "new")
    refused(model, message, ["ant", "bee", "cat"], "new", head="cat")
    set_active(model, "bee")
    combine(model, ["ant", "cat"], "of_one")
    assert (model.classifier.weight == 1).all()
    combine(model, ["ant", "bee", "cat"], "of_two", head="bee")
    assert (model.classifier.weight == 2).all() and (model.classifier.bias == 2).all()
    combine(model, ["ant", "of_one"], "the_same")  # which is no contradiction
    for name, value in (("ant", 1), ("bee", 2), ("of_one", 1), ("of_two", 2), ("the_same", 1)):
        set_active(model, name)
        assert (model.classifier.weight == value).all()
    lit_peft.detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_statistics_that_moved_come_along(tmp_path):
    model = MODELS["conv_net"].build()
    LoRA(r=2, dropout=0.0, target_modules="first", update_norm_stats=True, name="a").attach(model)
    perturb(model)
    with torch.no_grad():
        model.norm.running_mean.add_(3.0)
    alone = MODELS["conv_net"].evaluate(model)
    set_active(model, None)
    LoRA(r=2, dropout=0.0, target_modules="second", name="b").attach(model)
    adapter = combine(model, ["a", "b"], "new")  # b changes nothing yet
    assert adapter.update_norm_stats
    torch.testing.assert_close(MODELS["conv_net"].evaluate(model), alone, rtol=1e-5, atol=1e-6)
    lit_peft.save(model, tmp_path, "new")
    twin = MODELS["conv_net"].build()
    lit_peft.load(twin, tmp_path)
    torch.testing.assert_close(MODELS["conv_net"].evaluate(twin), alone, rtol=1e-5, atol=1e-6)
    set_active(model, "b")
    assert not torch.allclose(MODELS["conv_net"].evaluate(model), alone)


# ---------------------------------------------------------------------------------------- a real adapter


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    module = nn.Sequential(nn.Linear(40, 30)).to(torch.bfloat16)
    for name in "ab":
        LoRA(r=4, dropout=0.0, target_modules="0", adapter_dtype="bfloat16", name=name).attach(module)
    perturb(module)
    a, b = (module[0].peft[name] for name in "ab")
    adapter = combine(module, {"a": 0.3, "b": 0.7}, "new")
    new = module[0].peft["new"]
    assert adapter.spec["init_args"]["adapter_dtype"] == "bfloat16" and new.lora_A.dtype == torch.bfloat16
    exact = torch.cat([0.3 * a.scaling * a.lora_A.float(), 0.7 * b.scaling * b.lora_A.float()])
    assert torch.equal(new.lora_A, exact.to(torch.bfloat16))
    combine(module, ["a", "b"], "small", "ties", density=0.5)
    assert module(torch.randn(2, 40, dtype=torch.bfloat16)).isfinite().all()
    LoRA(r=4, dropout=0.0, target_modules="0", name="c").attach(module)
    combine(module, ["a", "c"], "mixed")
    assert module[0].peft["mixed"].lora_A.dtype == torch.float32


def test_agreement_of_what_matters_in_training():
    module = three()
    arguments = combine(module, ["ant", "bee"], "new").spec["init_args"]
    assert arguments["dropout"] == 0.05
    LoRA(r=2, dropout=0.3, loraplus_ratio=4, target_modules="first", name="dog").attach(module)
    arguments = combine(module, ["dog", "bee"], "both").spec["init_args"]
    assert (arguments["dropout"], arguments["loraplus_ratio"]) == (0.05, 1.0)
    arguments = combine(module, ["dog"], "one").spec["init_args"]
    assert (arguments["dropout"], arguments["loraplus_ratio"]) == (0.3, 4)


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("arguments", [{}, {"kind": "ties", "density": 0.4, "r": 3}], ids=["linear", "ties"])
def test_saved_it_opens_here_and_in_hf_peft(name, arguments, tmp_path):
    model, base = tiny(name), tiny(name)
    also = {"distilbert": ["classifier", "pre_classifier"]}.get(name, [])
    LoRA(r=4, alpha=3, dropout=0.0, target_modules="attention", name="a", use_rslora=True).attach(model)
    targets = {"llama": ["embed_tokens", "query", "ffn_up"]}.get(name, ["query", "ffn_up"])
    LoRA(r=5, dropout=0.0, target_modules=targets, train_also=also, name="b").attach(model)
    perturb(model)
    combine(model, {"a": 1.5, "b": -0.5}, "new", **arguments)
    expected = logits(model, name)
    assert (expected - logits(base, name)).abs().max() > 1e-2
    lit_peft.save(model, tmp_path, "new")
    twin = tiny(name)
    lit_peft.load(twin, tmp_path)
    assert torch.equal(logits(twin, name), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(opened, name), expected, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, name), expected)


def test_it_trains_on_and_the_others_stay():
    module = Module()
    net_lora(name="a").attach(module)
    net_lora(name="b", target_modules="net.second", r=3).attach(module)
    perturb(module)
    adapter = combine(module, ["a", "b"], "new")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fit(module, LoRA(**adapter.spec["init_args"]))
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"net.{layer}.peft.new.lora_{x}" for layer in ("first", "second") for x in "AB"}


def test_three_adapters_of_different_layers():
    module = three()
    expected = {
        "first": change(module, "first", "ant") + change(module, "first", "bee"),
        "second": change(module, "second", "bee") + change(module, "second", "cat"),
    }
    adapter = combine(module, ["ant", "bee", "cat"], "new")
    assert adapter.spec["init_args"]["target_modules"] == ["first", "second"]
    for path, found in changes(module, "new").items():
        torch.testing.assert_close(found, expected[path], rtol=1e-5, atol=1e-6)
