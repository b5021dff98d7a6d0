"""`lit_peft.combine`: its algebra, its masks, adapters of other kinds, and what it refuses.

See test_combine_hf_peft.py for the oracle and test_combined_adapter.py for what comes of it.
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lit_peft
from lit_peft import IA3, AdaLoRA, BitFit, BottleneckAdapter, DoRA, HiRA, LoRA, SparseLoRA, VeRA, combine, set_active
from lit_peft.core.active import Adapted
from lit_peft.core.combination import (
    Factors,
    draw_keep,
    drop,
    merge_disjoint,
    nearest_of_rank,
    trim,
    truncate,
)
from lit_peft.core.layers import layer_ops
from lit_peft.core.merge import merge, unmerge
from lit_peft.core.registry import registry
from lit_peft.testing.conformance import assert_same, snapshot
from lit_peft.testing.subjects import LAYERS, MODELS, holder, layer_input


def perturb(module: nn.Module, seed: int = 1) -> None:
    """Gives every tensor of an adapter, and other trained parameters a little, values of the size training gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.add_((0.5 if ".peft." in name else 0.1) * torch.randn(p.shape, generator=generator).to(p.dtype))


def change(module: nn.Module, path: str, name: str) -> torch.Tensor:
    """What one adapter adds to the weight of a layer, [out, in]: by its equation, not by its factors."""
    layer = module.get_submodule(path)
    out, in_ = layer_ops(layer).size(layer)
    return layer.peft[name].weight(torch.zeros(out, in_)).detach()


def changes(module: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {path: change(module, path, name) for path in registry(module).adapters[name].sites}


# ------------------------------------------------------------------------------------------------- algebra


def on_layer(kind: str, *methods) -> nn.Module:
    module = holder(kind)
    for method in methods:
        method.attach(module)
    perturb(module)
    return module


def layer_lora(name: str, r: int, **arguments) -> LoRA:
    return LoRA(**{"r": r, "alpha": 3.0, "dropout": 0.0, "target_modules": "layer", "name": name} | arguments)


@pytest.mark.parametrize("kind", LAYERS)
def test_linear_adds_up_on_every_layer_type(kind):
    module, x = on_layer(kind, layer_lora("a", 3), layer_lora("b", 5, use_rslora=True)), layer_input(kind)
    expected = 0.5 * change(module, "layer", "a") - 2 * change(module, "layer", "b")
    before = snapshot(module)
    set_active(module, ["a", "b"])
    both = module(x)
    adapter = combine(module, {"a": 0.5, "b": -2}, "mix")
    torch.testing.assert_close(change(module, "layer", "mix"), expected, rtol=1e-5, atol=1e-6)
    assert registry(module).active == ("mix",) and adapter.prepared and adapter.spec["init_args"]["r"] == 8
    combine(module, ["a", "b"], "sum")
    torch.testing.assert_close(module(x), both, rtol=1e-4, atol=1e-5)
    lit_peft.detach(module, "mix")
    lit_peft.detach(module, "sum")
    assert_same(snapshot(module), before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_linear_equals_the_sum_and_merging_in_turn(ranks, weights, seed):
    module = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 12))
    names = [f"n{i}" for i in range(len(ranks))]
    for i, r in enumerate(ranks):
        LoRA(r=min(r, 6), dropout=0.0, target_modules=["0", "2"][i % 2 :], name=names[i]).attach(module)
    perturb(module, seed)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    set_active(module, names)
    both = module(x)
    combine(module, names, "sum")
    torch.testing.assert_close(module(x), both, rtol=1e-4, atol=1e-4)
    merge(module)
    torch.testing.assert_close(module(x), both, rtol=1e-4, atol=1e-4)
    unmerge(module)
    given_weights = dict(zip(names, weights, strict=False))
    set_active(module, given_weights)
    both = module(x)
    combine(module, given_weights, "mix")
    torch.testing.assert_close(module(x), both, rtol=1e-4, atol=1e-4)
    for path, found in changes(module, "mix").items():
        here = [n for n in names if path in registry(module).adapters[n].sites]
        expected = sum(given_weights[n] * change(module, path, n) for n in here)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(module.get_submodule(path).peft["mix"].lora_A) <= 6


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_alone_is_itself_bit_for_bit(kind, rslora):
    module, x = on_layer(kind, layer_lora("a", 3, use_rslora=rslora)), layer_input(kind)
    expected = module(x)
    combine(module, ["a"], "new")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", ["ties", "dare", "dare_ties"])
@pytest.mark.parametrize("on", ["change", "factors"])
def test_one_adapter_of_which_all_stays_is_itself(kind, on):
    module, x = on_layer("linear", layer_lora("a", 3)), layer_input("linear")
    expected = module(x)
    combine(module, ["a"], "new", kind, density=1.0, on=on)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_and_its_opposite_change_nothing_and_so_do_zeros():
    module, x = on_layer("linear", layer_lora("a", 3), layer_lora("b", 3)), layer_input("linear")
    set_active(module, None)
    base = module(x)
    for i, (weights, arguments) in enumerate(
        [
            ({"a": 0, "b": 0}, {}),
            ({"a": 0.0}, {}),
            ({"a": 0, "b": -0.0}, {"r": 2}),
            ({"a": 0, "b": 0}, {"kind": "ties", "density": 0.5}),
            ({"a": 0, "b": 0}, {"kind": "dare_ties", "density": 0.5, "on": "factors"}),
        ]
    ):
        combine(module, weights, f"zero{i}", **arguments)
        assert torch.equal(module(x), base)
    combine(module, {"a": 1}, "twin")
    combine(module, {"a": 2, "twin": -2}, "none")
    torch.testing.assert_close(module(x), base, rtol=1e-4, atol=1e-4)


def test_the_nearest_of_a_rank_is_numpys():
    generator = torch.Generator().manual_seed(0)
    for out, in_, rank in ((9, 14, 6), (14, 9, 9), (5, 7, 11)):
        A, B = torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator)
        exact = (0.7 * B @ A).double().numpy()
        U, S, Vh = np.linalg.svd(exact, full_matrices=False)
        expected = torch.from_numpy((U[:, :3] * S[:3]) @ Vh[:3]).float()
        for found in (truncate(Factors(A, B, 0.7), 3), nearest_of_rank(0.7 * B @ A, 3)):
            assert found.A.shape == (3, in_) and found.B.shape == (out, 3)
            torch.testing.assert_close(found.change(), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_is_no_larger_than_a_layer_or_the_sum_of_ranks():
    module = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 12))
    for name in "abc":
        LoRA(r=3, dropout=0.0, target_modules=["0", "1"] if name != "c" else ["1"], name=name).attach(module)
    perturb(module)
    ranks = lambda name: [len(layer.peft[name].lora_A) for layer in module]  # noqa: E731
    combine(module, list("abc"), "exact")
    assert ranks("exact") == [4, 9]
    combine(module, list("abc"), "wide", r=8)
    assert ranks("wide") == [4, 8]
    combine(module, list("ab"), "all", r=100)
    assert ranks("all") == [4, 6]
    combine(module, list("ab"), "ties", "ties", density=0.5, r=100)
    assert ranks("ties") == [4, 9]
    combine(module, list("ab"), "largest", "ties", density=0.5)
    assert ranks("largest") == [3, 3]
    torch.testing.assert_close(changes(module, "all")["0"], changes(module, "exact")["0"], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- masks


def test_what_dare_drops():
    keep = draw_keep((400, 500), 0.3, "0/a/layer")
    assert abs(keep.float().mean() - 0.3) < 0.005
    assert draw_keep((400, 500), 1.0, "x").all()
    T = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)).abs()
    dropped = drop(T, keep, 0.3)
    assert abs(dropped.mean() / T.mean() - 1) < 0.02
    torch.testing.assert_close(dropped[keep], T[keep] / 0.3)
    assert not dropped[~keep].any()


def test_masks_come_from_the_seed_alone():
    def combined(seed: int, *order: str) -> torch.Tensor:
        module = on_layer("linear", layer_lora("a", 3), layer_lora("b", 3))
        torch.manual_seed(seed + 100)
        state = torch.get_rng_state()
        with torch.device("meta" if order == ("b", "a") else "cpu"):
            combine(module, order, "new", "dare_ties", density=0.5, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return change(module, "layer", "new")

    first = combined(0, "a", "b")
    torch.testing.assert_close(combined(0, "b", "a"), first)
    assert torch.equal(combined(0, "a", "b"), first)
    assert (combined(1, "a", "b") - first).abs().max() > 0.1
    assert not torch.equal(draw_keep((5, 9), 0.5, "0/a/layer"), draw_keep((5, 9), 0.5, "0/b/layer"))


def test_trimming_keeps_the_largest():
    T = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    assert trim(T, 0.5).tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    assert not trim(T, 0.1).any()  # of six entries int(.6) stay, as in HF PEFT


def test_disjoint_means_by_hand():
    T = [torch.tensor([1.0, -2.0, 0.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 2.0, -1.0, 0.0])]
    assert merge_disjoint(T, [1.0, 1.0], "total").tolist() == [2.0, -2.0, 2.0, 1.0, 0.0]
    assert merge_disjoint(T, [1.0, 1.0], "frequency").tolist() == [2.0, 1.0, 2.0, 1.0, 0.0]
    assert merge_disjoint(T, [2.0, -1.0], "total").tolist() == [-0.5, -4.0, -2.0, 2.0, 0.0]


# --------------------------------------------------------------------------------- adapters of other kinds


@pytest.mark.parametrize("sparsity", ["structured", "magnitude", "l1"])
def test_pruned_adapters_combine_without_what_is_gone(sparsity):
    sparse = SparseLoRA(sparsity, r=4, dropout=0.0, target_modules="layer", name="s")
    module = on_layer(
        "linear", layer_lora("a", 3), AdaLoRA(init_r=5, target_r=2, target_modules="layer", name="d"), sparse
    )
    delta, ada = module.layer.peft["s"], module.layer.peft["d"]
    with torch.no_grad():
        for mask in delta.masks():
            mask[:2] = False
        delta.mask(delta.sparse())
        ada.kept[1:4] = False
        ada.mask()
    expected = 2 * change(module, "layer", "s") + change(module, "layer", "d") - change(module, "layer", "a")
    combine(module, {"s": 2, "d": 1, "a": -1}, "new")
    torch.testing.assert_close(change(module, "layer", "new"), expected, rtol=1e-4, atol=1e-5)
    gone = {"structured": 2, "magnitude": 2, "l1": 2}[sparsity]
    assert len(module.layer.peft["new"].lora_A) == 3 + (4 - gone) + 2
    assert type(module.layer.peft["new"]).__name__ == "LoRADelta"
    combine(module, {"s": 1}, "alone")
    torch.testing.assert_close(change(module, "layer", "alone"), change(module, "layer", "s"), rtol=1e-5, atol=1e-6)


def test_a_layer_that_has_lost_all_ranks_keeps_one_that_can_train():
    module = on_layer("linear", AdaLoRA(init_r=3, target_r=1, target_modules="layer", name="d"))
    delta = module.layer.peft["d"]
    with torch.no_grad():
        delta.kept[:] = False
        delta.mask()
    combine(module, ["d"], "new")
    new = module.layer.peft["new"]
    assert len(new.lora_A) == 1 and not change(module, "layer", "new").any()
    module(layer_input("linear")).square().sum().backward()
    assert new.lora_A.grad.any()


OTHERS = {
    "DoRA": (lambda: DoRA(r=2, target_modules="first", name="x"), "it rescales the weight"),
    "IA3": (lambda: IA3(target_modules="first", feedforward_modules=[], name="x"), "it rescales the weight"),
    "HiRA": (lambda: HiRA(r=2, target_modules="first", name="x"), "its change is not LoRA's, s B A"),
    "VeRA": (lambda: VeRA(r=8, target_modules="first", name="x"), "its change is not LoRA's, s B A"),
    "BottleneckAdapter": (
        lambda: BottleneckAdapter(target_modules="first", name="x"),
        "a bottleneck has an activation inside",
    ),
    "BitFit": (lambda: BitFit(name="x"), "it adds nothing to a layer"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_lora_is_refused(kind):
    make, why = OTHERS[kind]
    module = MODELS["mlp"].build()
    LoRA(r=2, target_modules="first", name="a").attach(module)
    make().attach(module)
    refused(module, rf"Adapter 'x' is a {kind} and no LoRA to combine: {why}", ["a", "x"], "new")


class Halved(LoRA):
    """A LoRA of somebody else's, with another equation."""

    def delta(self, site, r, alpha, scaling):
        delta = super().delta(site, r, alpha, scaling)
        delta.__class__ = HalvedDelta
        return delta


class HalvedDelta(lit_peft.methods.lora.LoRADelta):
    def change(self):
        return super().change() / 2


def test_a_lora_with_another_equation_is_refused():
    module = on_layer("linear", Halved(r=2, target_modules="layer", name="x"))
    refused(module, "'x' is a Halved and no LoRA to combine: its change is not LoRA's", ["x"], "new")


# ------------------------------------------------------------------------------------------------ refusals


def known(module: nn.Module) -> dict:
    """What the registry knows, but for tensors."""
    return {key: value for key, value in vars(registry(module)).items() if key not in ("originals", "aside")}


def refused(module: nn.Module, message: str, *args, error=ValueError, **arguments) -> None:
    """Combining raises this, in one line, and leaves the module as it was."""
    before, state = snapshot(module), copy.deepcopy(known(module))
    with pytest.raises(error, match=message) as caught:
        combine(module, *args, **arguments)
    assert len(str(caught.value).splitlines()) == (error is not MemoryError)
    after = snapshot(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(7), before[key].nan_to_num(7)) for key in before)
    assert known(module) == state


def three() -> nn.Module:
    module = MODELS["mlp"].build()
    LoRA(r=2, target_modules="first", name="ant").attach(module)
    LoRA(r=3, target_modules=["first", "second"], name="bee").attach(module)
    LoRA(r=3, target_modules=["second"], name="cat").attach(module)
    perturb(module)
    set_active(module, ["bee", "ant"])
    return module


# message: (arguments, error)
REFUSED = {
    r"weights is empty: name at least one adapter of ant, bee, cat": ([],),
    r"No adapter is named 'bees'; this module has .*Did you mean 'bee'\?": (["ant", "bees"], KeyError),
    r"Adapter 'ant' is named twice; to count it twice, \{'ant': 2\}": (["ant", "ant"],),
    r"The weight of adapter 'ant' must be a finite number, not nan": ({"ant": math.nan},),
    r"The weight of adapter 'bee' must be a finite number, not -inf": ({"ant": 1, "bee": -math.inf},),
    r"The weight of adapter 'ant' must be a finite number, not 'much'": ({"ant": "much"},),
    r"weights must be names or \{name: weight\}, not 3": (3,),
    r"kind = 'tie' is none of linear, ties, dare, dare_ties \(did you mean 'ties'\?\)": (["ant"], {"kind": "tie"}),
    "kind = 'cat' is HF PEFT's name; here it is kind='linear'": (["ant"], {"kind": "cat"}),
    "kind = 'dare_linear' is HF PEFT's name; here it is kind='dare', on='factors'": (
        ["ant"],
        {"kind": "dare_linear"},
    ),
    r"on must be change or factors, not 'weights'": (["ant"], {"on": "weights"}),
    r"majority_sign_method must be total or frequency, not 'sum'": (["ant"], {"majority_sign_method": "sum"}),
    r"r must be at least 1, not 0": (["ant"], {"r": 0}),
    r"r must be a whole number, not 2.5": (["ant"], {"r": 2.5}),
    r"r = 2 has no effect on='factors'": (["ant"], {"r": 2, "on": "factors"}),
    r"density = 0.5 has no effect with kind = 'linear'": (["ant"], {"density": 0.5}),
    r"kind = 'ties' needs density": (["ant"], {"kind": "ties"}),
    r"density must be above 0: nothing would be left": (["ant"], {"kind": "ties", "density": 0}),
    r"density must be at least 0 and at most 1, not 1.01": (["ant"], {"kind": "dare", "density": 1.01}),
    r"density must be at least 0 and at most 1, not nan": (["ant"], {"kind": "dare", "density": math.nan}),
    r"head = 'cats' is none of the combined adapters, ant, cat \(did you mean 'cat'\?\)": (
        ["ant", "cat"],
        {"head": "cats"},
    ),
    r"first: on='factors' needs equal ranks, and here they are ant 2, bee 3": (["ant", "bee"], {"on": "factors"}),
    r"already has an adapter named 'cat'": (["ant"], {"name": "cat"}),
    r"'my.mix' must be a Python identifier": (["ant"], {"name": "my.mix"}),
    r"first: the factors of adapter 'new' are too large for torch.float32": ({"ant": 1e39, "bee": 1},),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_is_told_and_changes_nothing(message):
    weights, *rest = REFUSED[message]
    arguments = next((x for x in rest if isinstance(x, dict)), {})
    error = next((x for x in rest if isinstance(x, type)), ValueError)
    refused(three(), message, weights, error=error, **{"name": "new"} | arguments)


def test_modules_without_values_of_their_own_are_refused():
    with pytest.raises(ValueError, match="Linear has no adapter to combine"):
        combine(nn.Linear(2, 2), ["a"], "new")
    module = three()
    merge(module)
    with pytest.raises(ValueError, match="is merged: "):
        combine(module, ["ant"], "new")
    unmerge(module)
    with torch.no_grad():
        module.first.peft["ant"].lora_B[0, 0] = math.nan
    refused(module, "Adapter 'ant' holds nan or inf at first: its training diverged", ["ant", "bee"], "new")
    with torch.device("meta"):
        empty = MODELS["mlp"].make()
    LoRA(r=2, target_modules="first", name="a").attach(empty)
    with pytest.raises(ValueError, match=r"'a' is on the meta device and has no values to combine yet \(first\)"):
        combine(empty, ["a"], "new")
    assert list(registry(empty).adapters) == ["a"]


def test_a_sharded_module_is_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    module = three()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(module.first, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for deed in (lambda m: combine(m, ["ant", "bee"], "new"), merge, lit_peft.detach):
            with pytest.raises(ValueError, match="first is sharded already"):
                deed(module)
        assert list(registry(module).adapters) == ["ant", "bee", "cat"] and isinstance(module.first, Adapted)
    finally:
        torch.distributed.destroy_process_group()


def test_what_breaks_off_half_way_leaves_everything_as_it_was(monkeypatch):
    def full(*args):
        raise MemoryError

    module = three()
    set_active(module, {"bee": 0.5, "ant": 1.0})
    monkeypatch.setattr("lit_peft.methods.factors.put_back", full)
    refused(module, "", ["ant", "cat"], "new", error=MemoryError)
