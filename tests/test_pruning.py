"""Methods that take parts of their adapter away: which checkpoint is the best one, and what a run says is left."""

import json
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from test_cli import SMALL
from test_cli import fit as fit_by_cli
from toys import ADAPTED, Module, loader, net_lora, trainer

from lit_peft import AdaLoRA, SparseLoRA
from lit_peft.methods import base

# Of 20 steps, 4 an epoch, the 14th reaches the goal at once: the epochs 0 to 2 lie before it.
LORA = {"r": 4, "every": 1, "begin": 0.65, "target_modules": ADAPTED}
METHODS = {way: lambda way=way, **more: SparseLoRA(way, **LORA | more) for way in ("structured", "magnitude", "l1")}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 0.6, "tfinal": 0.35, "target_modules": ADAPTED}
METHODS["AdaLoRA"] = lambda **more: AdaLoRA(**ADALORA | more)
ALL = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


class Worse(Module):
    """Its score gets worse from epoch to epoch: the first checkpoint is the best one."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.005)

    def validation_step(self, batch, _):
        self.log("score", float(self.trainer.current_epoch))
        self.log("negative", -float(self.trainer.current_epoch))


class Best(ModelCheckpoint):
    def __init__(self, folder: Path, filename: str = "best-{epoch}", **arguments) -> None:
        super().__init__(folder, filename, **{"monitor": "score", "enable_version_counter": False} | arguments)

    @property
    def epoch(self) -> int:
        return torch.load(self.best_model_path, weights_only=True)["epoch"]


class Stop(pl.Callback):
    """Ends the run at a step, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def fit(*callbacks, module: pl.LightningModule | None = None, ckpt_path=None, **arguments) -> pl.Trainer:
    run = trainer(*callbacks, **{"max_epochs": 5} | arguments)
    run.fit(module or Worse(), loader(), loader(), ckpt_path=ckpt_path)
    return run


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(base, "rank_zero_info", lines.append)
    return lines


@ALL
def test_the_best_checkpoint_is_one_that_has_reached_the_goal(make, tmp_path, said):
    method = make()
    for name in ("one", "two"):  # a method may serve one module after the other
        fit(method, best := Best(tmp_path / name), module=(module := Worse()))
        assert best.epoch == 3 and [path.name for path in (tmp_path / name).iterdir()] == ["best-epoch=3.ckpt"]
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"], strict=False)
    pruned = method.pruned(module)
    assert pruned.left == pruned.goal == pruned.total / 2
    told = f"{type(method).__name__} is at its goal, {pruned}: from here on the best checkpoint is chosen anew."
    assert said == [told, told]


@pytest.mark.parametrize(
    ("arguments", "epoch", "files"),
    [
        ({"filename": "best"}, 3, {"best"}),
        ({"filename": "best", "enable_version_counter": True}, 3, {"best"}),
        ({"monitor": "negative", "mode": "max"}, 3, {"best-epoch=3"}),
        ({"save_top_k": 2}, 3, {"best-epoch=3", "best-epoch=4"}),
        ({"save_top_k": 3}, 3, {"best-epoch=1", "best-epoch=3", "best-epoch=4"}),  # the next one would be its end
        ({"save_top_k": -1}, 3, {f"best-epoch={i}" for i in range(5)}),
        ({"save_on_train_epoch_end": True}, 3, {"best-epoch=3"}),
        ({"monitor": None}, 4, {"best-epoch=4"}),
    ],
)
def test_checkpoints_from_before_go_as_lightning_lets_beaten_ones_go(arguments, epoch, files, tmp_path):
    best = Best(tmp_path, **arguments)
    fit(METHODS["structured"](), best)
    assert best.epoch == epoch
    assert {path.stem for path in tmp_path.iterdir()} == files


def test_a_score_of_training_alone_is_chosen_by_alike(tmp_path):
    class Unvalidated(Module):
        def on_train_epoch_end(self):
            self.log("score", float(self.current_epoch))

    best = Best(tmp_path)
    trainer(METHODS["structured"](), best, max_epochs=5).fit(Unvalidated(), loader())
    assert best.epoch == 3


@ALL
@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize("method_first", [False, True])
def test_early_stopping_waits_for_the_goal(make, method_first, at_epoch_end):
    stopper = lambda: EarlyStopping("score", patience=1, check_on_train_epoch_end=at_epoch_end)  # noqa: E731
    callbacks = [make(), stopper()] if method_first else [stopper(), make()]
    assert fit(*callbacks, max_epochs=10).current_epoch == 8  # reached in epoch 6, of which the next is worse
    assert fit(net_lora(), stopper(), max_epochs=10).current_epoch == 2


def test_a_fixed_strength_changes_nothing(tmp_path, said):
    method, stopper = METHODS["l1"](strength=0.3), EarlyStopping("score", patience=1)
    fit(method, best := Best(tmp_path), stopper, module=(module := Worse()))
    assert best.epoch == 0 and stopper.stopped_epoch == 1 and not said
    pruned = method.pruned(module)
    assert pruned.goal is None and pruned.left == sum(
        int(module.get_parameter(f"{path}.peft.default.lora_{x}").count_nonzero()) for path in ADAPTED for x in "AB"
    )


def test_nothing_is_said_where_nothing_was_chosen(said):
    fit(METHODS["structured"]())
    assert not said


@ALL
def test_a_run_that_ends_before_keeps_its_best_and_warns(make, tmp_path):
    """The masks are there at the end, but no validation comes after it."""
    best = Best(tmp_path)
    end = {"tinit": 0.95, "tfinal": 0.0} if make is METHODS["AdaLoRA"] else {"begin": 0.95, "end": 1.0}
    module = Worse()
    run = fit(method := make(**end), best, module=module, max_steps=15)
    assert method.pruned(module).reached and best.epoch == 0
    name, total = type(method).__name__, method.pruned(module).total
    with pytest.warns(
        UserWarning, match=rf"tested was written before {name} was at its goal: .*{total} of {total} \w+"
    ):
        run.test(module, loader(), ckpt_path=best.best_model_path, verbose=False)
    with pytest.warns(UserWarning, match=rf"^Training ended before {name} was at its goal: \d+ of {total} .* not \d+"):
        fit(make(**end), Stop(10), max_steps=15)


# ------------------------------------------------------------------------------------------------ resuming


class Each(Checkpoint):
    """Keeps the state after each step, before the validation that may follow, and after each epoch: it comes last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")


@ALL
@pytest.mark.parametrize(("state", "chosen_anew"), [("step-13", 1), ("step-14", 1), ("epoch-3", 0), ("step-18", 0)])
def test_a_resumed_fit_chooses_anew_unless_it_has(make, state, chosen_anew, tmp_path, said):
    best, again = (Best(tmp_path / "best") for _ in range(2))
    fit(make(), best, Each(tmp_path))
    assert len(said) == 1
    fit(make(), again, ckpt_path=tmp_path / f"{state}.ckpt")
    assert len(said) == 1 + chosen_anew
    assert again.epoch == best.epoch == 3 and again.best_model_path == best.best_model_path


@pytest.mark.parametrize(("name", "epoch"), [("structured", 3), ("magnitude", 3), ("AdaLoRA", 6)])
def test_a_longer_run_chooses_anew_only_where_more_was_left_again(name, epoch, tmp_path):
    """What SparseLoRA has masked stays; AdaLoRA's budget is that of its new schedule."""
    fit(METHODS[name](), Best(tmp_path / "best"), Each(tmp_path))
    fit(METHODS[name](), again := Best(tmp_path / "best"), ckpt_path=tmp_path / "epoch-4.ckpt", max_epochs=10)
    assert again.epoch == epoch


# ---------------------------------------------------------------------------------------- what a run tells


def test_a_run_tells_what_is_left_of_the_checkpoint_that_it_tested(tmp_path, capsys):
    """The best one is dense here: the target is reached at the last step, after which nothing is validated."""
    with pytest.warns(UserWarning, match=r"tested was written before SparseLoRA was at its goal: \d+ of 64 ranks left"):
        folder = fit_by_cli(
            *(
                tmp_path,
                "--config",
                "quickstart",
                "--method",
                "SparseLoRA",
                "--method.end",
                "1",
                "--base_test",
                "false",
            ),
            *(*SMALL, "--trainer.max_steps", "7"),
        )
    metrics = json.loads((folder / "metrics.json").read_text())
    gates = {}
    for name in ("best", "last"):
        state = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        gates[name] = sum(int(value.count_nonzero()) for key, value in state.items() if key.endswith(".gate"))
    assert metrics["adapter/left"] == gates["best"] > gates["last"] == 32
    assert metrics["adapter/sparsity"] == pytest.approx(1 - gates["best"] / 64)
    assert re.search(rf"pruned +{gates['best']} of 64 ranks left \({gates['best'] / 64:.0%}\)", capsys.readouterr().out)


@ALL
def test_early_stopping_waits_where_epochs_are_not_validated(make):
    class Rising(Worse):
        def training_step(self, batch, index):
            self.log("train/worse", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, index)

    stopper = EarlyStopping("train/worse", patience=1, check_on_train_epoch_end=True)
    fit(method := make(), stopper, module=(module := Rising()), check_val_every_n_epoch=5)
    assert method.pruned(module).reached
