"""Gradual unfreezing: blocks are the base, bit for bit, until their time; then all is as in any other fine-tuning."""

import io

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from test_cli import fit as fit_cli
from torch import nn
from toys import Module, fit, loader, trainer

from lit_peft import FullFineTuning, LoRA, param_groups
from lit_peft.callbacks.tables import sites_table
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.testing.conformance import snapshot

BATCHES = list(loader())


class Blocks(pl.LightningModule):
    """Embedding, three blocks with a norm each, head; the optimizer is given."""

    def __init__(self, optimizer=torch.optim.AdamW, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.make, self.options = optimizer, {"lr": 0.05, "weight_decay": 0.1} | options

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        options = dict(self.options)
        return self.make(param_groups(self, options.pop("lr")), **options)


class Moves(pl.Callback):
    """After each optimizer step: which parts differ from the start, and which gradients reached the optimizer."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.states: list[int] = []

    def on_fit_start(self, trainer, module):
        self.start = snapshot(module)

    def on_train_batch_end(self, trainer, module, *args):
        now = module.state_dict()
        self.moved.append({part(key) for key, value in self.start.items() if not torch.equal(value, now[key])})
        self.states.append(len(trainer.optimizers[0].state))


def part(name: str) -> str:
    words = name.split(".")
    return words[0] if words[0] != "blocks" else f"block{words[1]}"


ORDER = ["head", "block2", "block1", "block0", "embedding"]


def moved(step: int, every: int) -> set[str]:
    """What must have moved after so many steps: the head and block 2 at once, then one part at a time."""
    return set(ORDER[: min(2 + (step - 1) // every, 5)])


OPTIMIZERS = {
    "adamw": {"optimizer": torch.optim.AdamW, "weight_decay": 0.5},
    "momentum": {"optimizer": torch.optim.SGD, "momentum": 0.9, "weight_decay": 0.5},
    "loop": {"optimizer": torch.optim.AdamW, "foreach": False},
    "fused": {"optimizer": torch.optim.AdamW, "fused": True},
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 2, 0.25])
def test_a_block_is_the_base_until_its_time(options, every):
    watch = Moves()
    module = Blocks(**options)
    fit(module, FullFineTuning(every), watch, max_steps=8, max_epochs=2)
    steps = 2 if every == 0.25 else every  # a quarter of 8
    assert watch.moved == [moved(step, steps) for step in range(1, 9)]
    assert all(p.requires_grad for p in module.parameters())
    # No state is made for what did not move: a block's first moments are of its own first gradient.
    sizes = {"head": 2, "block2": 4, "block1": 4, "block0": 4, "embedding": 2}
    assert watch.states == [sum(sizes[p] for p in parts) for parts in watch.moved]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_block_is_the_base_until_its_time_in_bfloat16(precision):
    watch = Moves()
    fit(Blocks(), FullFineTuning(1), watch, max_epochs=2, precision=precision, gradient_clip_val=0.5)
    assert watch.moved == [moved(step, 1) for step in range(1, 9)]


def test_a_gradient_scaler_does_not_miss_the_gradients():
    """On a CPU a trainer takes 16-mixed for bf16-mixed, unless the plugin is handed to it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch = Moves()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(Blocks(), FullFineTuning(1), watch, max_epochs=2, plugins=[plugin], gradient_clip_val=0.5)
    assert watch.moved == [moved(step, 1) for step in range(1, 9)]
    assert scaler._growth_tracker == 8  # steps, none of them skipped


def by_hand(module: Blocks, every: int, steps: int) -> dict[str, torch.Tensor]:
    """The same training in a plain loop with clipping, frozen parts given to nobody."""
    optimizer = module.configure_optimizers()
    for step in range(steps):
        module.training_step(BATCHES[step % 4], 0).backward()
        open_parts = moved(step + 1, every)
        for name, p in module.named_parameters():
            if part(name) not in open_parts:
                p.grad = None
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(module)


def test_the_whole_fit_equals_a_loop_with_clipping_of_what_trains():
    module = Blocks()
    fit(module, FullFineTuning(2), max_epochs=2, gradient_clip_val=0.1)
    expected = by_hand(Blocks(), 2, 8)
    for key, value in snapshot(module).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_steps_are_counted_not_batches():
    watch = Moves()
    fit(Blocks(), FullFineTuning(1), watch, max_epochs=2, accumulate_grad_batches=2)
    assert watch.moved == [set(), *(moved(n, 1) for n in (1, 1, 2, 2, 3, 3, 4))]


def test_with_layer_decay_each_part_takes_its_own_first_step():
    """Adam's first step is its rate, whatever the gradient: lr, lr / 2, lr / 4 … from the top."""
    watch = Moves()
    module = Blocks(optimizer=torch.optim.Adam, weight_decay=0.0, eps=1e-30)
    fit(module, FullFineTuning(1, layer_decay=0.5), watch, max_steps=4)
    assert watch.moved == [moved(step, 1) for step in range(1, 5)]
    last = module.embedding.bias.detach() - watch.start["embedding.bias"]
    torch.testing.assert_close(last.abs(), torch.full((8,), 0.05 * 0.5**3), rtol=1e-3, atol=1e-7)


class StopsAt(ModelCheckpoint):
    def __init__(self, path, step: int) -> None:
        super().__init__(path)
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path / "last.ckpt")
            trainer.should_stop = True


class ByStep(Blocks):
    """Takes its batch by the step: a plain loader would start its epoch anew when a fit goes on inside one."""

    def training_step(self, batch, index):
        return super().training_step(BATCHES[self.trainer.global_step % 4], index)


@pytest.mark.parametrize("every", [2, 0.25])
@pytest.mark.parametrize("step", [1, 2, 4, 5])  # before, at and after an unfreezing, and at an epoch's end
def test_resuming_is_exact(every, step, tmp_path):
    whole, killed, resumed = ByStep(), ByStep(), ByStep()
    plan = {"max_epochs": 2, "gradient_clip_val": 0.5}
    expected = fit(whole, FullFineTuning(every, layer_decay=0.8), **plan).optimizers[0].state_dict()
    fit(killed, FullFineTuning(every, layer_decay=0.8), StopsAt(tmp_path, step), **plan)
    assert not torch.equal(killed.head.weight, whole.head.weight)
    run = fit(resumed, FullFineTuning(every, layer_decay=0.8), ckpt_path=tmp_path / "last.ckpt", **plan)
    for key, value in snapshot(whole).items():
        assert torch.equal(resumed.state_dict()[key], value), key
    found = run.optimizers[0].state_dict()["state"]
    assert found.keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert all(torch.equal(value, found[index][key]) for key, value in state.items())


def test_a_made_up_optimizer_state_of_a_frozen_block_is_dropped(tmp_path):
    """As torch makes it, where parameters are sharded, for what a checkpoint has no state for."""

    class MakesUp(FullFineTuning):
        def on_train_start(self, trainer, module):
            (optimizer,) = trainer.optimizers
            self.made_up = 0
            for p in module.parameters():
                if p not in optimizer.state:
                    zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {"step": torch.tensor(1.0), **zeros}
                    self.made_up += 1
            super().on_train_start(trainer, module)

    method = MakesUp(2)
    method.spec = FullFineTuning(2).spec
    whole, killed, resumed = ByStep(), ByStep(), ByStep()
    fit(whole, FullFineTuning(2), max_epochs=2)
    fit(killed, FullFineTuning(2), StopsAt(tmp_path, 2), max_epochs=2)
    fit(resumed, method, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert method.made_up == 10  # of the embedding, block 0, and block 1, whose time has just come
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_the_schedule_is_not_what_the_weights_mean(tmp_path):
    """Another one is refused when a fit goes on, and taken in a test or a new fit."""
    module = Blocks()
    fit(module, FullFineTuning(2), StopsAt(tmp_path, 1))
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointMismatch, match=r"made with FullFineTuning\(unfreeze_every=2\), not 3\. A fit that"):
        fit(Blocks(), FullFineTuning(3), ckpt_path=path)
    other = Blocks()
    trainer(FullFineTuning()).predict(other, loader(), ckpt_path=path)
    assert torch.equal(other.head.weight, module.head.weight)


def test_an_adapter_beside_it_trains_from_the_start():
    module = Blocks()
    fit(module, FullFineTuning(1), LoRA(r=2, target_modules="blocks.0.0", name="lora", dropout=0.0), max_steps=2)
    assert module.blocks[0][0].peft["lora"].lora_B.any()


def test_the_table_tells_the_schedule():
    for every, words in ((100, "every 100 steps; embeddings after 300 steps."), (0.1, "embeddings after 0.3 of the")):
        module = Blocks()
        run = trainer(FullFineTuning(every), max_steps=0)
        run.fit(module, loader())
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(sites_table(module))
        text = console.export_text()
        assert "Blocks unfreeze from the top: the last of 3 and what stands above it train at once" in text
        assert words in text


def test_the_command_line_unfreezes(tmp_path, capsys):
    quick = ["--config", "quickstart", "--method", "FullFineTuning", "--data.limit_train", "64"]
    quick += ["--data.limit_val", "32", "--data.limit_test", "32", "--data.batch_size", "16", "--base_test", "false"]
    fit_cli(tmp_path, *quick, "--method.unfreeze_every", "0.2", "--trainer.max_epochs", "2")
    out = " ".join(capsys.readouterr().out.split())
    assert "the last of 4" in out and "every 0.2 of the steps" in out


@pytest.mark.parametrize("value", [0, -1, 1.0, 0.0, 2.5, True, "2", float("nan")])
def test_impossible_schedules(value):
    with pytest.raises(ValueError, match=f"^unfreeze_every must be a whole number of steps .* not {value!r}"):
        FullFineTuning(value)


class Manual(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_where_there_is_no_schedule_it_says_why():
    with pytest.raises(ValueError, match=r"unfreeze_every: Module has no blocks, numbered modules such as layer\.0"):
        fit(Module(), FullFineTuning(1))
    with pytest.raises(ValueError, match="which manual optimization and DeepSpeed do not allow"):
        fit(Manual(), FullFineTuning(1))
    with pytest.raises(ValueError, match=r"unfreeze_every = 0\.1 is a share .* no known end: set max_steps"):
        fit(Blocks(), FullFineTuning(0.1), max_epochs=-1)
    with pytest.warns(UserWarning, match=r"unfreeze_every = 3: the run ends after 4 steps, before 6 parameters unfr"):
        fit(Blocks(), FullFineTuning(3))
