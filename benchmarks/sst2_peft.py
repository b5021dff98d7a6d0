"""HF PEFT's adapter in our task: what benchmarks/sst2.py trains beside our methods, one run a process.

python benchmarks/sst2_peft.py lora --backbone models/minilm --data data/sst2 --rate 1e-3 --out runs/peft_lora
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from transformers import BitsAndBytesConfig

from lit_peft import hub
from lit_peft.arguments import configs
from lit_peft.callbacks.speed import SpeedMonitor
from lit_peft.callbacks.tables import count_parameters
from lit_peft.data import SST2DataModule
from lit_peft.tasks import TextClassification

THEIRS = ("lora", "qlora", "dora", "hira", "adalora", "ia3", "vera", "prompt_tuning", "p_tuning")

HEAD = ["pre_classifier", "classifier"]


class Theirs(TextClassification):
    """Our task with HF PEFT's adapter in it."""

    def __init__(self, method: str, **task: Any) -> None:
        super().__init__(**task)
        self.method = method
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
            llm_int8_skip_modules=HEAD,
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
        attention = ["q_lin", "k_lin", "v_lin", "out_lin"]
        common: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": HEAD}
        lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": attention, **common}
        shape = {"token_dim": base.hidden_size, "num_layers": base.num_hidden_layers}
        prompt = {"num_virtual_tokens": 20, "num_attention_heads": base.num_attention_heads, "task_type": "SEQ_CLS"}
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "lora": lambda: peft.LoraConfig(**lora),
            "qlora": lambda: peft.LoraConfig(
                r=64, lora_alpha=16, lora_dropout=0.1, target_modules=[*attention, "lin1", "lin2"], **common
            ),
            "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
            "hira": lambda: peft.HiraConfig(r=32, target_modules=attention, **common),
            "adalora": lambda: peft.AdaLoraConfig(
                **{"init_r": 12, "target_r": 8, "lora_alpha": 12, "target_modules": attention, **common},
                **{"total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10},
            ),
            "vera": lambda: peft.VeraConfig(r=256, target_modules=attention, **common),
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_lin", "v_lin", "lin2"], feedforward_modules=["lin2"], **common
            ),
            "prompt_tuning": lambda: peft.PromptTuningConfig(**prompt, **shape),
            "p_tuning": lambda: peft.PromptEncoderConfig(**prompt, **shape),
        }[self.method]()

    def configure_optimizers(self) -> Any:
        """Ours, which would take their adapters for weights of the base: those decay by `adapter_weight_decay`."""
        head = {id(p) for name, p in self.named_parameters() if "classifier" in name}

        def optimizer(groups: list[dict[str, Any]]) -> AdamW:
            split = []
            for group in groups:
                for own, decay in ((True, 1.0), (False, self.adapter_weight_decay)):
                    if params := [p for p in group["params"] if (id(p) in head) is own]:
                        split.append({**group, "params": params, "weight_decay": min(group["weight_decay"], decay)})
            return AdamW(split)

        self.optimizer = optimizer
        return super().configure_optimizers()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss  # theirs, to which AdaLoRA adds its penalty

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.method == "adalora":
            self.model.base_model.update_and_allocate(self.trainer.global_step)


def data(args: argparse.Namespace, limit: int | None) -> SST2DataModule:
    path = {"path": args.data} if args.data else {}
    return SST2DataModule(**path, batch_size=64, max_length=128, test_split="validation", limit_train=limit)


def trainer(args: argparse.Namespace, **arguments: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(precision=args.precision, gradient_clip_val=1.0, **quiet, **arguments)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark on SST-2 takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="distilbert/distilbert-base-uncased")
    parser.add_argument("--data", default=None, help="a folder with SST-2's files; default: the hub's")
    parser.add_argument("--precision", default="32-true")
    return parser


def comparison(description: str | None) -> argparse.ArgumentParser:
    """The same with the methods to compare."""
    known = [name.removeprefix("methods/") for name in configs() if name.startswith("methods/")]
    parser = arguments(description)
    parser.add_argument("--methods", nargs="*", default=known, help=f"of {', '.join(known)}")
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS), help="methods of HF PEFT")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("method")
    parser.add_argument("--limit-train", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--adapter-decay", type=float, default=0.0, help="weight decay of the adapter's matrices")
    parser.add_argument("--out", required=True, help="folder for metrics.json")
    args = parser.parse_args()

    pl.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(args.out, "best", monitor="val/nll", save_on_train_epoch_end=False)
    speed = SpeedMonitor()
    loop, sentences = trainer(args, callbacks=[best, speed], max_epochs=3), data(args, args.limit_train)
    rates = {"learning_rate": args.rate, "adapter_weight_decay": args.adapter_decay}
    model = Theirs(args.method, backbone=args.backbone, **rates)
    loop.fit(model, sentences)
    scores: dict[str, float] = {}
    for score in (loop.validate, loop.test):
        scores |= score(model, sentences, ckpt_path=best.best_model_path, verbose=False, weights_only=False)[0]
    Path(best.best_model_path).unlink()  # holds the whole base
    counts = count_parameters(model)  # of packed weights by what they stand for, as in rows of ours
    scores |= {"params/trainable": counts.trainable, "params/trainable_share": counts.share}
    scores |= {"time/train_s": speed.train_s, "memory/peak_bytes": speed.peak_bytes}
    Path(args.out, "metrics.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
