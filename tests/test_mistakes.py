"""What people get wrong in their first hour: each mistake ends in one to three lines, status 2, and the way out.

The table in docs/errors.md is made from these cases: `LIT_PEFT_WRITE_DOCS=1 pytest tests/test_mistakes.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_cli import SMALL, fit

from lit_peft import BottleneckAdapter, LoRA, cli, save
from lit_peft.demo import ENCODER
from lit_peft.mistakes import of_built
from lit_peft.tasks import TextClassification

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
QUICK = ["fit", "--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_steps", "2"]


@dataclass(frozen=True)
class Mistake:
    """A mistake: what was done, the arguments, in which {name} is a file of `files`, and words of the answer."""

    what: str
    arguments: list[str]
    answer: str


def quick(what: str, options: str, answer: str) -> Mistake:
    return Mistake(what, [*QUICK, *options.split(" ")], answer)


MISTAKES = [
    # methods and their arguments
    quick("a method in lower case", "--method lora", "no method named 'lora'. Did you mean LoRA?"),
    quick("a method misspelt", "--method LoRAA", "no method named 'LoRAA'. Did you mean LoRA or"),
    quick("rank 0", "--method.r 0", "r must be at least 1, not 0"),
    quick("a negative rank", "--method.r -1", "r must be at least 1, not -1"),
    quick("a rank above the layer's width", "--method.r 4096", "r = 4096 exceeds the smaller side of"),
    quick("dropout of 2", "--method.dropout 2", "dropout must be at least 0 and below 1, not 2.0"),
    quick("text for a number", "--method.alpha big", "method.alpha: expected a number or null, not 'big'"),
    quick("a choice misspelt", "--method.bias al", "method.bias: expected one of none, all, lora_only, not 'al'"),
    quick("Llama's names on DistilBERT", "--method.target_modules [q_proj]", "here named q_lin: use 'query'"),
    quick("HF PEFT's name of an argument", "--method.lora_alpha 8", "no argument 'lora_alpha'. Here it is 'alpha'"),
    # the base in 4 or 8 bit
    quick("4 bit by another name", "--method.quantize 4bit", "no mode '4bit'. Did you mean nf4 or fp4?"),
    quick("HF's name of 8 bit", "--method.load_in_8bit true", "Here it is 'quantize'"),
    quick("quantize at the model", "--model.quantize nf4", "It belongs to another section: --method.quantize"),
    quick("quantize without its section", "--quantize nf4", "an argument of the method: --method.quantize"),
    quick("HF's name without a section", "--load_in_4bit true", "an argument of the method: --method.quantize"),
    quick("an unknown option of 4 bit", "--method.quantize.mode nf4 --method.quantize.blocks 64", "mean block_size?"),
    quick("text for a block size", "--method.quantize nf4 --method.quantize.block_size big", "expected one of 32, 64"),
    quick("an option of another mode", "--config quantize/nf4 --method.quantize.mode int8", "no option 'double_quant'"),
    quick(
        "an option without a mode",
        "--method.quantize.double_quant true",
        "names no mode; modes: fp4, int8, int8_torchao, nf4",
    ),
    quick(
        "layers to leave alone that are not there",
        "--config quantize/nf4 --method.quantize.skip_modules [lm_head]",
        "skip_modules 'lm_head' matches nothing. Layers: classifier, k_lin",
    ),
    quick(
        "an expression that is none",
        '--config quantize/nf4 --method.quantize.skip_modules ["re:("]',
        "skip_modules: 're:(' is no regular expression",
    ),
    quick(
        "all layers left alone",
        '--config quantize/nf4 --method.quantize.skip_modules ["*"]',
        "Left alone: 24 of 26, such as model.distilbert.transformer.layer.0.attention.q_lin (skip_modules names it)",
    ),
    quick("4 bit with nothing frozen", "--method FullFineTuning --method.quantize nf4", "q_lin (it trains)"),
    Mistake(
        "an option of 4 bit for an adapter, without its mode",
        ["predict", "--adapter", "{nf4}", "--text", "a great movie", "--method.quantize.block_size", "128"],
        "give --method.quantize.mode nf4, as in training",
    ),
    quick(
        "Lightning's plugin for 4 bit",
        "--trainer.plugins BitsandbytesPrecision --trainer.plugins.mode nf4",
        "Leave the plugin out and let the method quantise the base",
    ),
    quick("that plugin without a mode", "--trainer.plugins BitsandbytesPrecision", "Leave the plugin out and let"),
    quick("16-true", "--trainer.precision 16-true --method.quantize nf4", "float16 adapters underflow; use 16-mixed"),
    quick("an optimizer misspelt", "--model.optimizer PagedAdam8bits", "Did you mean 'PagedAdamW8bit'?"),
    # options, verbs and configurations
    quick("an unknown argument", "--data.batchsize 8", "no argument 'batchsize'. Did you mean 'batch_size'?"),
    Mistake(
        "an argument that a data set fixes",
        ["fit", "--config", "wikitext2/lora_causal", "--config", "offline", "--data.document", "row"],
        "WikiText2DataModule has no argument 'document'. It has path, name, text_column, prompt_column, completion",
    ),
    quick("an optimizer beside the model's", "--optimizer.lr 1e-3", "--model.learning_rate"),
    quick("an abbreviated option", "--trainer.max_epoch 3", "Did you mean 'trainer.max_epochs'?"),
    quick("an unknown section", "--datas.batch_size 8", "Did you mean 'data', as in --data.batch_size?"),
    Mistake("another tool's verb", ["train", "--config", "quickstart"], "unknown verb 'train'. Did you mean 'fit'?"),
    Mistake("no configuration", ["fit"], "nothing says which data, method, model to use"),
    Mistake("a configuration misspelt", ["fit", "--config", "quickstrat"], "Did you mean 'quickstart'?"),
    Mistake("broken YAML", ["fit", "--config", "{broken}"], "line 3, column 1: this is not YAML"),
    Mistake("an unknown key in a file", ["fit", "--config", "{typo}", *QUICK[1:]], "Did you mean 'method'?"),
    Mistake("a folder that is no run", ["predict", "--run", "{folder}"], "is not the folder of a run"),
    Mistake("a verb without weights", ["test", "--config", "quickstart"], "test needs the weights of a run"),
    quick("a learning rate of 0", "--model.learning_rate 0", "model.learning_rate must be a number above 0, not 0.0"),
    quick("nothing to train", "--trainer.max_epochs 0", "trainer.max_epochs is 0: fit would train nothing"),
    quick("a package that is missing", "--trainer.logger WandbLogger", "Requirement 'wandb>=0.12.10' not met"),
    quick("a class that is not there", "--model my_package.Net", "There is no module 'my_package'"),
    quick("null for a number", "--method.r null", "method.r is null, expected a value such as 16"),
    quick("a list for a mapping", "--method.rank_pattern [3]", "expected a mapping or null, not '[3]'"),
    quick("a negative seed", "--seed_everything -1", "seed_everything: -1 is not in bounds"),
    quick("weights of classes that are all 0", "--model.class_weights [0,0]", "expected numbers from 0, not all of"),
    # data
    Mistake("no data", ["fit", "--config", "text_classification/lora"], "data.path is empty: give --data.path FILE"),
    quick("a missing file", "--data.path {folder}/trian.csv", "No such file or folder"),
    quick("a missing column", "--data.path {csv} --data.text_column sentense", "No column 'sentense' in"),
    quick("data without labels", "--data.path {unlabelled}", "have no label"),
    quick("one class alone", "--data.path {one_class}", "There is one class alone, 'good', in"),
    quick("an empty text", "--data.path {blank}", "has 1 empty text, the first in row 2 of 3"),
    quick("an empty file", "--data.path {empty}", "is empty: it has 0 bytes"),
    quick("a file that is not UTF-8", "--data.path {latin}", "is not UTF-8: byte 0xe9 at offset 18, in line 2"),
    quick("a line of 10 MB", "--data.path {endless}", "has 10,000,000 characters in column 'sentence'"),
    quick("a stray quote", "--data.path {stray}", "the quote opened in the row of line 2 is closed in line 4"),
    quick("a stray quote, closed by another", "--data.path {stray_pair}", "takes in 3 lines, each of which is a row"),
    quick("semicolons in a csv", "--data.path {semicolons}", "are parted by ',', these by ';'"),
    quick("labels that train does not have", "--data.path {unseen}", "have labels that are not in train"),
    quick("one column for text and label", "--data.label_column sentence", "which is the column of a text too"),
    quick(
        "a truncation misspelt", "--data.truncation head-tail", "expected one of head, tail, head+tail, not 'head-tail'"
    ),
    quick(
        "windows that share all that they hold",
        "--data.windows true --data.window_overlap 62",
        "data.window_overlap is 62, expected less than 62",
    ),
    quick("texts cut off whole", "--data.max_length 2", "of that 2 are marks of the tokenizer"),
    # trainer
    quick("devices below 1", "--trainer.devices -3", "trainer: `devices` selected with"),
    quick("no batch to accumulate", "--trainer.accumulate_grad_batches 0", "must be at least 1, not 0"),
    quick("validation after no step", "--trainer.val_check_interval 0", "must be a number above 0, not 0"),
    quick("a callback misspelt", "--trainer.callbacks EarlyStoping", "Did you mean 'EarlyStopping'?"),
    quick("a callback without what it wants", "--trainer.callbacks EarlyStopping", "give --trainer.callbacks.monitor"),
    quick("two methods of one name", "--trainer.callbacks lit_peft.LoRA", "2 methods are named 'default'"),
    quick("early stopping switched off", "--early_stopping null", "early_stopping takes options"),
    quick("a GPU that is not there", "--trainer.accelerator gpu", "this machine has no GPU; use auto or cpu"),
    quick("a precision that is none", "--trainer.precision bf61-true", "Did you mean 'bf16-true'?"),
    quick(
        "an unknown monitor", "--checkpoint.monitor val/los", "validation logs no 'val/los'. Did you mean 'val/nll'?"
    ),
    quick("accuracy as a loss", "--early_stopping.monitor val/acc", "set early_stopping.mode to max"),
    Mistake("a GPU of less than nothing", ["plan", "--config", "quickstart", "--gpu", "-5GiB"], "a size above 0, such"),
    quick("a value that looks like an option", "--data.text_column -x", "As a value: --data.text_column=-x."),
    quick("an option without a value", "--data.text_column", "--data.text_column needs a value."),
    # checkpoints
    quick("a missing checkpoint", "--ckpt_path {folder}/lost.ckpt", "No such file or folder"),
    quick("a truncated checkpoint", "--ckpt_path {truncated}", "is no checkpoint, or is cut off"),
    quick("a damaged checkpoint", "--ckpt_path {damaged}", "is damaged inside: its checksums do not match"),
    quick("a file that is no checkpoint", "--ckpt_path {csv}", "is no checkpoint, or is cut off"),
    quick("a checkpoint of plain Lightning", "--ckpt_path {foreign}", "was not written by a lit-peft method"),
    quick("a checkpoint whose record was edited", "--ckpt_path {edited}", "entry 'lit_peft' lacks 'fingerprint'"),
    Mistake(
        "an adapter folder with a flipped bit",
        ["predict", "--adapter", "{flipped}", "--text", "a great movie"],
        "is not as it was saved, its digest does not match",
    ),
    Mistake("inspecting a folder of something else", ["inspect", "{folder}"], "is no run and no adapter"),
    Mistake("inspecting a whole model", ["inspect", "{base}"], "a whole model of transformers (DistilBertForMaskedLM)"),
    Mistake("inspecting a checkpoint of plain Lightning", ["inspect", "{foreign}"], "that no lit-peft method wrote"),
    quick(
        "a base of the same shape, not that of the checkpoint",
        "--ckpt_path {best} --model.backbone {base}",
        "belongs to another base model",
    ),
    quick(
        "a checkpoint of another method", "--ckpt_path {best} --method BitFit", "made with lit_peft.methods.LoRA, not"
    ),
    quick("a checkpoint of another rank", "--ckpt_path {best} --method.r 8", "made with LoRA(r=4), not 8"),
    # runs that go on
    Mistake(
        "another storage of the base for a run that goes on",
        ["fit", "--run", "{run}", "--method.quantize", "int8"],
        "made with LoRA(quantize=None), not 'int8'.",
    ),
    Mistake(
        "a tokenizer of another model",
        [*QUICK, "--data.tokenizer", "demo-decoder"],
        "data.tokenizer: demo-decoder has ids up to 1,010, demo embeds 602 tokens. Leave data.tokenizer out",
    ),
    Mistake(
        "another rate for a run that goes on",
        ["fit", "--run", "{run}", "--model.learning_rate", "0.5"],
        "The optimizer's learning rate is 0.5, and was 0.002 when this run began",
    ),
    Mistake(
        "another storage of the base for a test of a run",
        ["test", "--run", "{run}", "--method.quantize", "int8"],
        "LoRA(quantize=None), not 'int8'. For another one, give the run's adapter and no checkpoint: --adapter /",
    ),
    Mistake(
        "other data for a run that goes on",
        ["fit", "--run", "{cut}", "--data.path", "{other}"],
        "A fit that resumes goes on with the data that it began with",
    ),
    Mistake(
        "a test on rows that were trained on",
        ["test", "--run", "{cut}", "--data.seed", "3"],
        "Which rows had been held out of it can no longer be told",
    ),
    Mistake(
        "a test on a copy of what was trained on",
        ["test", "--run", "{cut}", "--data.path", "{copy}"],
        "32 of 32 rows to test have a text that this run was trained on",
    ),
    Mistake("a run that another process trains", ["fit", "--run", "{busy}"], "another process is training in this"),
    # handing over
    Mistake("merge without paths", ["merge"], "merge takes two paths, and none is given"),
    Mistake("merge without a new folder", ["merge", "{run}"], "merge takes two paths, not 1"),
    Mistake("a folder that is not empty", ["merge", "{run}", "{folder}"], "exists and is not empty; name another"),
    Mistake("the folder one is in as a new one", ["merge", "{run}", "."], "name a new folder in it"),
    Mistake("a new folder by an option", ["merge", "{run}", "--out", "out"], "as its second path, without --out"),
    Mistake("a file in the place of a new folder", ["export", "{run}", "{csv}"], "is a file; name a folder"),
    Mistake("neither a run nor an adapter", ["merge", "{folder}", "out"], "is neither the folder of a run"),
    Mistake("a whole model", ["merge", "{base}", "out"], "It is a whole model, with nothing to fold in"),
    Mistake("a checkpoint without its run", ["merge", "{foreign}", "out"], "lies in no run's folder"),
    Mistake("a run without a checkpoint", ["merge", "{young}", "out"], "so that there is nothing to merge"),
    Mistake("a method that does not merge", ["merge", "{bottleneck}", "out"], "BottleneckAdapter cannot be merged"),
    Mistake("a 4-bit base and no --into", ["merge", "{nf4}", "out"], "say into what its adapter is to be folded"),
    Mistake(
        "--into of a base in floats", ["merge", "{run}", "out", "--into", "requantized"], "is not quantised: leave"
    ),
    Mistake("a method that HF PEFT lacks", ["export", "{bottleneck}", "out"], "HF PEFT has no such method"),
    Mistake("a format that is none", ["export", "{run}", "out", "--format", "onnx"], "expected hf-peft, not 'onnx'"),
    # files and disks
    quick("a file where a folder belongs", "--trainer.default_root_dir {csv}", "is a file, expected a folder"),
    quick(
        "the folder of another run",
        "--trainer.logger TensorBoardLogger --trainer.logger.save_dir {parent} --trainer.logger.name= "
        "--trainer.logger.version {name}",
        "holds a run already",
    ),
    Mistake(
        "predictions over a file that exists",
        ["predict", "--run", "{run}", "--predictions", "{csv}"],
        "exists; name another file",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Files that are right or wrong in one way each, by the names that the mistakes use."""
    root = tmp_path_factory.mktemp("mistakes")
    folder = root / "folder"
    folder.mkdir()
    table = "sentence,label\n"
    (folder / "train.csv").write_text(table + "a fine film,good\na dull film,bad\n" * 20)
    (root / "other.csv").write_text(table + "a long film,good\na dull film,bad\n" * 20)
    (root / "copy.csv").write_text(table + "a fine film,good\na dull film,bad\n" * 25)
    (root / "unlabelled.csv").write_text("sentence,label\na fine film,\na dull film,\n")
    (root / "broken.yaml").write_text("method:\n  class_path: [LoRA\n")
    (root / "typo.yaml").write_text("methd:\n  class_path: LoRA\n")
    (root / "one_class.csv").write_text(table + "a fine film,good\n" * 9)
    (root / "blank.csv").write_text(table + "a fine film,good\n,bad\na dull film,bad\n")
    (root / "empty.csv").touch()
    (root / "latin.csv").write_bytes(table.encode() + b"caf\xe9,good\n")
    (root / "endless.csv").write_text(table + "a dull film,bad\n" + "x" * 10_000_000 + ",good\n")
    (root / "stray.csv").write_text(table + '"a fine film,good\na dull film,bad\n"the film,good\n')
    (root / "stray_pair.csv").write_text(table + '"a film,good\na dull film,bad\nthe film",good\na film,bad\n' * 2)
    (root / "semicolons.csv").write_text("sentence;label\na fine film;good\na dull film;bad\n")
    (root / "unseen").mkdir()
    (root / "unseen" / "train.csv").write_text((folder / "train.csv").read_text())
    (root / "unseen" / "test.csv").write_text(table + "a long film,ugly\n")
    run = fit(root / "runs", *QUICK[1:])
    cut = fit(root / "runs", *QUICK[1:], "--data.path", str(folder / "train.csv"))
    busy = root / "runs" / "busy"
    shutil.copytree(cut, busy)
    hold = f"from lit_peft.runs import Path, lock_folder; lock_folder(Path({str(busy)!r}))"
    code = f"import time; {hold}; print(flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    last = run / "checkpoints" / "last.ckpt"
    (root / "truncated.ckpt").write_bytes(last.read_bytes()[:2000])
    content = torch.load(last, weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "lit_peft"}, root / "foreign.ckpt")
    record = {k: v for k, v in content["lit_peft"].items() if k != "fingerprint"}
    torch.save(content | {"lit_peft": record}, root / "edited.ckpt")
    shutil.copytree(run / "adapter", root / "flipped")
    flipped = bytearray((root / "flipped" / "adapter_model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (root / "flipped" / "adapter_model.safetensors").write_bytes(flipped)
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (root / "damaged.ckpt").write_bytes(damaged)
    shutil.copytree(ENCODER, root / "base")
    weights = load_file(root / "base" / "model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, root / "base" / "model.safetensors", {"format": "pt"})
    (root / "young").mkdir()
    shutil.copy(run / "config.yaml", root / "young")
    task = TextClassification(label_names=["bad", "good"])
    task.configure_model()
    BottleneckAdapter().attach(task)
    save(task, root / "bottleneck")
    BottleneckAdapter().detach(task)
    LoRA(r=2, quantize="nf4").attach(task)
    save(task, root / "nf4")
    yield {
        **{path.stem: str(path) for path in root.iterdir() if path.is_file()},
        "base": str(root / "base"),
        "flipped": str(root / "flipped"),
        "csv": str(folder / "train.csv"),
        "folder": str(folder),
        "best": str(last),
        "run": str(run),
        "parent": str(run.parent),
        "name": run.name,
        "cut": str(cut),
        "busy": str(busy),
        "unseen": str(root / "unseen"),
        "young": str(root / "young"),
        "bottleneck": str(root / "bottleneck"),
        "nf4": str(root / "nf4"),
    }
    other.kill()
    other.wait()


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, tuple[str, str]]]:
    """Collects what each mistake prints; at the end the table in the docs must hold just that."""
    found: dict[str, tuple[str, str]] = {}
    yield found
    if not found.keys() >= {mistake.what for mistake in MISTAKES}:
        return  # not all were run
    text = DOCS.read_text() if DOCS.is_file() else ""
    rows = {what: f"| {what} | `{command}` | {answer} |\n" for what, (command, answer) in found.items()}
    for what in DISKS.keys() - rows.keys():  # where mounting is not allowed, they stand as they are
        rows[what] = next((f"{line}\n" for line in text.splitlines() if line.startswith(f"| {what} |")), "")
    table = "".join(rows[what] for what in (*(mistake.what for mistake in MISTAKES), *DISKS))
    head = text.partition("|---|---|---|\n")[0] or HEAD
    if os.environ.get("LIT_PEFT_WRITE_DOCS") == "1":
        DOCS.write_text(f"{head}|---|---|---|\n{table}")
    assert DOCS.read_text() == f"{head}|---|---|---|\n{table}", "docs/errors.md is old; see the top of this file"


HEAD = """# Mistakes, and what `lit-peft` says of them

Each ends the command with status 2; `LIT_PEFT_TRACEBACK=1` lets the exception through instead. `…` stands for
`--config quickstart`, and names in capitals for files. The table is written by `tests/test_mistakes.py`.

| mistake | command | answer |
"""


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a mistake prints: one to three lines, after which the program ends with status 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in error
    lines = error[error.index("lit-peft: ") :].strip().splitlines()
    assert 1 <= len(lines) <= 3
    return "\n".join(lines)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_told_in_a_few_lines(
    mistake: Mistake,
    files: dict[str, str],
    answers: dict[str, tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(**files) if "{" in word else word for word in mistake.arguments]
    if mistake.arguments[0] in ("fit", "test") and "--trainer.default_root_dir" not in arguments:
        arguments += ["--trainer.default_root_dir", str(tmp_path / "runs")] * (len(arguments) > 1)
    answer = told(capsys, arguments)
    assert mistake.answer in answer
    answers[mistake.what] = _for_the_docs(mistake, answer, files)


def _for_the_docs(mistake: Mistake, answer: str, files: dict[str, str]) -> tuple[str, str]:
    """The command and the answer with what differs from machine to machine, or between runs, put in capitals."""
    words = " ".join(["lit-peft", *mistake.arguments]).replace(" ".join(QUICK), "fit …")
    command = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), words)
    for name, path in sorted(files.items(), key=lambda item: -len(item[1])):
        if "/" in path:
            answer = answer.replace(path, name.upper())
    answer = answer.replace(str(Path.cwd()), "HERE")
    answer = re.sub(r"\d[\d,]* bytes", "N bytes", answer)
    answer = re.sub(r"(?<=of Lightning )[\d.]+\d", "VERSION", answer)
    return command, answer.removeprefix("lit-peft: ").replace("|", "\\|").replace("\n", "<br>")


@pytest.mark.parametrize(
    "form",
    [
        ["--config", "plugin.yaml"],
        ["--config", "plugins.yaml"],
        ["--trainer.plugins", "[BitsandbytesPrecision]"],
        ["--trainer.plugins+", "BitsandbytesPrecision"],
        ["--trainer.plugins", "BitsandbytesPrecision", "--trainer.plugins.mode", "nf5"],
        ["--trainer", "{plugins: BitsandbytesPrecision}"],
    ],
    ids=" ".join,
)
def test_the_plugin_for_4_bit_is_refused_in_every_form(
    form: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plugin.yaml").write_text("trainer: {plugins: {class_path: BitsandbytesPrecision}}")
    Path("plugins.yaml").write_text("trainer: {plugins: [{class_path: BitsandbytesPrecision}]}")
    assert told(capsys, [*QUICK, *form]).startswith("lit-peft: trainer.plugins: BitsandbytesPrecision turns every")


def test_a_plugin_that_was_taken_back_is_not_told_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_text("trainer: {plugins: {class_path: BitsandbytesPrecision}}")
    words = ["--config", str(tmp_path / "plugin.yaml"), "--trainer.plugins", "null", "--method.alpha", "big"]
    assert "method.alpha: expected a number" in told(capsys, [*QUICK, *words])


def test_the_environment_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_PEFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"set early_stopping\.mode to max"):
        cli.main([*QUICK, "--early_stopping.monitor", "val/acc", "--trainer.default_root_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="is not YAML"):
        (tmp_path / "broken.yaml").write_text("a: [")
        cli.main(["fit", "--config", str(tmp_path / "broken.yaml")])


def mounted(folder: Path, *options: str) -> Callable[[], None] | None:
    """Mounts a memory file system of 1 MB on a folder; what takes it off again, None where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", str(folder)])
    return None if done.returncode else lambda: subprocess.run(["umount", "-l", str(folder)], check=True) and None


DISKS = {
    "a folder without write permission": (("ro",), 0, "trainer.default_root_dir: Read-only file system"),
    "a full disk": ((), 700_000, "No space left on device"),
}


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="mounting needs root on Linux")
@pytest.mark.parametrize("what", DISKS)
def test_a_disk_that_takes_nothing(
    what: str, answers: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options, filled, expected = DISKS[what]
    release = mounted(tmp_path / "disk", *options)
    if release is None:
        pytest.skip("mounting is not allowed here")
    try:
        if filled:
            (tmp_path / "disk" / "other").write_bytes(bytes(filled))
        arguments = [*QUICK, "--resume_every", "1", "--trainer.default_root_dir", str(tmp_path / "disk" / "runs")]
        answer = told(capsys, arguments)
        assert expected in answer
        assert not list((tmp_path / "disk").rglob("*.part"))  # nothing half-written stays behind
        for path in (tmp_path / "disk").rglob("*.ckpt"):
            torch.load(path, weights_only=True)
        answer = answer.replace(str(tmp_path / "disk"), "DISK")
        mistake = Mistake(what, [*QUICK, "--trainer.default_root_dir", "{disk}/runs"], expected)
        answers[what] = _for_the_docs(mistake, answer, {})
    finally:
        release()


@pytest.mark.parametrize("size", [300, 1200])
def test_a_prepared_data_set_that_is_cut_short_is_told_with_its_folder(tmp_path, size):
    tokens = Dataset.from_dict({"ids": [[1, 2, 3]] * 500})
    tokens.map(lambda row: row, cache_file_name=str(tmp_path / "a.arrow"))
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:size])
    with pytest.raises((ValueError, OSError)) as error:  # in its head, or behind it
        Dataset.from_file(str(tmp_path / "a.arrow"))
    assert re.search(r"A prepared data set in /.* is cut short .* delete that folder", of_built(error.value))
