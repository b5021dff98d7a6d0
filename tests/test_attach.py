"""An adapted module is its base plus adapters: same keys, same values when off, the base when detached."""

import copy
import json
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit
from models import logits, tiny
from torch import Tensor, nn
from toys import lora, trainable

from lit_peft.core.active import set_active
from lit_peft.core.addition import Addition, Delta
from lit_peft.core.attach import detach
from lit_peft.core.checkpoint import adapter_keys
from lit_peft.core.registry import registry
from lit_peft.methods import BitFit, FullFineTuning, LinearProbe, LoRA, TargetedMethod
from lit_peft.testing.conformance import assert_same, snapshot

HEADS = {"distilbert": "classifier", "gpt2": "ln_f", "llama": "model.norm"}
THREE = pytest.mark.parametrize("name", HEADS)


def train(module: nn.Module, name: str) -> None:
    """Two steps that move everything that trains."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        logits(module, name).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------- keys and values of the base


@THREE
def test_keys_of_the_base_stay_and_its_own_weights_load(name):
    model = tiny(name)
    base = snapshot(model)
    lora(train_also=[HEADS[name]]).attach(model)
    added = {key for key in model.state_dict() if ".peft." in key}
    assert [key for key in model.state_dict() if key not in added] == list(base)
    other = snapshot(tiny(name, seed=1))
    incompatible = model.load_state_dict(other, strict=False)
    assert set(incompatible.missing_keys) == added and not incompatible.unexpected_keys
    assert torch.equal(logits(model, name), logits(tiny(name, seed=1), name))


@THREE
def test_switched_off_is_the_base_bit_for_bit(name):
    model = tiny(name)
    base = logits(model, name)
    lora(name="one").attach(model)
    lora(name="two", target_modules="all-linear").attach(model)
    assert torch.equal(logits(model, name), base)  # B starts at zero
    train(model, name)
    assert not torch.equal(logits(model, name), base)
    set_active(model, None)
    assert torch.equal(logits(model, name), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@THREE
def test_detached_is_the_base_bit_for_bit(name, dtype):
    model = tiny(name).to(dtype)
    state, classes = snapshot(model), [type(m) for m in model.modules()]
    next(model.parameters()).requires_grad_(False)
    required, base = trainable(model), logits(model, name)
    lora(train_also=[HEADS[name]]).attach(model)
    if name != "llama":  # it has no biases
        BitFit(name="biases").attach(model)
    train(model, name)
    assert (logits(model, name) - base).abs().max() > 1e-3
    logits(model, name).sum().backward()
    detach(model)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model, name), base)
    assert_same(snapshot(model), state)
    assert [type(m) for m in model.modules()] == classes
    assert trainable(model) == required
    assert registry(model) is None


def test_detaching_one_leaves_what_another_trains():
    name = "distilbert"
    base = logits(tiny(name), name)
    for order in (("one", "two"), ("two", "one")):
        model = tiny(name).to(torch.bfloat16)
        state = snapshot(model)
        lora(name="one", bias="all").attach(model)
        BitFit(name="two").attach(model)
        train(model, name)
        moved = model.classifier.bias.clone()
        detach(model, order[0])
        assert torch.equal(model.classifier.bias, moved) and moved.dtype == torch.float32
        assert trainable(model) == registry(model).trainable_names()
        logits(model, name).sum().backward()
        detach(model, order[1])
        assert_same(snapshot(model), state)
    assert torch.isfinite(base).all()


def test_full_fine_tuning_keeps_no_copy():
    model = tiny("distilbert")
    FullFineTuning().attach(model)
    assert registry(model).originals == {}
    train(model, "distilbert")
    trained = snapshot(model)
    detach(model)
    assert_same(snapshot(model), trained)


def test_unknown_names():
    model = tiny("distilbert")
    with pytest.raises(KeyError, match="'default'; this module has none"):
        detach(model, "default")
    lora(name="mine").attach(model)
    with pytest.raises(KeyError, match=r"'yours'; this module has \['mine'\]"):
        detach(model, "yours")
    with pytest.raises(KeyError, match=r"'yours'; this module has \['mine'\]"):
        set_active(model, ["mine", "yours"])
    assert registry(model).active == ("mine",)


class Around(TargetedMethod):
    layers_only = False

    def build(self, site):
        return Scalar()


class Scalar(Addition):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_the_architecture_keeps_its_name(tmp_path):
    model = tiny("distilbert")
    Around(target_modules="re:").attach(model)  # the whole model is the site
    lora(name="lora").attach(model)
    assert adapter_keys(model) >= {"peft.default.scale"} and trainable(model) == adapter_keys(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "DistilBertForSequenceClassification"
    ]
    assert type(model).__module__ == "transformers.models.distilbert.modeling_distilbert"


# ------------------------------------------------------------------------------------------ several adapters


def test_several_adapters_train_together_in_any_order():
    def make(*names):
        model = tiny("distilbert")
        methods = {
            "a": lora(name="a"),
            "b": lora(name="b", r=4, target_modules="ffn", train_also=["classifier"]),
            "c": LinearProbe(name="c", train_also=["pre_classifier"]),
        }
        for name in names:
            methods[name].attach(model)
        return model

    one, other = make("a", "b", "c"), make("c", "b", "a")
    assert trainable(one) == trainable(other)
    layer = "distilbert.transformer.layer.0"
    assert trainable(one) >= {
        f"{layer}.attention.q_lin.peft.a.lora_A",
        f"{layer}.ffn.lin1.peft.b.lora_A",
        "classifier.weight",
        "pre_classifier.bias",
    }
    assert one.get_parameter(f"{layer}.attention.q_lin.peft.a.lora_A").shape == (2, 16)
    assert one.get_parameter(f"{layer}.ffn.lin1.peft.b.lora_A").shape == (4, 16)
    assert registry(one).active == ("a", "b", "c")
    for name, parameter in one.named_parameters():  # values depend on seed, name and path, not on the order
        assert torch.equal(parameter, other.get_parameter(name)), name
    train(one, "distilbert")
    train(other, "distilbert")
    assert torch.equal(logits(one, "distilbert"), logits(other, "distilbert"))


def test_starting_values_differ_between_sites_and_names():
    model = tiny("distilbert")
    lora(name="a").attach(model)
    lora(name="b").attach(model)
    values = [p for name, p in model.named_parameters() if name.endswith("lora_A")]
    assert len({tuple(v.flatten().tolist()) for v in values}) == len(values) == 16


def test_values_are_drawn_on_the_host_in_float32_whatever_the_context():
    model, other = tiny("distilbert"), tiny("distilbert")
    lora().attach(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            lora().attach(other)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(snapshot(other), snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@THREE
def test_adapted_models_copy_and_pickle(name, dtype):
    model = tiny(name).to(dtype)
    lora(name="a", bias="all", train_also=[HEADS[name]]).attach(model)
    base = logits(tiny(name).to(dtype), name)
    train(model, name)
    expected = logits(model, name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(logits(twin, name), expected)
        train(twin, name)
        detach(twin)
        assert torch.equal(logits(twin, name), base)
    assert torch.equal(logits(model, name), expected)
    assert registry(model).active == ("a",)


# ------------------------------------------------------------------------------------------------ refusals


class Scales(Delta):
    scales = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(out))

    def weight(self, W):
        return self.l[:, None] * W


class IA3(TargetedMethod):
    def build(self, site):
        return Scales(site.out_features)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lora(name="first"), "already has an adapter named 'first'"),
        (lora(name="not-a-name"), "'not-a-name' must be a Python identifier"),
        (IA3(name="second", train_also=["classifier"]), r"\['first', 'second'\] both rescale"),
        (lora(name="second", target_modules=["q_lin", "zzz"]), "'zzz' matches no layer"),
        (lora(name="second", train_also=["lin1.weight"]), r"lin1\.weight is quantised and cannot be trained"),
        (LinearProbe(name="second", train_also=["zzz"]), "'zzz' names no parameter"),
        (Around(name="second", target_modules="ffn", exclude_modules=["lin1", "lin2"]), "No layer is left"),
    ],
)
def test_a_refused_method_leaves_no_trace(method, message):
    model = tiny("distilbert")
    packed = Linear4bit(16, 32, quant_type="nf4")
    packed.load_state_dict(model.distilbert.transformer.layer[0].ffn.lin1.state_dict())
    model.distilbert.transformer.layer[0].ffn.lin1 = packed.to("cpu")
    IA3(name="first").attach(model)
    keys, classes, before = list(model.state_dict()), [type(m) for m in model.modules()], trainable(model)
    adapters, active = dict(registry(model).adapters), registry(model).active
    with pytest.raises(ValueError, match=message):
        method.attach(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert trainable(model) == before
    assert (registry(model).adapters, registry(model).active) == (adapters, active)
    assert registry(model).originals == {}


def test_two_that_rescale_cannot_be_switched_on_together():
    model = tiny("distilbert")
    IA3(name="one", target_modules="*.1.*.v_lin").attach(model)
    set_active(model, None)
    IA3(name="two").attach(model)
    set_active(model, None)
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.v_lin: adapters \['one', 'two'\] both rescale"):
        set_active(model, ["one", "two"])
    assert not any(layer.peft.active for layer in model.modules() if hasattr(layer, "peft"))
    assert registry(model).active == ()


class Holds(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def compiled() -> nn.Module:
    return Holds(torch.compile(tiny("distilbert")))


def dispatched() -> nn.Module:
    model = tiny("distilbert")
    add_hook_to_module(model.distilbert.transformer.layer[1].attention.q_lin, AlignDevicesHook())
    return model


def sharded() -> nn.Module:
    model = tiny("distilbert")
    fsdp = type("FSDPModule", (), {})  # what fully_shard puts among a module's base classes
    model.classifier.__class__ = type("FSDPLinear", (fsdp, nn.Linear), {})
    return model


def nested() -> nn.Module:
    model = tiny("distilbert")
    lora().attach(model)
    return Holds(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compiled, r"model was wrapped by torch\.compile.*model\.compile\(\)"),
        (
            dispatched,
            r"layer\.1\.attention\.q_lin: this Linear carries a forward of its own.*without device_map",
        ),
        (sharded, "classifier is sharded already"),
        (nested, "model has adapters of its own"),
    ],
)
def test_modules_that_cannot_be_adapted(make, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        lora().attach(module)
    assert registry(module) is None


def test_a_dispatched_base_parameter_is_refused_too():
    model = dispatched().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"q_lin: this Linear carries a forward of its own"):
        BitFit().attach(model)
    assert_same(snapshot(model), snapshot(tiny("distilbert").to(torch.bfloat16)))


# -------------------------------------------------------------------------- compiling, gradient checkpointing


def test_compiling_in_place_keeps_the_keys():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    lora(bias="all", target_modules="0").attach(model)
    keys, x = list(model.state_dict()), torch.randn(2, 8, dtype=torch.bfloat16)
    expected = model(x)
    model.compile(backend="aot_eager", fullgraph=True)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)


@THREE
def test_gradient_checkpointing_gives_the_same_gradients(name):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = tiny(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        LoRA(r=2, dropout=0.1, train_also=[HEADS[name]]).attach(model)
        with torch.no_grad():
            for key in sorted(trainable(model)):
                model.get_parameter(key).add_(0.1)
        torch.manual_seed(1)  # for dropout, which the second forward pass must draw again
        logits(model, name).square().sum().backward()
        return {key: model.get_parameter(key).grad for key in sorted(trainable(model))}

    plain, checkpointed = gradients(False), gradients(True)
    for key, gradient in plain.items():
        assert gradient.any(), key
        torch.testing.assert_close(checkpointed[key], gradient)
