"""Many adapters on one base: time to switch between them, beside loading anew; memory of 1, 8 and 64.

    python benchmarks/adapters.py                                        # DistilBERT's shape, CPU
    python benchmarks/adapters.py --model llama --device cuda            # a Llama of 1.2 B parameters, bfloat16
    python benchmarks/adapters.py --counts 1 2 --repeat 2 --layers 1     # small, to see that it runs

Random weights. Each adapter is a LoRA r 16 with the head of a classifier: on q k v out of DistilBERT, on all seven
linear layers of the Llama. "switch" is `lit_peft.set_active`, from one adapter to the next; "HF PEFT" is `set_adapter`
of the same adapters there; "folder" detaches the adapter and loads it again from its folder; "model" reads a whole
fine-tuned model by `from_pretrained`, from files that have just been written. Medians. Memory is that of the tensors on
the device (`torch.cuda.memory_allocated`, on a CPU the sum over parameters and buffers), beside so many full models.
Prints a table, then one line of JSON. Needs the dev extra (peft).
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lit_peft
from lit_peft import LoRA

SHAPES: dict[str, dict[str, Any]] = {
    "distilbert": {
        "class": transformers.DistilBertForSequenceClassification,
        "targets": ["q_lin", "k_lin", "v_lin", "out_lin"],
        "head": ["pre_classifier", "classifier"],
    },
    "llama": {
        "class": transformers.LlamaForSequenceClassification,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "head": ["score"],
    },
}


def build(args: argparse.Namespace) -> nn.Module:
    """The base with random weights, on the device."""
    if args.model == "distilbert":
        config: Any = transformers.DistilBertConfig(n_layers=args.layers or 6)
    else:
        config = transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=args.layers or 16,
            num_attention_heads=32,
            num_key_value_heads=8,
            pad_token_id=0,
        )
    torch.manual_seed(0)
    dtype = torch.float32 if args.model == "distilbert" else torch.bfloat16
    with torch.device(args.device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return SHAPES[args.model]["class"](config).eval()
        finally:
            torch.set_default_dtype(previous)


def shift(model: nn.Module, seed: int) -> None:
    """Gives what trains values of its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def held(model: nn.Module, device: str) -> int:
    """Bytes of tensors, what is kept aside included."""
    if device == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated()
    state: Any = lit_peft.core.registry.registry(model)
    aside = [t for kept in state.aside.values() for t in kept.values()] if state else []
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *aside])


def clock(do: Callable[[], Any], repeat: int, device: str) -> float:
    """Median milliseconds, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        do()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def cycle(names: list[str], choose: Callable[[str], Any]) -> Callable[[], Any]:
    """Goes from one name to the next at every call."""
    at = 0

    def step() -> None:
        nonlocal at
        at = (at + 1) % len(names)
        choose(names[at])

    return step


def ours(args: argparse.Namespace, n: int, folder: Path) -> dict[str, Any]:
    """Times and bytes of n adapters; with one alone, the time to switch it off and on."""
    model, shape = build(args), SHAPES[args.model]
    base = held(model, args.device)
    for i in range(n):
        lit_peft.set_active(model, None)
        LoRA(r=16, target_modules=shape["targets"], train_also=shape["head"], name=f"a{i}").attach(model)
        shift(model, i)
    names: list[Any] = [f"a{i}" for i in range(n)] if n > 1 else ["a0", None]
    switched = cycle(names, lambda name: lit_peft.set_active(model, name))
    row = {"bytes": held(model, args.device) - base, "base": base, "switch": clock(switched, args.repeat, args.device)}
    if n == args.counts[0]:
        saved = lit_peft.save(model, folder / "adapter", "a0")

        def reload() -> None:
            lit_peft.detach(model, "a0")
            lit_peft.load(model, saved, "a0")

        row["folder"] = clock(reload, max(3, args.repeat // 10), args.device)
        lit_peft.detach(model)
        model.save_pretrained(folder / "model")  # type: ignore[operator]

        def whole() -> None:
            shape["class"].from_pretrained(folder / "model", dtype=next(model.parameters()).dtype).to(args.device)

        row["model"] = clock(whole, 3, args.device)
    return row


def theirs(args: argparse.Namespace, n: int) -> dict[str, Any]:
    """The same adapters in HF PEFT."""
    model, shape = build(args), SHAPES[args.model]
    base = held(model, args.device)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=shape["targets"])
    adapted = peft.get_peft_model(model, config, adapter_name="a0")
    for i in range(1, n):
        adapted.add_adapter(f"a{i}", copy.deepcopy(config))
    if n > 1:
        switch = clock(cycle([f"a{i}" for i in range(n)], adapted.set_adapter), args.repeat, args.device)
    else:

        def toggle() -> None:  # their way to the base is a context, left and entered at every call
            with adapted.disable_adapter():
                pass

        switch = clock(toggle, args.repeat, args.device) / 2
    return {"bytes": held(adapted, args.device) - base, "switch": switch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="distilbert")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in args.counts:
            rows[n] = {"ours": ours(args, n, Path(folder)), "hf_peft": theirs(args, n)}
            print(n, rows[n], flush=True)
    first = rows[args.counts[0]]["ours"]
    print(f"\nload from a folder {first['folder']:.1f} ms, whole model {first['model']:.1f} ms")
    print(
        f"{'adapters':>8} {'switch ms':>10} {'HF PEFT ms':>11} {'MiB':>9} {'HF PEFT MiB':>12} {'full models MiB':>16}"
    )
    for n, row in rows.items():
        mib, its, full = (v / 2**20 for v in (row["ours"]["bytes"], row["hf_peft"]["bytes"], n * first["base"]))
        times = f"{row['ours']['switch']:>10.3f} {row['hf_peft']['switch']:>11.3f}"
        print(f"{n:>8} {times} {mib:>9.1f} {its:>12.1f} {full:>16.1f}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(json.dumps({"args": vars(args), "device": device, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
