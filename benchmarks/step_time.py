"""Time of a training step with our LoRA against HF PEFT's, on the same model, in alternation.

    python benchmarks/step_time.py                                 # DistilBERT shape, CPU
    python benchmarks/step_time.py --device cuda --batch 256       # GPU, bfloat16 autocast
    python benchmarks/step_time.py --device cuda --compile         # ours compiled in place, theirs eager

A step is forward, backward, clipping to norm 1 and AdamW, on random tokens. Each round times both, in an order
that flips, so that drift of the machine hits both alike; the ratio is taken round by round. Prints a table, then
one line of JSON. Needs the dev extra (peft).
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

from lit_peft.methods import LoRA

TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin"]
HEAD = ["pre_classifier", "classifier"]


def base(layers: int) -> nn.Module:
    """A DistilBERT classifier with random weights, in training mode."""
    torch.manual_seed(0)
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(n_layers=layers)).train()


def ours(layers: int, r: int, dropout: float) -> nn.Module:
    model = base(layers)
    LoRA(r=r, alpha=2 * r, dropout=dropout, target_modules=TARGETS, train_also=HEAD).attach(model)
    return model


def theirs(layers: int, r: int, dropout: float) -> nn.Module:
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=r,
        lora_alpha=2 * r,
        lora_dropout=dropout,
        target_modules=TARGETS,
        modules_to_save=HEAD,
    )
    return peft.get_peft_model(base(layers), config)


def stepper(model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one training step and waits for it."""
    device = torch.device(args.device)
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    ids = torch.randint(1000, 30000, (args.batch, args.length), device=device)
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (args.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def clock(step: Callable[[], None], times: int) -> float:
    """Milliseconds a step, mean of some in a row."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times * 1000


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    stream = random.Random(0)
    medians = sorted(statistics.median(stream.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=0, help="steps in a round; 0: 1 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile ours in place")
    parser.add_argument("--compile-theirs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = args.steps or (20 if args.device == "cuda" else 1)

    models = {
        "ours": ours(args.layers, args.r, args.dropout),
        "theirs": theirs(args.layers, args.r, args.dropout),
    }
    counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    assert counts["ours"] == counts["theirs"], counts
    if args.compile:
        models["ours"].compile()
    if args.compile_theirs:
        models["theirs"].compile()
    steps = {name: stepper(model, args) for name, model in models.items()}
    for step in steps.values():
        clock(step, 3 * times)
    measured: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(args.rounds):
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            measured[name].append(clock(steps[name], times))
    ratios = [a / b for a, b in zip(measured["ours"], measured["theirs"], strict=True)]
    low, high = interval(ratios)
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.processor() or platform.machine()} x{args.threads}"
    )
    result = {
        "device": device,
        "shape": f"{args.batch} x {args.length}",
        "ours_ms": round(statistics.median(measured["ours"]), 3),
        "theirs_ms": round(statistics.median(measured["theirs"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(low, 4), round(high, 4)],
        "rounds": args.rounds,
        "compiled": [args.compile, args.compile_theirs],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    print(f"{'':8}{'ms a step':>12}{'spread (min to max)':>26}")
    for name, values in measured.items():
        print(f"{name:8}{statistics.median(values):12.2f}{min(values):14.2f} to {max(values):.2f}")
    print(f"ratio {result['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
