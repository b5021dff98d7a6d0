"""Several adapters on one base: each alone as it was, summed, weighted, switched off; heads travel with them."""

import copy
import itertools
import pickle
from fractions import Fraction

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from models import logits, tiny
from torch import nn
from toys import Module, Net, fit, loader, net_lora, trainer

import lit_peft
from lit_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    HiRA,
    LinearProbe,
    LoRA,
    PrefixTuning,
    SparseLoRA,
    VeRA,
)
from lit_peft.core.active import set_active
from lit_peft.core.attach import detach
from lit_peft.core.merge import merge, unmerge
from lit_peft.core.owned import values_of
from lit_peft.core.registry import registry
from lit_peft.faults import TrainingFault
from lit_peft.testing.states import assert_same, snapshot

HEAD = ["pre_classifier", "classifier"]
TARGETS = ["q_lin", "v_lin"]
METHODS = {
    "lora": LoRA(r=4, dropout=0.0, target_modules=TARGETS, train_also=HEAD),
    "wide": LoRA(r=8, dropout=0.0, target_modules=[*TARGETS, "lin1"], train_also=HEAD, bias="lora_only"),
    "dora": DoRA(r=2, dropout=0.0, target_modules=TARGETS, train_also=HEAD),
    "hira": HiRA(r=2, dropout=0.0, target_modules=["k_lin"], train_also=HEAD),
    "ia3": IA3(train_also=HEAD),
    "vera": VeRA(r=8, dropout=0.0, target_modules=TARGETS, train_also=HEAD),
    "sparse": SparseLoRA("magnitude", r=4, dropout=0.0, target_modules=TARGETS, train_also=HEAD),
    "adalora": AdaLoRA(target_r=2, init_r=3, dropout=0.0, target_modules=TARGETS, train_also=HEAD),
    "bottleneck": BottleneckAdapter(reduction_factor=4, train_also=HEAD),
    "prefix": PrefixTuning(num_virtual_tokens=3, train_also=HEAD),
    "bitfit": BitFit(train_also=HEAD),
    "probe": LinearProbe(train_also=HEAD),
}
ADDING = ["lora", "hira", "vera", "sparse", "adalora"]


def shifted(module: nn.Module, seed: int) -> None:
    """Moves what trains, each adapter to values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:  # random models hardly hear a change of their attention
                step = 0.5 if ".peft." in name else 0.1
                parameter.add_(step * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[str, torch.Tensor]]:
    """The folder of each method, trained alone on its own copy of the base, and its logits there."""
    made = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        model = tiny("distilbert")
        method.attach(model)
        shifted(model, seed)
        made[name] = str(lit_peft.save(model.eval(), tmp_path_factory.mktemp(name))), logits(model, "distilbert")
    return made


@pytest.fixture(scope="module")
def whole(folders) -> nn.Module:
    """All of them on one base."""
    model = tiny("distilbert")
    for name, (folder, _) in folders.items():
        lit_peft.load(model, folder, name)
        assert registry(model).active == (name,)
    return model


@pytest.fixture
def model(whole) -> nn.Module:
    """A copy of that."""
    return copy.deepcopy(whole)


def test_each_alone_is_what_it_was_and_none_is_the_base(model, folders):
    base, order = logits(tiny("distilbert"), "distilbert"), [*folders, *reversed(folders)]
    for name in order:
        set_active(model, name)
        assert torch.equal(logits(model, "distilbert"), folders[name][1]), name
        set_active(model, None)
        assert torch.equal(logits(model, "distilbert"), base)
    outputs = [output for _, output in folders.values()]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations([base, *outputs], 2))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin, name in itertools.product(copies, ("wide", "bitfit")):
        set_active(twin, name)
        assert torch.equal(logits(twin, "distilbert"), folders[name][1])


def test_what_trains_is_what_runs(model):
    for names in (["lora"], ["bitfit"], ["wide", "ia3"], None):
        set_active(model, names, head="wide" if names == ["wide", "ia3"] else None)
        expected = registry(model).trainable_names()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert bool(expected) == bool(names)


def test_an_adapter_that_does_not_run_is_saved_as_it_was(model, folders, tmp_path):
    set_active(model, ["hira", "lora"], head="hira")
    logits(model, "distilbert").sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before, expected = snapshot(model), logits(model, "distilbert")
    for name in folders:
        twin = tiny("distilbert")
        lit_peft.load(twin, lit_peft.save(model, tmp_path / name, name))
        assert torch.equal(logits(twin, "distilbert"), folders[name][1]), name
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "distilbert"), expected)
    assert registry(model).active == ("hira", "lora") and registry(model).head == "hira"
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)


def test_detaching_in_any_order_leaves_the_others_and_at_last_the_base(model, folders):
    names = list(folders)
    for i, name in enumerate(names[::2] + names[1::2]):
        set_active(
            model, names[(i * 5) % len(names)] if names[(i * 5) % len(names)] in registry(model).adapters else None
        )
        detach(model, name)
        left = registry(model)
        if left is None:
            break
        survivor = list(left.adapters)[i % len(left.adapters)]
        set_active(model, survivor)
        assert torch.equal(logits(model, "distilbert"), folders[survivor][1]), (name, survivor)
    assert registry(model) is None
    fresh = tiny("distilbert")
    assert_same(snapshot(model), snapshot(fresh))
    assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("names", list(itertools.combinations(ADDING, 2)), ids="+".join)
def test_a_sum_is_the_same_in_any_order_and_merging_in_turn(names, model):
    set_active(model, names, head=names[0])
    summed = logits(model, "distilbert")
    set_active(model, names[::-1], head=names[0])
    assert torch.equal(logits(model, "distilbert"), summed)
    set_active(model, names[0])
    alone = logits(model, "distilbert")
    assert (summed - alone).abs().max() > 1e-3
    # Merging both, one after the other, the second as the change that it makes of the base.
    W = {path: layer.weight.detach().clone() for path, layer in base_layers(tiny("distilbert")).items()}
    total = {path: weight.clone() for path, weight in W.items()}
    for name in names:
        merge(model, name)
        for path, layer in base_layers(model).items():
            total[path] += layer.weight.detach() - W[path]
        unmerge(model)
    merge(model, names, head=names[0])
    for path, layer in base_layers(model).items():
        torch.testing.assert_close(layer.weight.detach(), total[path], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, "distilbert"), summed, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, "distilbert"), alone)  # what ran before the merge


def base_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if path.endswith(("q_lin", "k_lin", "v_lin", "lin1"))}


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("weight", [0.3, -1.5, 0])
def test_a_weight_scales_the_change_of_each_layer(name, weight, model):
    set_active(model, {name: weight})
    weighted = logits(model, "distilbert")
    merge(model)
    torch.testing.assert_close(logits(model, "distilbert"), weighted, rtol=1e-4, atol=1e-5)
    W = base_layers(tiny("distilbert"))
    part = {path: layer.weight - W[path].weight for path, layer in base_layers(model).items()}
    unmerge(model)
    merge(model, name)
    for path, layer in base_layers(model).items():
        torch.testing.assert_close(part[path], weight * (layer.weight - W[path].weight), rtol=1e-4, atol=1e-6)
    unmerge(model)
    assert registry(model).running().weights == {name: weight}


def test_weights_train_copy_and_compile(model):
    set_active(model, {"lora": 0.5, "hira": 2.0}, head="lora")
    expected = logits(model, "distilbert")
    assert torch.equal(logits(copy.deepcopy(model), "distilbert"), expected)
    logits(model, "distilbert").square().sum().backward()
    half = model.distilbert.transformer.layer[0].attention.q_lin.peft["lora"].lora_B.grad.clone()
    assert half.abs().max() > 0
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, "distilbert"), expected, rtol=1e-5, atol=1e-6)
    for name in ("wide", None, "bitfit"):
        set_active(compiled, name)
        set_active(model, name)
        torch.testing.assert_close(logits(compiled, "distilbert"), logits(model, "distilbert"), rtol=1e-5, atol=1e-6)
    set_active(model, {"lora": 0.0, "hira": 0.0}, head="lora")
    head_only = logits(model, "distilbert")
    set_active(model, "lora")
    assert not torch.equal(logits(model, "distilbert"), head_only)


# ------------------------------------------------------------------------------------ what does not compose


@pytest.mark.parametrize(
    ("names", "arguments", "error", "message"),
    [
        ("lroa", {}, KeyError, r"No adapter is named 'lroa'; this module has \[.*\]\. Did you mean 'lora'\?"),
        (["dora", "ia3"], {"head": "dora"}, ValueError, r"v_lin: adapters \['dora', 'ia3'\] both rescale this weight"),
        (["lora", "hira"], {}, ValueError, "'lora' and 'hira' have both trained or moved .*, head='hira'"),
        (
            ["lora", "hira"],
            {"head": "ia3"},
            ValueError,
            "head: 'ia3' is not among the adapters that are to run, lora",
        ),
        (
            {"dora": 0.5},
            {},
            ValueError,
            "adapter 'dora' rescales its layers instead of adding to them, and has",
        ),
        ({"bottleneck": 0.5}, {}, ValueError, "adapter 'bottleneck' is no change of a weight, and has no weighted sum"),
        ({"wide": 0.5}, {}, ValueError, r"'wide' trains distilbert\..*bias of the base itself, which has no weighted"),
        ({"probe": 0.5}, {}, ValueError, r"'probe' trains classifier\.bias of the base itself"),
        (["lora", "lora"], {}, ValueError, r"Adapter 'lora' is named twice; to count it twice, \{'lora': 2\}"),
        ({"lora": float("nan")}, {}, ValueError, "weight of adapter 'lora' must be a finite number, not nan"),
        ({"lora": "1"}, {}, ValueError, "weight of adapter 'lora' must be a finite number, not '1'"),
    ],
)
def test_what_does_not_compose_is_refused_and_nothing_changes(names, arguments, error, message, model):
    set_active(model, {"sparse": 0.5})
    before, expected = snapshot(model), logits(model, "distilbert")
    with pytest.raises(error, match=message):
        set_active(model, names, **arguments)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "distilbert"), expected)
    assert registry(model).running().weights == {"sparse": 0.5}


def test_a_base_that_is_gone_cannot_be_switched_to():
    model = tiny("distilbert")
    FullFineTuning(name="full").attach(model)
    with pytest.raises(
        ValueError, match=r"'full' has trained .* keeps no copy of the base: .*detach\(module, 'full'\)"
    ):
        set_active(model, None)
    shifted(model, 0)
    expected = logits(model, "distilbert")
    detach(model, "full")
    assert torch.equal(logits(model, "distilbert"), expected)


def test_names_that_modules_have_are_refused():
    for name in ("active", "keys", "weighted", "forward"):
        with pytest.raises(ValueError, match=f"Adapter name '{name}' is taken"):
            LoRA(target_modules="first", name=name, r=2).attach(Net())


# ---------------------------------------------------------------------------------------------- dtypes, buffers


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_comes_back_whatever_the_dtypes(base, dtype):
    model = tiny("distilbert").to(base)
    before = logits(model, "distilbert")
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        set_active(model, None)
        BitFit(train_also=HEAD, adapter_dtype=dtype, name=name).attach(model)
        shifted(model, seed)
        outputs[name] = logits(model, "distilbert")
    for name in ("one", "two", "one"):
        set_active(model, None)
        assert torch.equal(logits(model, "distilbert"), before)
        set_active(model, name)
        assert torch.equal(logits(model, "distilbert"), outputs[name])
    assert not torch.equal(outputs["one"], outputs["two"])


class Counting(nn.Module):
    """A net with batch norm, a frozen counter of its own and a moving average, in front of a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.head(x - self.average)


def test_buffers_that_moved_travel_too(tmp_path):
    x, model = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), Counting()
    base, outputs = model.eval()(x), {}
    for seed, name in enumerate(("one", "two")):
        set_active(model, None)
        LoRA(r=2, target_modules="first", train_also=["head"], update_norm_stats=True, name=name).attach(model)
        shifted(model, seed)
        model.train()(x * (seed + 2))
        outputs[name] = model.eval()(x)
    for name in ("one", "two"):
        set_active(model, name)
        assert torch.equal(model(x), outputs[name])
        assert {"average", "norm.running_mean", "head.weight"} <= values_of(model, name).keys()
        set_active(model, None)
        assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="'one' and 'two' have both trained or moved"):
        set_active(model, ["one", "two"])
    set_active(model, ["one", "two"], head="two")
    averages = model.average.clone()
    set_active(model, "two")
    assert torch.equal(model.average, averages)
    for name, output in outputs.items():
        twin = Counting()
        lit_peft.load(twin.eval(), lit_peft.save(model, tmp_path / name, name))
        assert torch.equal(twin(x), output)
    detach(model)
    assert torch.equal(model(x), base)


# ------------------------------------------------------------------------------------------------ in trainers


def test_fits_in_turn_train_one_adapter_each(tmp_path, capsys):
    module, x = Module(), loader().dataset[:][0]
    module.eval()
    base, outputs = module(x), {}
    for name in ("one", "two"):
        run = fit(module, net_lora(name=name, train_also="net.head"))
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        outputs[name] = module.eval()(x)
    # The second began at the base: as if the first had never been there.
    alone = Module()
    fit(alone, net_lora(name="two", train_also="net.head"))
    assert torch.equal(alone.eval()(x), outputs["two"])
    set_active(module, None)
    assert torch.equal(module(x), base)
    # Each checkpoint holds its own adapter, and is loaded in a module that has both.
    for name in ("one", "two"):
        keys = torch.load(tmp_path / f"{name}.ckpt")["state_dict"]
        assert {"net.head.weight", f"net.first.peft.{name}.lora_A"} <= keys.keys() and len(keys) == 6
        trainer(net_lora(name=name, train_also="net.head")).test(
            module, loader(), tmp_path / f"{name}.ckpt", verbose=False
        )
        assert registry(module).active == (name,)
        assert torch.equal(module.eval()(x), outputs[name])
    # A fit of the one that does not run lets it run.
    fit(module, net_lora(name="one", train_also="net.head"), max_steps=1)
    assert registry(module).active == ("one",)
    set_active(module, "two")
    assert torch.equal(module.eval()(x), outputs["two"])


def test_an_adapter_below_the_one_that_trains_is_frozen(tmp_path):
    module, x = Module(), loader().dataset[:][0]
    fit(module, net_lora(name="below"))
    frozen = {k: v.clone() for k, v in module.state_dict().items() if ".peft.below." in k}
    method = net_lora(name="top", train_also="net.head")
    method.attach(module)
    assert registry(module).active == ("below", "top")
    run = fit(module, method)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in frozen.items())
    assert registry(module).frozen == {"below"}
    run.save_checkpoint(tmp_path / "both.ckpt")
    twin = Module()
    lit_peft.load(twin, tmp_path / "both.ckpt")
    assert torch.equal(twin.eval()(x), module.eval()(x))
    set_active(module, "below")
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(frozen)


def test_weights_are_in_a_checkpoint(tmp_path):
    module, x = Module(), loader().dataset[:][0]
    run = fit(module, net_lora(name="one"), net_lora(name="two"))
    set_active(module, {"two": 0.25, "one": 1.0})
    run.save_checkpoint(tmp_path / "sum.ckpt")
    twin = Module()
    lit_peft.load(twin, tmp_path / "sum.ckpt")
    assert registry(twin).running().weights == {"two": 0.25, "one": 1.0}
    assert torch.equal(twin.eval()(x), module.eval()(x))
    set_active(module, None)
    with pytest.raises(ValueError, match=r"runs none of its adapters.*set_active\(module, \['one', 'two'\]\)"):
        run.save_checkpoint(tmp_path / "none.ckpt")


def test_loading_that_fails_leaves_what_ran(folders, tmp_path):
    model = tiny("distilbert")
    lit_peft.load(model, folders["lora"][0], "lora")
    lit_peft.load(model, folders["hira"][0], "hira")
    set_active(model, {"lora": 0.5, "hira": 1.0}, head="hira")
    before, expected = snapshot(model), logits(model, "distilbert")
    other = tiny("distilbert", seed=1)
    LoRA(r=2, target_modules="q_lin").attach(other)
    with pytest.raises(ValueError, match="belongs to another base"):
        lit_peft.load(model, lit_peft.save(other, tmp_path / "other"), "other")
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "distilbert"), expected)
    assert registry(model).running().weights == {"lora": 0.5, "hira": 1.0}


# ------------------------------------------------------------------------- from a cold reading: what runs comes back


class Headed(Module):
    """With a moving average of its own, which no adapter names, and the head that every method trains."""

    train_also = ("net.head",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.average.lerp_(y.detach().mean(0), 0.1)
        return y - self.average


def test_what_lies_below_keeps_its_own_head_and_buffers(tmp_path):
    module, x = Headed(), loader().dataset[:][0]
    fit(module, net_lora(name="below"), max_epochs=2)
    below = module.eval()(x)
    method = net_lora(name="top")
    method.attach(module)
    run = fit(module.train(), method)
    run.save_checkpoint(tmp_path / "both.ckpt")
    both = module.eval()(x)
    for other in (module, Headed()):
        if other is not module:
            lit_peft.load(other.eval(), tmp_path / "both.ckpt")
        assert torch.equal(other(x), both)
        set_active(other, "below")
        assert torch.equal(other(x), below)
        set_active(other, ["below", "top"], head="top")
        assert torch.equal(other(x), both)
        with pytest.raises(ValueError, match="to different values, which make no sum"):
            set_active(other, ["below", "top"])


def heads() -> Module:
    """Two adapters with heads and additions of their own, of which none runs."""
    module = Module()
    for seed, name in enumerate("ab"):
        fit(module, net_lora(name=name, train_also="net.head"), max_steps=1)
        shifted(module, seed)
    set_active(module, None)
    return module.eval()


@pytest.mark.parametrize(
    ("saved", "then"),
    [
        ({"a": 0.7, "b": 0.3}, ["a", "b"]),
        (["a", "b"], {"a": 0.5, "b": 0.5}),
        (["a", "b"], None),
        (["b", "a"], "b"),
    ],
)
@pytest.mark.parametrize("head", "ab")
def test_a_checkpoint_brings_back_weights_order_and_heads(saved, then, head, tmp_path):
    module, x = heads(), loader().dataset[:][0]
    alone = {}
    for name in "ab":
        set_active(module, name)
        alone[name] = module(x)
    set_active(module, saved, head=head)
    expected = module(x), registry(module).running()
    run = trainer()
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "sum.ckpt")
    set_active(module, then, head="b" if then == ["a", "b"] or isinstance(then, dict) else None)
    run.validate(module, loader(), tmp_path / "sum.ckpt", verbose=False)
    twin = Module().eval()
    lit_peft.load(twin, tmp_path / "sum.ckpt")
    for other in (module, twin):
        assert torch.equal(other.eval()(x), expected[0])
        assert registry(other).running() == expected[1]
        assert list(registry(other).running().weights) == list(expected[1].weights)
        for name in "ab":
            set_active(other, name)
            assert torch.equal(other(x), alone[name])


def test_a_merge_folds_the_head_that_is_named_and_unmerge_brings_back_what_ran():
    module, x = heads(), loader().dataset[:][0]
    set_active(module, {"a": 0.5, "b": 1.0}, head="a")
    before, output = registry(module).running(), module(x)
    merge(module, head="b")
    own = module.net.head.weight.clone()
    unmerge(module)
    assert registry(module).running() == before and torch.equal(module(x), output)
    set_active(module, "b")
    assert torch.equal(own, module.net.head.weight)
    with pytest.raises(KeyError, match="No adapter is named 'zzz'"):
        merge(module, head="zzz")


class Looks(pl.Callback):
    """Looks at other adapters in the middle of a fit."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.look(module)


def at_the_base(module) -> None:
    with lit_peft.running(module, None):
        assert registry(module).active == ()
        module(loader().dataset[:][0])


def test_a_fit_may_look_at_other_adapters_and_goes_on_as_if_it_had_not():
    states = []
    for callbacks in ([], [Looks(at_the_base)]):
        torch.manual_seed(0)
        module = Module()
        net_lora(name="below", train_also="net.head").attach(module)
        method = net_lora(name="top", train_also="net.head")
        method.attach(module)
        fit(module, method, *callbacks, accumulate_grad_batches=3, max_epochs=2)
        assert registry(module).frozen == {"below"}
        states.append(snapshot(module))
    assert_same(*states)


@pytest.mark.parametrize(
    "look", [lambda m: set_active(m, "other"), lambda m: set_active(m, None), lambda m: detach(m, "mine")]
)
def test_a_fit_whose_adapter_ceases_to_train_ends_with_a_sentence(look):
    module = Module()
    net_lora(name="other").attach(module)
    with pytest.raises(TrainingFault, match=r"'mine' has ceased to train in the middle of .*lit_peft\.running"):
        fit(module, net_lora(name="mine"), Looks(look))


def test_a_fit_on_top_of_a_frozen_adapter_resumes(tmp_path):
    def stacked() -> tuple[Module, LoRA]:
        module = Module()
        net_lora(name="below", train_also="net.head").attach(module)
        shifted(module, 1)
        method = net_lora(name="top", train_also="net.head")
        method.attach(module)
        return module, method

    module, method = stacked()
    fit(module, method, max_epochs=2)
    half, method = stacked()
    fit(half, method).save_checkpoint(tmp_path / "half.ckpt")
    for ran in (["below", "top"], "top", "below", None):
        again, method = stacked()
        set_active(again, ran, head="top" if ran == ["below", "top"] else None)
        fit(again, method, ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
        assert_same(snapshot(again), snapshot(module))
        set_active(again, "below")
        set_active(module, "below")
        assert_same(snapshot(again), snapshot(module))
        set_active(module, ["below", "top"], head="top")


def test_averages_and_whole_state_dicts_beside_an_adapter_that_does_not_run(tmp_path):
    module = Module()
    fit(module, net_lora(name="first"))
    whole = snapshot(module)
    method, average = net_lora(name="second"), pl.callbacks.EMAWeightAveraging()
    run = fit(module, method, average)
    run.save_checkpoint(tmp_path / "ema.ckpt")
    for verb in ("test", "fit"):
        again = trainer(method, pl.callbacks.EMAWeightAveraging(), max_epochs=2)
        getattr(again, verb)(module, loader(), ckpt_path=tmp_path / "ema.ckpt")
    now = snapshot(module)
    module.load_state_dict(now)
    assert all(torch.equal(now[key], whole[key]) for key in whole)
    with pytest.raises(ValueError, match=r"without a place for it, net\.first\.peft\.third\.lora_A"):
        module.load_state_dict({key.replace(".second.", ".third."): value for key, value in now.items()} | now)


def test_a_failed_start_leaves_what_ran(monkeypatch, tmp_path):
    module = Module()
    net_lora(name="one", train_also="net.head").attach(module)
    shifted(module, 0)
    before, folder = snapshot(module), lit_peft.save(module, tmp_path, "one")
    with pytest.raises(ValueError, match="nosuch"):
        fit(module, net_lora(name="two", target_modules="nosuch"))
    monkeypatch.setattr("lit_peft.saving.folder.fill_base", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lit_peft.load(module, folder, "two")
    assert registry(module).active == ("one",) and list(registry(module).adapters) == ["one"]
    assert_same(snapshot(module), before)


def test_adapters_loaded_in_inference_mode_switch_and_train(folders):
    model = tiny("distilbert")
    with torch.inference_mode():
        for name in ("lora", "prefix"):
            lit_peft.load(model, folders[name][0], name)
    set_active(model, "lora")
    assert torch.equal(logits(model, "distilbert"), folders["lora"][1])
    logits(model, "distilbert").sum().backward()
    set_active(model, "prefix")
    assert torch.equal(logits(model, "distilbert"), folders["prefix"][1])


def test_folders_and_checkpoints_come_again_in_other_trainers(tmp_path):
    module = heads()
    set_active(module, ["a", "b"], head="a")
    run = trainer()
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "two.ckpt")
    folder, fresh = lit_peft.save(module, tmp_path / "a", "a"), Module()
    for _ in range(2):
        for path, name, active in ((tmp_path / "two.ckpt", "default", ("a", "b")), (folder, "c", ("c",))):
            fresh.net.first.requires_grad_(False)
            trainer(lit_peft.AdapterFolder(str(path), name)).test(fresh, loader(), verbose=False)
            if not set(active) <= set(registry(fresh).active):
                set_active(fresh, active, head="a" if "a" in active else None)
    assert set(registry(fresh).adapters) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["default", "a"])
def test_all_of_a_checkpoint_run_also_where_one_has_the_name_that_the_folder_has(name, tmp_path):
    module = heads()
    set_active(module, ["a", "b"], head="a")
    run, fresh = trainer(), Module()
    (expected,) = run.test(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "two.ckpt")
    (found,) = trainer(lit_peft.AdapterFolder(str(tmp_path / "two.ckpt"), name)).test(fresh, loader(), verbose=False)
    assert registry(fresh).active == ("a", "b") and found == expected


def test_one_of_several_whose_head_counted_is_detached():
    module = heads()
    set_active(module, None)
    net_lora(name="c", train_also="net.head").attach(module)
    shifted(module, 7)
    set_active(module, ["a", "b", "c"], head="c")
    detach(module, "c")
    assert registry(module).active == ("a", "b")
    for name in "ab":
        values = values_of(module, name)["net.head.weight"].clone()
        set_active(module, name)
        assert torch.equal(module.net.head.weight, values)


def test_numbers_of_any_kind_are_weights():
    module = heads()
    for half in (np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)):
        set_active(module, {"a": half})
        assert registry(module).weights == {"a": 0.5}
