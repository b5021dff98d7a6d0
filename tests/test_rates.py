"""Discriminative learning rates: scales of train_also, layer_decay, and the optimizer's groups."""

import copy
import io

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from models import tiny
from test_cli import fit as fit_cli
from test_switches import QUICK
from test_tasks import data
from test_tasks import trainer as task_trainer
from toys import ADAPTED, Module, adapters, fit, loader, net_lora, saved, trainer

import lit_peft
from lit_peft.callbacks import ReproducibleSteps
from lit_peft.callbacks.tables import sites_table
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.methods import BitFit, FullFineTuning, LinearProbe, LoRA
from lit_peft.tasks import TextClassification
from lit_peft.training.rates import layer_depths

TOP, NORMS = "transformer.layer.3", "*[nN]orm*"


def rates(optimizer, module) -> dict[str, float]:
    """Initial rate of each parameter."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: g.get("initial_lr", g["lr"]) for g in optimizer.param_groups for p in g["params"]}


def discriminative(**arguments) -> LoRA:
    """LoRA plus the top layer plus the layer norms."""
    scales = {TOP: 0.5, NORMS: 0.1}
    return LoRA(**{"r": 2, "train_also": scales, "layer_decay": 0.8} | arguments)


# ------------------------------------------------------------------------------------------------ in our task


def expected_rate(name: str, lr: float) -> float:
    """What `discriminative` asks for, said once more by hand: 4 blocks, embeddings below, a new head above."""
    if ".peft." in name or "classifier" in name:
        return lr
    scale = 0.5 if f"{TOP}." in name else 0.1
    depth = 4 if ".embeddings." in name else 3 - int(name.split("layer.")[1][0])
    return lr * scale * 0.8**depth


def test_every_parameter_starts_at_its_rate_and_moves():
    model = TextClassification(learning_rate=2e-3)
    run = task_trainer(discriminative(), max_steps=0)
    run.fit(model, data())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = task_trainer(discriminative(), max_epochs=2)
    run.fit(model, data())
    found = rates(run.optimizers[0], model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == pytest.approx({name: expected_rate(name, 2e-3) for name in found}, rel=1e-12)
    assert {round(rate / 2e-3, 6) for rate in found.values()} >= {1, 0.5, 0.08, 0.064, 0.0512, 0.04096}
    still = {"k_lin.bias"}  # softmax cancels what a key's bias adds
    for name, p in model.named_parameters():
        if not any(name.endswith(ending) for ending in still):
            assert torch.equal(before[name], p) is not p.requires_grad, name


def test_the_schedule_scales_all_groups_alike_and_their_curves_have_names(tmp_path):
    class Shares(LearningRateMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.seen = []

        def on_train_batch_start(self, trainer, *args):
            super().on_train_batch_start(trainer, *args)
            groups = trainer.optimizers[0].param_groups
            self.seen.append([group["lr"] / group["initial_lr"] for group in groups])

    monitor = Shares()
    run = task_trainer(discriminative(), monitor, logger=True, default_root_dir=tmp_path, max_epochs=2)
    run.fit(TextClassification(warmup=0.5), data())
    assert len({row[0] for row in monitor.seen}) > 2
    assert all(row == pytest.approx([row[0]] * len(row)) for row in monitor.seen)
    groups = run.optimizers[0].param_groups
    names = [group["name"] for group in groups if "name" in group]
    assert len(names) == len(set(names)) and {"base_x0.5", "base_x0.5_no_decay", "base_x0.08"} <= set(names)
    assert all(("name" in group) == (group["initial_lr"] != 1e-3) for group in groups)
    assert "lr-AdamW/base_x0.5" in monitor.lrs


class DiesAfter(ModelCheckpoint):
    """Writes a checkpoint after so many steps and ends the fit."""

    def __init__(self, path, steps: int) -> None:
        super().__init__(path)
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path / "last.ckpt")
            trainer.should_stop = True


def test_resuming_restores_the_optimizer_with_its_groups(tmp_path):
    def run(method, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        model = TextClassification()
        fitted = task_trainer(
            method, ReproducibleSteps(), *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks)
        )
        fitted.fit(model, data(), ckpt_path=ckpt_path)
        return model, fitted.optimizers[0].state_dict()

    whole, state = run(discriminative(dropout=0.0))
    run(discriminative(dropout=0.0), DiesAfter(tmp_path, 3))
    path = tmp_path / "last.ckpt"
    resumed, again = run(discriminative(dropout=0.0), ckpt_path=path)
    assert [{**g} for g in again["param_groups"]] == [{**g} for g in state["param_groups"]]
    for index, entry in state["state"].items():
        assert all(torch.equal(value, again["state"][index][key]) for key, value in entry.items())
    for key, value in adapters(whole).items():
        assert torch.equal(value, adapters(resumed)[key]), key

    for changed in ({"layer_decay": 0.9}, {"train_also": {TOP: 1, NORMS: 0.1}}):
        other = discriminative(dropout=0.0, **changed)
        with pytest.raises(CheckpointMismatch, match=r"A fit that resumes goes on at the rates it began with\."):
            run(other, ckpt_path=path)
        task_trainer(other).test(TextClassification(), data(), path, verbose=False)  # rates do not change the weights
    with pytest.raises(
        CheckpointMismatch, match=r"made with LoRA\(train_also=\{.*\}\), not \['transformer\.layer\.3'\]\.$"
    ):
        task_trainer(discriminative(train_also=TOP)).test(TextClassification(), data(), path, verbose=False)


def test_full_fine_tuning_decays_layer_by_layer():
    model = TextClassification(learning_rate=1e-4, weight_decay=0.1)
    run = task_trainer(FullFineTuning(layer_decay=0.5, train_also={"*embeddings*": 0.1}), max_steps=1)
    run.fit(model, data())
    found = rates(run.optimizers[0], model)
    assert len(found) == len(list(model.parameters()))
    for name, rate in found.items():
        if ".embeddings." in name:
            share = 0.1 * 0.5**4
        else:
            share = 0.5 ** (3 - int(name.split("layer.")[1][0])) if "layer." in name else 1
        assert rate == pytest.approx(1e-4 * share), name
    decays = {(g["lr"], g["weight_decay"]) for g in run.optimizers[0].param_groups}
    assert len(decays) == 2 * len({lr for lr, _ in decays})  # each rate with and without decay


def test_the_command_line_takes_scales_and_the_configuration_keeps_them(tmp_path, capsys):
    scales = '{classifier: 1, "*norm*": 0.1}'
    options = ["--method.train_also", scales, "--method.layer_decay", "0.9", "--trainer.max_steps", "2"]
    folder = fit_cli(tmp_path, *QUICK, *options)
    arguments = yaml.safe_load((folder / "config.yaml").read_text())["method"]["init_args"]
    assert (arguments["train_also"], arguments["layer_decay"]) == ({"classifier": 1.0, "*norm*": 0.1}, 0.9)
    assert "rate x 0.1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- foreign modules


class Foreign(Module):
    """Makes its optimizer from the groups of `lit_peft.param_groups`, or from its parameters."""

    def __init__(self, grouped: bool = True, schedule=None) -> None:
        super().__init__()
        self.grouped, self.schedule, self.lr = grouped, schedule, 0.01

    def configure_optimizers(self):
        given = lit_peft.param_groups(self, lr=self.lr) if self.grouped else self.parameters()
        optimizer = torch.optim.Adam(given, lr=self.lr)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


class Faster(LoRA):
    """LoRA+ in short: B learns faster than A."""

    def param_groups(self, named, lr):
        of = {x: [name for name, _ in named if name.endswith(f"lora_{x}")] for x in "AB"}
        return [{"params": of["A"], "lr": lr}, {"params": of["B"], "lr": 4 * lr}]


SEVERAL = {
    "scale": lambda: net_lora(train_also={"head": 0.1}),
    "one rate for all, not lr": lambda: LinearProbe(train_also={"head": 0.1}),
    "decay": lambda: FullFineTuning(train_also={"net.first": 0.5}),
    "groups": lambda: Faster(r=2, target_modules=ADAPTED),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_foreign_optimizer_has_the_rates_or_is_refused(kind):
    method, module = SEVERAL[kind](), Foreign()
    found = rates(fit(module, method).optimizers[0], module)
    assert any(rate != 0.01 for rate in found.values())
    name = type(method).__name__
    message = (
        rf"^{name} asks for several learning rates, which Adam does not have: build it from lit_peft\.param_groups"
    )
    with pytest.raises(ValueError, match=message):
        fit(Foreign(grouped=False), SEVERAL[kind]())


@pytest.mark.parametrize("method", [net_lora(train_also={"head": 1}), BitFit(), FullFineTuning()])
def test_one_rate_needs_no_groups(method):
    module = Foreign(grouped=False)
    fit(module, method)
    assert [group.keys() & {"name"} for group in lit_peft.param_groups(module, 0.1)] == [set()] * (
        1 + isinstance(method, LoRA)
    )


def test_a_schedule_or_a_finder_that_levels_the_rates_is_refused():
    one_cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)  # noqa: E731
    with pytest.raises(ValueError, match="with a schedule that scales all groups alike"):
        fit(Foreign(schedule=one_cycle), SEVERAL["scale"]())
    exponential = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
    fit(Foreign(schedule=exponential), SEVERAL["scale"](), max_epochs=2)
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    with pytest.raises(ValueError, match="and without LearningRateFinder, which gives all of them one rate"):
        fit(Foreign(), SEVERAL["scale"](), finder, max_epochs=5)


def test_groups_without_a_trainer_and_of_two_methods():
    module = Module()
    Faster(r=2, target_modules=["first"], train_also={"head.bias": 0.1}).attach(module)
    LinearProbe(name="probe", train_also={"head": 0.5}).attach(module)
    groups = lit_peft.param_groups(module, 1.0)
    names = {id(p): name.removeprefix("net.") for name, p in module.named_parameters()}
    assert [(g.get("name"), g["lr"], [names[id(p)] for p in g["params"]]) for g in groups] == [
        (None, 1.0, ["first.peft.default.lora_A"]),
        ("default_x4", 4.0, ["first.peft.default.lora_B"]),
        ("base_x0.5", 0.5, ["head.weight"]),
        ("base_x0.1", 0.1, ["head.bias"]),  # the first adapter that asks counts
    ]
    (group,) = lit_peft.param_groups(Module(), 1.0)  # no method: everything, at one rate
    assert len(group["params"]) == 8 and group["lr"] == 1.0


def test_the_next_fit_trains_at_the_rates_of_its_method(tmp_path):
    module = Foreign()
    fit(module, net_lora(train_also={"head": 0.1}))
    found = rates(fit(module, net_lora(train_also={"head": 0.2}, layer_decay=0.5)).optimizers[0], module)
    assert found["net.head.weight"] == pytest.approx(0.002)
    assert registry(module).adapters["default"].spec["init_args"]["layer_decay"] == 0.5
    path = saved(tmp_path, Foreign(), net_lora(train_also={"head": 0.1}))
    assert torch.load(path)["lit_peft"]["methods"]["default"]["init_args"]["train_also"] == {"head": 0.1}
    trainer(net_lora(train_also="head")).test(Foreign(), loader(), path, verbose=False)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        fit(module, net_lora(train_also={"net.head": 0.2}))


def test_an_adapter_folder_keeps_the_scales(tmp_path):
    model = tiny("distilbert")
    base = copy.deepcopy(model)
    scales = {"classifier": 0.25, "pre_classifier": 1}
    LoRA(r=2, train_also=scales).attach(model)
    lit_peft.save(model, tmp_path)
    adapter = lit_peft.load(base, tmp_path)
    assert adapter.scales == {"classifier.weight": 0.25, "classifier.bias": 0.25}
    assert adapter.spec["init_args"]["train_also"] == {"classifier": 0.25, "pre_classifier": 1.0}
    assert [g["lr"] for g in lit_peft.param_groups(base, 1.0)] == [g["lr"] for g in lit_peft.param_groups(model, 1.0)]


# ---------------------------------------------------------------------------------------------- the arguments


def test_the_first_pattern_that_matches_counts():
    module = Module()
    adapter = net_lora(train_also={"head.weight": 2, "head": 0.5, "re:net.head.*": 0.1}).attach(module)
    assert adapter.scales == {"net.head.weight": 2.0, "net.head.bias": 0.5}
    assert adapter.head == ["net.head.bias", "net.head.weight"]


def test_a_head_that_the_task_names_may_have_a_scale_and_never_decays():
    module = Module()
    module.train_also = ["net.head"]
    FullFineTuning(train_also={"head": 10}, layer_decay=0.5).attach(module)
    assert {g["lr"] for g in lit_peft.param_groups(module, 1.0)} == {1.0, 10.0}  # no blocks here


def test_the_table_shows_scales_and_decay():
    module = Module()
    net_lora(train_also={"head.weight": 0.1, "head": 1}, layer_decay=0.9).attach(module)
    from rich.console import Console

    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    console.print(sites_table(module))
    text = console.export_text()
    assert "rates of base parameters fall by x 0.9." in text
    rows = {line.split()[0]: line for line in text.splitlines() if "head" in line and "itself" in line}
    assert "itself (head), rate x 0.1 " in rows["net.head.weight"]
    assert "rate" not in rows["net.head.bias"]


@pytest.mark.parametrize(
    ("names", "fresh", "depths"),
    [
        (
            [
                "shared.weight",
                *(f"encoder.block.{k}.layer.0.q" for k in (0, 1)),
                "encoder.final_layer_norm.weight",
                *(f"decoder.block.{k}.layer.{j}.q" for k in (0, 1) for j in (0, 1)),
                "decoder.final_layer_norm.weight",
                "lm_head.weight",
            ],
            [],
            [4, 3, 2, 2, 1, 1, 0, 0, 0, 0],
        ),
        (
            [
                "conv1.weight",
                "layer1.0.conv1",
                "layer1.1.conv1",
                "layer2.0.conv1",
                "layer2.0.downsample.0",
                "fc.weight",
            ],
            [],
            [3, 2, 1, 0, 0, 0],
        ),
        (["0.weight", "2.weight", "head.weight"], [], [1, 0, 0]),
        (
            ["wte", "h.0.q", "h.1.q", "head.0.weight", "head.1.weight"],
            ["head.0.weight", "head.1.weight"],
            [2, 1, 0, 0, 0],
        ),
        (["first.weight", "second.weight"], [], [0, 0]),
    ],
    ids=["t5", "resnet", "sequential", "new head of several layers", "no blocks"],
)
def test_blocks_are_counted_in_the_modules_order(names, fresh, depths):
    assert layer_depths(names, fresh) == dict(zip(names, depths, strict=True))


def test_blocks_of_a_real_t5():
    model = tiny("t5")
    FullFineTuning(layer_decay=0.5).attach(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in lit_peft.param_groups(model, 1.0) for p in g["params"]}
    n = len({name.split(".layer.")[0] for name in found if ".block." in name})
    assert found["shared.weight"] == 0.5**n
    assert found["encoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5 ** (n - 1)
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5 ** (n // 2 - 1)
    assert found["decoder.final_layer_norm.weight"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_also": {"head": 0}}, r"train_also\['head'\] must be a number above 0, .* not 0\."),
        ({"train_also": {"head": -1.0}}, r"not -1\.0\."),
        ({"train_also": {"head": float("nan")}}, "not nan"),
        ({"train_also": {"head": float("inf")}}, "not inf"),
        ({"train_also": {"head": "fast"}}, "not 'fast'"),
        ({"train_also": {"head": None}}, "not None"),
        ({"train_also": {"head": True}}, "not True"),
        ({"train_also": [{"head": 0.1}]}, r"train_also takes patterns, \[a, b\], or patterns and scales"),
        ({"layer_decay": 0}, "layer_decay must be a number above 0 and at most 1, not 0"),
        ({"layer_decay": 1.5}, r"not 1\.5"),
        ({"layer_decay": float("nan")}, "not nan"),
        ({"layer_decay": "0.9"}, "not '0.9'"),
    ],
)
def test_rates_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**arguments)


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"train_also: 'haed' names no parameter of Module\. Nearest: head"):
        net_lora(train_also={"haed": 0.1}).attach(Module())
