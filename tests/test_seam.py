"""Methods as callbacks of real trainers: what trains, what a checkpoint holds, what is refused."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn
from toys import LORA_KEYS, Module, Net, adapters, fit, loader, saved, trainer
from toys import net_lora as lora

from lit_peft.core.active import set_active
from lit_peft.core.checkpoint import CheckpointMismatch, adapter_keys
from lit_peft.core.registry import registry
from lit_peft.methods import BitFit

# ------------------------------------------------------------------------------------------------ attaching


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_only_adapters_move(built, verb):
    module = Module(built)
    getattr(trainer(lora()), verb)(module, loader())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == LORA_KEYS == adapter_keys(module)
    base = {f"net.{key}": value for key, value in Net().state_dict().items()}
    state = module.state_dict()
    assert set(state) == set(base) | LORA_KEYS
    assert all(torch.equal(state[key], value) for key, value in base.items())
    assert all(state[key].any() == (verb == "fit") for key in LORA_KEYS if key.endswith("B"))
    assert (type(module).__module__, type(module).__qualname__) == ("toys", "Module")


def test_fit_test_fit_on_one_module_goes_on():
    module, method = Module(), lora()
    fit(module, method)
    first = adapters(module)
    trainer(method).test(module, loader(), verbose=False)
    assert all(torch.equal(first[key], value) for key, value in adapters(module).items())
    trainer().test(module, loader(), verbose=False)  # without the method: the adapters stay
    assert adapter_keys(module) == LORA_KEYS
    again = fit(module, method)
    assert again.global_step == 4
    assert all(not torch.equal(first[key], value) for key, value in adapters(module).items())
    twice = fit(Module(), lora(), max_epochs=1).lightning_module
    assert all(torch.equal(first[key], value) for key, value in adapters(twice).items())


def test_a_detached_module_is_a_plain_one_again(tmp_path):
    module, method = Module(), lora()
    run = fit(module, method)
    method.detach(module)
    run.save_checkpoint(tmp_path / "detached.ckpt")
    assert set(torch.load(tmp_path / "detached.ckpt")["state_dict"]) == set(Module().state_dict())
    assert fit(module).lightning_module.strict_loading and type(module) is Module
    run = fit(module, method)  # and it can be adapted again
    assert type(module) is not Module and adapter_keys(module) == LORA_KEYS


def test_two_methods_train_together():
    module = Module()
    run = fit(module, lora(), BitFit(name="biases"))
    assert set(registry(module).adapters) == {"default", "biases"}
    base = {f"net.{key}": value for key, value in Net().state_dict().items()}
    moved = {key for key, value in base.items() if not torch.equal(module.state_dict()[key], value)}
    assert moved == {f"net.{layer}.bias" for layer in ("first", "second", "head")}
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == 4 + 4
    outputs = trainer(lora(), BitFit(name="biases")).predict(module, loader())
    set_active(module, None)
    assert not torch.equal(module(loader().dataset[:4][0]), outputs[0])


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match="2 methods are named 'default'; give each"):
        fit(Module(), lora(), BitFit())
    module = Module()
    fit(module, lora())
    for other in (lora(r=4), BitFit()):
        with pytest.raises(ValueError, match=r"adapter 'default' already, another than .*: LoRA\(r=2, "):
            fit(module, other)
    fit(module, lora(dropout=0.5))  # may change


def test_weight_averaging_must_come_after_the_methods():
    for callbacks in ([lora(), StochasticWeightAveraging(0.01)], [EMAWeightAveraging(), lora()]):
        with pytest.raises(ValueError, match=r"WeightAveraging copies the module before the adapters are there"):
            fit(Module("setup"), *callbacks)
    plain, averaged = Module(), Module()
    fit(plain, lora())
    fit(averaged, lora(), EMAWeightAveraging(decay=0.5))
    assert all(not torch.equal(adapters(plain)[key], value) for key, value in adapters(averaged).items())


def test_copies_and_pickles_after_a_fit():
    module = Module()
    fit(module, lora())
    x = loader().dataset[:][0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
        assert twin.training_step(loader().dataset[:], 0).isfinite()  # with no trainer
        before = adapters(module)
        fit(twin, lora())
        assert all(torch.equal(before[key], value) for key, value in adapters(module).items())
        assert any(not torch.equal(before[key], value) for key, value in adapters(twin).items())


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_adapters_only(tmp_path, weights_only):
    module = Module("configure_model")
    fit(module, lora(train_also=["head"]), ModelCheckpoint(tmp_path, "best", save_weights_only=weights_only))
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert set(content["state_dict"]) == LORA_KEYS | {"net.head.weight", "net.head.bias"}
    assert ("optimizer_states" in content) is not weights_only
    assert content["lit_peft"]["methods"]["default"]["class_path"] == "lit_peft.methods.LoRA"
    assert set(content["lit_peft"]["fingerprint"]) == {
        f"net.{layer}.{x}" for layer in ("first", "second", "unused") for x in ("weight", "bias")
    }
    other = Module()
    run = trainer(lora(train_also=["head"]))
    losses = [run.test(m, loader(), p, verbose=False) for m, p in ((module, None), (other, tmp_path / "best.ckpt"))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("built", ["init", "configure_model"])
def test_resuming_equals_never_stopping(tmp_path, built):
    whole = Module(built)
    fit(whole, lora(), max_epochs=3)
    path = saved(tmp_path, Module(built), lora(), max_epochs=1)
    resumed = Module(built)
    run = fit(resumed, lora(), max_epochs=3, ckpt_path=path)
    assert run.global_step == 12
    groups = run.optimizers[0].param_groups
    assert [id(p) for group in groups for p in group["params"]] == [
        id(p) for p in resumed.parameters() if p.requires_grad
    ]
    assert {int(state["step"]) for state in run.optimizers[0].state.values()} == {12}
    for key, value in adapters(whole).items():
        assert torch.equal(value, adapters(resumed)[key]), key


class Foreign(Module):
    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.net.head = nn.Linear(8, 3)


def without(key: str):
    def change(content):
        del content["state_dict"][key]

    return change


def newer(content):
    content["lit_peft"]["format_version"] = 99


@pytest.mark.parametrize(
    ("module", "method", "change", "message"),
    [
        (Module(seed=1), lora(), None, r"belongs to another base model: net\.first\.weight holds other values"),
        (Foreign(), lora(), None, r"another base model: net\.head\.weight has shape 3x8, not 2x8, and 1 more of 8"),
        (Module(), BitFit(), None, r"made with lit_peft\.methods\.LoRA, not lit_peft\.methods\.BitFit"),
        (Module(), lora(r=4), None, r"made with LoRA\(r=2\), not 4"),
        (Module(), lora(alpha=9), None, r"made with LoRA\(alpha=None\), not 9"),
        (Module(), lora(target_modules=["first"]), None, r"LoRA\(target_modules=\['net\.first', 'net\.second'\]\)"),
        (Module(), lora(train_also=["head"]), None, r"LoRA\(train_also=\[\]\), not \['head'\]"),
        (Module(), lora(name="mine"), None, r"holds the adapters \['default'\], the module \['mine'\]"),
        (Module(), lora(), newer, "has format version 99; this release reads up to 1"),
        (
            Module(),
            lora(),
            without("net.first.peft.default.lora_A"),
            r"1 missing \(net\.first\.peft\.default\.lora_A\)",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, module, method, change, message):
    path = saved(tmp_path, Module(), lora())
    if change:
        content = torch.load(path)
        change(content)
        torch.save(content, path)
    with pytest.raises(CheckpointMismatch, match=message):
        trainer(method).test(copy.deepcopy(module), loader(), path, verbose=False)
    with pytest.raises(CheckpointMismatch, match=message):
        fit(copy.deepcopy(module), method, ckpt_path=path)


def test_what_may_change_may_change(tmp_path):
    path = saved(tmp_path, Module(), lora())
    trainer(lora(dropout=0.5, init="gaussian")).test(Module(), loader(), path, verbose=False)


def test_a_foreign_checkpoint_is_refused_and_ours_needs_its_method(tmp_path):
    path = saved(tmp_path, Module())
    with pytest.raises(CheckpointMismatch, match="was not written by a lit-peft method"):
        trainer(lora()).test(Module(), loader(), path, verbose=False)
    path = saved(tmp_path, Module(), lora())
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.first\.weight"):
        trainer().test(Module(), loader(), path, verbose=False)


def test_a_killed_save_leaves_the_old_file(tmp_path, monkeypatch):
    module = Module()
    run = fit(module, lora())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    old = path.read_bytes()

    def killed(content, file):
        file.write_bytes(old[: len(old) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_peft.training.seam.torch.save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


# ------------------------------------------------------------------------------------- precision and sharding


def test_sharding_comes_once_after_attaching_and_casting():
    class Sharded(Module):
        def shard(self, mesh):
            self.seen = [*getattr(self, "seen", []), {name: p.dtype for name, p in self.named_parameters()}]

    module = Sharded("configure_model")
    module._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: 1)}
    method = lora()
    fit(module, method, precision="bf16-true")
    trainer(method, precision="bf16-true").test(module, loader(), verbose=False)
    (seen,) = module.seen
    assert set(seen) >= LORA_KEYS and set(seen.values()) == {torch.bfloat16}  # FSDP2 refuses two in a unit


def test_bf16_true_trains_in_bfloat16():
    module = Module("configure_model")
    method = lora(train_also=["head"], adapter_dtype="auto")
    fit(module, method, precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(value.any() for value in adapters(module).values())
    assert not torch.equal(module.net.head.weight, Net().head.weight.bfloat16())


def test_bf16_mixed_trains_in_float32():
    module = Module()
    module.net.to(torch.bfloat16)
    fit(module, lora(train_also=["head"], bias="all"), precision="bf16-mixed")
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    assert {dtypes[key] for key in adapter_keys(module)} == {torch.float32}
    assert {dtypes[key] for key in set(dtypes) - adapter_keys(module)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "method", "message"),
    [
        ({"precision": "16-true"}, lora(), "16-true has no loss scaling"),
        ({"precision": "bf16-true"}, lora(adapter_dtype="float32"), "adapter_dtype float32 included; use bf16-mixed"),
        ({"plugins": []}, lora(), r"adapters and head included.* LoRA\(quantize='nf4'\)"),
    ],
)
def test_precisions_that_cannot_train_are_refused(arguments, method, message):
    run = trainer(method, **arguments)
    if "plugins" in arguments:  # its constructor asks for a GPU
        run.strategy.precision_plugin = object.__new__(BitsandbytesPrecision)
    with pytest.raises(ValueError, match=message):
        run.fit(Module(), loader())
