"""Lightning's own switches through `lit-peft`: each run ends cleanly, and its summary says what was not written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_cli import fit
from toys import Module, adapters, loader, net_lora, trainer
from toys import fit as fit_toy

from lit_peft import cli
from lit_peft.arguments import change_method, resolve
from lit_peft.callbacks.checkpoints import LatestCheckpoint
from lit_peft.lightning_cli import run

QUICK = [
    *("--config", "quickstart", "--data.limit_train", "64", "--data.limit_val", "32", "--data.limit_test", "32"),
    *("--data.batch_size", "16", "--base_test", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]
EVERYTHING = {
    *("config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "events", "hparams.yaml"),
}


def written(folder: Path) -> set[str]:
    """Files of a run, TensorBoard's under the name `events`."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {"events" if "tfevents" in name else name for name in names}


def steps_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("switches", "missing", "said"),
    [
        (["--trainer.logger", "false"], {"events", "hparams.yaml"}, "not written: no TensorBoard logger"),
        (["--trainer.limit_val_batches", "0"], {"checkpoints/best.ckpt"}, "there is no best one"),
        (["--trainer.limit_test_batches", "0"], set(), "val accuracy"),
        (["--trainer.max_steps", "1"], {"checkpoints/best.ckpt"}, "there is no best one"),
        (["--trainer.num_sanity_val_steps", "0"], set(), "test accuracy"),
        (
            ["--trainer.enable_checkpointing", "false"],
            {"checkpoints/best.ckpt", "checkpoints/last.ckpt"},
            "not written: checkpoints are off",
        ),
        (["--trainer.precision", "bf16-mixed"], set(), "test accuracy"),
        (["--trainer.precision", "bf16-true"], set(), "test accuracy"),
        # Lightning computes in bfloat16 where the processor has no float16 matrix products, and warns.
        (["--trainer.precision", "16-mixed"], set(), "test accuracy"),
    ],
    ids=lambda value: value[0].removeprefix("--trainer.") + "=" + value[1] if isinstance(value, list) else "",
)
def test_a_switch_ends_cleanly_and_says_what_it_left_out(switches, missing, said, tmp_path, capsys):
    folder = fit(tmp_path, *QUICK, "--trainer.max_epochs", "1", *switches)
    assert written(folder) == EVERYTHING - missing
    assert said in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert {p.name for p in tmp_path.iterdir()} == {folder.name}


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (["--trainer.fast_dev_run", "true"], "not written: fast_dev_run keeps nothing"),
        (["--trainer.barebones", "true"], "barebones: no checkpoint, adapter, metrics or curves were written"),
    ],
    ids=["fast_dev_run", "barebones"],
)
def test_a_trial_writes_nothing(switches, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = ["--trainer.enable_progress_bar", "null"] if "barebones" in switches[0] else []
    cli.main(["fit", *QUICK, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "runs", *switches, *bare])
    assert said in capsys.readouterr().out
    assert not list(tmp_path.rglob("*"))


class Slow(pl.Callback):
    """Takes its time over each batch."""

    def on_train_batch_start(self, *args) -> None:
        time.sleep(0.3)


def test_max_time_ends_the_run_with_everything_written(tmp_path):
    slow = ["--trainer.callbacks", "test_switches.Slow", "--trainer.max_time", "00:00:00:01"]
    folder = fit(tmp_path, *QUICK, "--trainer.max_epochs", "50", *slow)
    assert written(folder) >= EVERYTHING - {"checkpoints/best.ckpt"}
    assert 0 < steps_of(folder / "checkpoints" / "last.ckpt") < 40


def test_two_runs_into_one_root_keep_apart(tmp_path):
    first, second = (fit(tmp_path, *QUICK, "--trainer.max_epochs", "1", "--trainer.logger", "false") for _ in range(2))
    assert first != second and written(first) == written(second) == EVERYTHING - {"events", "hparams.yaml"}


def test_ctrl_c_ends_between_two_steps_and_the_run_goes_on(tmp_path):
    slow = ["--trainer.callbacks", "test_switches.Slow", "--trainer.default_root_dir", str(tmp_path)]
    arguments = [*QUICK, "--trainer.max_epochs", "3", *slow]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_peft.cli", "fit", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "version_0"
    deadline = time.monotonic() + 100
    while not list(folder.glob("events*")) or "train/loss" not in str(next(folder.glob("events*")).read_bytes()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "Stopping after this step" in out
    assert "Not written: metrics.json, adapter/." in out and f"lit-peft fit --run {folder}" in " ".join(out.split())
    done = steps_of(folder / "checkpoints" / "last.ckpt")
    assert 0 < done < 12
    assert written(folder) & EVERYTHING <= EVERYTHING - {"metrics.json", "adapter/adapter_config.json"}
    run(resolve(["fit", "--run", str(folder)]))
    assert written(folder) == EVERYTHING and steps_of(folder / "checkpoints" / "last.ckpt") == 12
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(pl.Callback):
        def on_train_batch_start(self, *args) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    latest = LatestCheckpoint(every_n_train_steps=1, dirpath=str(tmp_path))
    with pytest.raises(SystemExit):
        fit_toy(Module(), net_lora(), latest, Impatient(), enable_checkpointing=True)
    assert not list(tmp_path.iterdir())
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_ctrl_c_lets_a_step_of_several_batches_end(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    latest = LatestCheckpoint(every_n_train_steps=100, dirpath=str(tmp_path))
    with pytest.raises(SystemExit):
        fit_toy(Module(), net_lora(), latest, Interrupt(), enable_checkpointing=True, accumulate_grad_batches=2)
    signal.signal(signal.SIGINT, before)
    assert steps_of(tmp_path / "last.ckpt") == 1


@pytest.mark.parametrize("name", ["best", "last"])
def test_named_checkpoints_are_those_of_the_newest_run(name, tmp_path, capsys):
    root = ["--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        run(["test", *resolve(QUICK), *root, "--ckpt_path", name])
    assert f"ckpt_path {name}: no run in {tmp_path} has checkpoints/{name}.ckpt" in capsys.readouterr().err
    folders = [fit(tmp_path, *QUICK, "--trainer.max_epochs", str(epochs)) for epochs in (1, 2)]
    capsys.readouterr()
    run(["test", *resolve(QUICK), *root, "--ckpt_path", name])
    assert f"ckpt_path {name}: {folders[1]}/checkpoints/{name}.ckpt" in capsys.readouterr().out
    longer = fit(tmp_path, *QUICK, "--trainer.max_epochs", "3", "--ckpt_path", name)
    assert longer == folders[1] and steps_of(longer / "checkpoints" / "last.ckpt") == 12


def test_last_before_the_first_run_starts_anew(tmp_path, capsys):
    folder = fit(tmp_path, *QUICK, "--trainer.max_epochs", "1", "--ckpt_path", "last")
    assert "ckpt_path last: none yet, the run starts anew" in capsys.readouterr().out
    assert written(folder) == EVERYTHING


def test_a_preempted_job_goes_on_from_its_hpc_checkpoint_in_its_folder(tmp_path):
    folder = fit(tmp_path, *QUICK, "--trainer.max_epochs", "2")
    expected = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    (tmp_path / "again").mkdir()
    first = fit(tmp_path / "again", *QUICK, "--trainer.max_epochs", "2", "--trainer.callbacks", "test_switches.Preempt")
    again = fit(tmp_path / "again", *QUICK, "--trainer.max_epochs", "2", "--ckpt_path", "hpc")
    assert again == first
    found = torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


class Preempt(pl.Callback):
    """Writes the checkpoint that a cluster's signal asks for, and stops, in mid-epoch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if trainer.global_step == 5:
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            trainer.save_checkpoint(path)
            trainer.should_stop = True


@pytest.mark.parametrize("name", ["best", "last"])
def test_named_checkpoints_in_python(name, tmp_path):
    module = Module()
    checkpoints = ModelCheckpoint(tmp_path, monitor="loss", save_last=True)
    run = trainer(net_lora(), checkpoints, max_epochs=3)
    run.fit(module, loader(), loader())
    path = checkpoints.best_model_path if name == "best" else checkpoints.last_model_path
    expected = torch.load(path, weights_only=True)["state_dict"]
    run.test(module, loader(), ckpt_path=name, verbose=False)
    assert all(torch.equal(value, expected[key]) for key, value in adapters(module).items())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_batches_equal_one_large_batch(parts):
    small, large = Module(), Module()
    fit_toy(large, net_lora(), max_epochs=2)
    data = torch.utils.data.DataLoader(loader().dataset, batch_size=4 // parts)
    run = trainer(net_lora(), max_epochs=2, accumulate_grad_batches=parts)
    run.fit(small, data)
    assert run.global_step == 8
    for key, value in adapters(large).items():
        assert torch.allclose(adapters(small)[key], value, atol=1e-6, rtol=0), key


def changed(*arguments: str) -> tuple[list[str], list[str]]:
    return change_method(resolve(["fit", "--config", "quickstart", *arguments]))


def test_a_changed_method_gets_its_own_defaults_and_every_choice_is_told(tmp_path, capsys):
    root = ["--method.train_also", "[sa_layer_norm]", "--method", "FullFineTuning", "--trainer.max_steps", "1"]
    folder = fit(tmp_path, *QUICK, *root)
    out = capsys.readouterr().out
    assert "Method: FullFineTuning with its own defaults, instead of LoRA." in out
    assert "method.r 4: dropped, FullFineTuning has no such argument" in out
    assert 'method.train_also ["sa_layer_norm"]: carried over' in out
    assert "model.learning_rate 2e-3: dropped, it was set for LoRA" in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method"]["init_args"]["train_also"] == ["sa_layer_norm"]
    assert config["model"]["init_args"]["learning_rate"] is None
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["params/trainable"] == metrics["params/total"]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--method", "LoRA"], []),  # the same one
        (["--method.r", "8"], []),
        (["--method", "NoSuch"], []),  # the parser says so
        (["--method", "os.getcwd"], []),
        (["--method", "torch.nn.Linear"], []),
        (["--method=BitFit", "--model.learning_rate", "0.1"], ["method.r 4: dropped"]),
        (["--config", "sst2/bitfit"], ["method.r 4: dropped"]),  # its rate is its own
        (["--method", "lit_peft.methods.BitFit"], ["method.r 4: dropped", "learning_rate 2e-3: dropped"]),
        (["--method.r", "16", "--method", "BitFit", "--model.learning_rate=1"], []),  # the default is no choice
    ],
)
def test_only_choices_are_told(arguments, lines):
    found = changed(*arguments)[1][1:]
    assert len(found) == len(lines)
    assert all(line in told for line, told in zip(lines, found, strict=True))


def test_the_defaults_of_a_run_are_no_choices_however_they_are_written(tmp_path):
    """Its config.yaml has each as the signature has it: nf4 and null, which the method keeps as mappings."""
    plain = {"r": 4, "quantize": "nf4", "target_modules": "all-linear", "rank_pattern": None, "alpha": 16.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": {"class_path": "QLoRA", "init_args": plain}}))
    words, lines = change_method(["fit", "--config", str(tmp_path / "config.yaml"), "--method", "LoRA"])
    assert lines[1:] == ["  method.r 4: carried over"]
    again = json.loads(words[words.index("--method") + 1])["init_args"]
    assert (again["r"], again["quantize"], again["target_modules"]) == (4, None, None)


def test_a_changed_method_is_changed_once_when_ranks_start_again():
    words, _ = changed("--method", "BitFit")
    assert change_method(words)[0] == words
