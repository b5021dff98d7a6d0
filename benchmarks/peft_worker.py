"""HF PEFT's adapter in a task of ours, with the settings of a recipe: one run, in a process of its own.

    python benchmarks/peft_worker.py lora --config sst2/lora --model.backbone models/minilm --data.path data/sst2 \
        --model.learning_rate 1e-3 --trainer.default_root_dir runs/peft_lora

Any key of the recipe can be changed behind it, as for `lit-peft fit`, but for those of `method`, which are ours. The
adapter trains in our task, data and trainer, with the recipe's early stopping and best checkpoint; metrics.json and
monitor.json go to the root. Needs the dev extra (peft).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import peft
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from run_monitor import RunMonitor
from transformers import BitsAndBytesConfig

from lit_peft import hub
from lit_peft.arguments import MAPPINGS, configs, options, take
from lit_peft.callbacks.speed import SpeedMonitor
from lit_peft.callbacks.tables import count_parameters
from lit_peft.class_path import imported
from lit_peft.tasks import CausalLanguageModeling, TextClassification

LAYERS: dict[str, dict[str, list[str]]] = {
    "distilbert": {
        "attention": ["q_lin", "k_lin", "v_lin", "out_lin"],
        "ffn": ["lin1", "lin2"],
        "ia3": ["k_lin", "v_lin", "lin2"],
        "ffn_down": ["lin2"],
    },
    "gpt2": {
        "attention": ["attn.c_attn", "attn.c_proj"],
        "ffn": ["mlp.c_fc", "mlp.c_proj"],
    },
}
"""By architecture what our recipes mean by their target_modules, in HF PEFT's names."""


class Theirs:
    """Mixed into a task of ours: puts HF PEFT's adapter into its model."""

    task_type: ClassVar[str]
    head: ClassVar[list[str]]
    """Modules that no method adapts and no storage quantises."""
    trains_head: ClassVar[bool]

    def __init__(self, method: str, **task: Any) -> None:
        optimizer = task.pop("optimizer", None)
        super().__init__(**task)
        self.method = method
        self.optimizer_class = imported(optimizer or "torch.optim.AdamW")
        # bitsandbytes' layers save the constants of their frozen codes, and cannot load them into a live model.
        self.strict_loading = method != "qlora"

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            if self.method == "qlora":
                self.model = self.in_4_bit()
            with torch.device("cpu"):  # in Lightning's context, the GPU's, VeRA's generator would not fit its tensors
                self.model = peft.get_peft_model(self.model, self.configuration(self.model.config))

    def in_4_bit(self) -> Any:
        """The model again, as transformers loads it with bitsandbytes."""
        storage = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=self.head,
        )
        device = self.trainer.strategy.root_device
        model = type(self.model).from_pretrained(
            hub.locate(self.backbone),
            config=self.model.config,
            dtype=self.base_dtype,
            quantization_config=storage,
            device_map=None if device.type == "cpu" else {"": device},
        )
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # evaluation on a CPU would pack weights, and training end
        return model.train()

    def configuration(self, base: Any) -> Any:
        layers = LAYERS[base.model_type]
        common: dict[str, Any] = {"task_type": self.task_type}
        if self.trains_head:
            common["modules_to_save"] = self.head
        attention = {"target_modules": layers["attention"], **common}
        # GPT-2's layers hold their weights transposed; in 4 bit they are linear ones.
        fused = {"fan_in_fan_out": base.model_type == "gpt2" and self.method != "qlora"}
        lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **attention, **fused}
        shape = {"token_dim": base.hidden_size, "num_layers": base.num_hidden_layers}
        prompt = {"num_virtual_tokens": 20, "num_attention_heads": base.num_attention_heads, **shape}
        prompt["task_type"] = self.task_type
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "lora": lambda: peft.LoraConfig(**lora),
            "qlora": lambda: peft.LoraConfig(
                **{"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, **common, **fused},
                target_modules=layers["attention"] + layers["ffn"],
            ),
            "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
            "hira": lambda: peft.HiraConfig(r=32, **attention, **fused),
            "adalora": lambda: peft.AdaLoraConfig(
                **{"init_r": 12, "target_r": 8, "lora_alpha": 12, **attention, **fused},
                **{"total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10},
            ),
            "vera": lambda: peft.VeraConfig(r=256, **attention, **fused),
            "ia3": lambda: peft.IA3Config(
                target_modules=layers["ia3"], feedforward_modules=layers["ffn_down"], **common, **fused
            ),
            "prompt_tuning": lambda: peft.PromptTuningConfig(**prompt),
            "p_tuning": lambda: peft.PromptEncoderConfig(**prompt),
        }[self.method]()

    def configure_optimizers(self) -> Any:
        """Ours, which would take their adapters for weights of the base: those decay by `adapter_weight_decay`."""
        head = {id(p) for name, p in self.named_parameters() if "modules_to_save" in name}

        def optimizer(groups: list[dict[str, Any]]) -> Any:
            split = []
            for group in groups:
                for own, decay in ((True, 1.0), (False, self.adapter_weight_decay)):
                    if params := [p for p in group["params"] if (id(p) in head) is own]:
                        split.append({**group, "params": params, "weight_decay": min(group["weight_decay"], decay)})
            return self.optimizer_class(split)

        self.optimizer = optimizer
        return super().configure_optimizers()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.method == "adalora":
            self.model.base_model.update_and_allocate(self.trainer.global_step)


class TheirClassifier(Theirs, TextClassification):
    """Classifies texts."""

    task_type, head, trains_head = "SEQ_CLS", ["pre_classifier", "classifier"], True
    methods = ("lora", "qlora", "dora", "hira", "adalora", "ia3", "vera", "prompt_tuning", "p_tuning")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss  # theirs, to which AdaLoRA adds its penalty


class TheirDecoder(Theirs, CausalLanguageModeling):
    """Predicts the next token, by the loss of our task, which knows no penalty and no virtual tokens of HF PEFT's."""

    task_type, head, trains_head = "CAUSAL_LM", ["lm_head"], False
    methods = ("lora", "qlora", "dora", "hira")


TASKS: dict[str, type[Any]] = {"TextClassification": TheirClassifier, "CausalLanguageModeling": TheirDecoder}


def _numbers(value: Any) -> Any:
    """YAML's 1e-3, which PyYAML takes for a word, as the number that it is."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def settings(words: Sequence[str]) -> dict[str, Any]:
    """What the recipe `--config` says, with what the options behind it change.

    Raises:
        ValueError: For an option that HF PEFT's run cannot follow.
    """
    words, names = take(words, "--config")
    content = yaml.safe_load(configs()[names[0]].read_text())
    for _, _, flag, value in options(words):
        section, _, key = flag.removeprefix("--").partition(".")
        if key and section in ("model", "data"):
            content[section]["init_args"][key] = yaml.safe_load(value)
        elif key and section in MAPPINGS:
            content[section][key] = yaml.safe_load(value)
        elif not key and section in ("seed_everything", "base_test", "resume_every"):
            content[section] = yaml.safe_load(value)
        else:
            raise ValueError(f"{flag} is no option of HF PEFT's run.")
    return _numbers(content)


def task_and_data(method: str, recipe: dict[str, Any]) -> tuple[Any, pl.LightningDataModule]:
    """HF PEFT's adapter in the task of a recipe, and its data."""
    task = TASKS[recipe["model"]["class_path"].rpartition(".")[2]]
    data = imported(recipe["data"]["class_path"])(**recipe["data"]["init_args"])
    return task(method, **recipe["model"]["init_args"]), data


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0].startswith("-"):
        raise SystemExit(__doc__)
    recipe = settings(words[1:])
    pl.seed_everything(recipe["seed_everything"], verbose=False)
    model, data = task_and_data(words[0], recipe)
    root = recipe["trainer"]["default_root_dir"]
    best = ModelCheckpoint(root, **recipe["checkpoint"], save_on_train_epoch_end=False, enable_version_counter=False)
    stopper = EarlyStopping(**recipe["early_stopping"], check_on_train_epoch_end=False)
    speed = SpeedMonitor()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**recipe["trainer"] | quiet, callbacks=[RunMonitor(), speed, stopper, best])
    trainer.fit(model, data)
    weights: dict[str, Any] = {"ckpt_path": best.best_model_path, "verbose": False, "weights_only": False}
    scores = dict(trainer.validate(model, data, **weights)[0])
    if trainer.limit_test_batches:
        scores |= trainer.test(model, data, **weights)[0]
    Path(best.best_model_path).unlink()  # holds the whole base
    counts = count_parameters(model)  # of packed weights by what they stand for, as in rows of ours
    scores |= {"params/trainable": counts.trainable, "params/trainable_share": counts.share}
    scores |= {"time/train_s": speed.train_s, "memory/peak_bytes": speed.peak_bytes}
    Path(root, "metrics.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
