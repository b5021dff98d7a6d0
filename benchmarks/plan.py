"""Peak memory of a training step as planned beside what a GPU measures, over methods, storages and precisions.

    python benchmarks/plan.py                                # all cases, which need a GPU with 40 GiB
    python benchmarks/plan.py --cases minilm llama-1b        # those whose names begin so
    python benchmarks/plan.py --cases llama-8b               # the 8 B shape, in 4 bit

Random weights and tokens. A measured step is Lightning's (forward, gradients to None, backward, AdamW), the third of
three, its model built and quantised on the GPU. Without a GPU, prints what is planned alone. Cases on Liger's kernels,
named so, are there with the extra liger. Prints a table, then one line of JSON; ends with status 1 where a plan is off
by more than 10 % and 64 MiB.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from lit_peft.methods import DoRA, FullFineTuning, HiRA, LoRA
from lit_peft.methods.base import Method
from lit_peft.planning import plan
from lit_peft.training.liger import is_installed, use_liger

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One row: a model, a method, a batch and how they are computed."""

    name: str
    build: Callable[[], nn.Module]
    method: Callable[[], Method]
    size: tuple[int, int]
    precision: str = "32-true"
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    mask: bool = False
    liger: bool = False


def llama(layers: int, width: int, inner: int, vocabulary: int = 32_000) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=width // 64 if width < 4096 else width // 128,
                num_key_value_heads=max(1, width // 256) if width < 4096 else width // 512,
                use_cache=False,
            )
        )

    return build


def minilm() -> nn.Module:
    """DistilBERT's architecture at the size of all-MiniLM-L6."""
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=384, hidden_dim=1536, n_layers=6, n_heads=12, vocab_size=30_522)
    )


def cases() -> list[Case]:
    every: dict[str, Callable[..., Method]] = {"lora": LoRA, "dora": DoRA, "hira": HiRA}
    half = torch.bfloat16
    found = []

    def of(cls: Callable[..., Method], quantize: str | None, **more: Any) -> Callable[[], Method]:
        return lambda: cls(r=16, target_modules="all-linear", quantize=quantize, **more)

    for precision in ("bf16-mixed", "32-true"):
        for name, cls in every.items():
            for mode in (None, "nf4", "int8"):
                method = of(cls, mode, train_also=["*classifier"])
                label = f"minilm {name} {mode or 'plain'} {precision}"
                found.append(Case(label, minilm, method, (64, 128), precision, mask=True))
        found.append(Case(f"minilm full {precision}", minilm, FullFineTuning, (64, 128), precision, mask=True))
    small, billion = llama(12, 768, 2048), llama(16, 2048, 8192, 128_256)
    for mode in (None, "nf4", "int8"):
        for name, cls in every.items():
            found.append(Case(f"llama-100m {name} {mode or 'plain'}", small, of(cls, mode), (8, 512), dtype=half))
        for checkpointing in (False, True):
            label = f"llama-1b lora {mode or 'plain'}{' checkpointing' if checkpointing else ''}"
            found.append(Case(label, billion, of(LoRA, mode), (4, 1024), "32-true", half, checkpointing))
    found += [
        Case("llama-100m full bf16-true", small, FullFineTuning, (8, 512), "bf16-true", half),
        Case("llama-100m full bf16-mixed", small, FullFineTuning, (8, 512), "bf16-mixed"),
        Case("llama-1b dora nf4", billion, of(DoRA, "nf4"), (4, 1024), dtype=half),
        Case("llama-1b hira nf4", billion, of(HiRA, "nf4"), (4, 1024), dtype=half),
        Case("llama-1b full bf16-true", billion, FullFineTuning, (4, 1024), "bf16-true", half),
    ]
    large, eight = llama(32, 4096, 14_336, 128_256), of(LoRA, "nf4", dropout=0.0)
    for liger in (False, True):
        for checkpointing in (False, True):
            label = f"llama-8b lora nf4{' checkpointing' if checkpointing else ''}{' liger' if liger else ''}"
            found.append(Case(label, large, eight, (4, 1024), "32-true", half, checkpointing, liger=liger))
    found += [
        Case("llama-100m lora plain bf16-mixed liger", small, of(LoRA, None), (8, 512), "bf16-mixed", liger=True),
        Case("llama-100m full bf16-mixed liger", small, FullFineTuning, (8, 512), "bf16-mixed", liger=True),
        Case("llama-1b full bf16-true liger", billion, FullFineTuning, (4, 1024), "bf16-true", half, liger=True),
    ]
    return [case for case in found if not case.liger or is_installed()]


def batch(case: Case, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 30_000, case.size) if device != "meta" else torch.zeros(case.size, dtype=torch.int64)
    classifies = case.build is minilm
    made = {"input_ids": ids, "labels": ids[:, 0].clamp(0, 1) if classifies else ids}
    if case.mask:
        made["attention_mask"] = torch.ones_like(ids)
        made["attention_mask"][:, -1] = 0  # padded, or transformers would leave the mask out
    return {key: value.to(device) for key, value in made.items()}


def prepare(case: Case) -> Callable[[Any], object] | None:
    return (lambda m: m.gradient_checkpointing_enable({"use_reentrant": False})) if case.checkpointing else None


def planned(case: Case) -> Any:
    with torch.device("meta"):
        model = case.build().to(case.dtype).train()
    if case.liger:
        use_liger(model, torch.device("cuda"))
    return plan(
        model, case.method(), batch(case, "meta"), precision=case.precision, prepare=prepare(case), name=case.name
    )


def on_gpu(case: Case) -> nn.Module:
    """The adapted model, its weights made on the GPU and quantised there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device("cuda"):
            model = case.build().train()
    finally:
        torch.set_default_dtype(before)
    if case.liger:
        use_liger(model)
    case.method().attach(model, torch.bfloat16 if case.precision == "bf16-true" else None)
    return model


def measured(case: Case) -> tuple[int, float]:
    """Bytes at the peak of a step, and seconds that it takes."""
    gc.collect()
    torch.cuda.empty_cache()
    model = on_gpu(case)
    if (make := prepare(case)) is not None:
        make(model)
    inputs = batch(case, "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=case.precision == "bf16-mixed"):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        del loss
        optimizer.step()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of names")
    args = parser.parse_args()
    chosen = [case for case in cases() if case.name.startswith(tuple(args.cases))]
    rows, off = [], 0
    print(f"{'case':<40}{'planned MiB':>12}{'measured':>10}{'error':>8}{'MiB':>8}{'plan s':>8}", flush=True)
    for case in chosen:
        start = time.perf_counter()
        found = planned(case)
        row: dict[str, Any] = {"case": case.name, "plan_s": time.perf_counter() - start, **found.as_dict()}
        line = f"{case.name:<40}{found.peak / MIB:>12,.0f}"
        if torch.cuda.is_available():
            row["measured"], row["step_s"] = measured(case)
            difference = found.peak - row["measured"]
            wrong = abs(difference) > max(64 * MIB, 0.1 * row["measured"])
            off += wrong
            line += f"{row['measured'] / MIB:>10,.0f}{difference / row['measured']:>8.1%}{difference / MIB:>8,.0f}"
        print(f"{line}{row['plan_s']:>8.1f}", flush=True)
        rows.append(row)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({"torch": torch.__version__, "device": device, "rows": rows}))
    sys.exit(off > 0)


if __name__ == "__main__":
    main()
