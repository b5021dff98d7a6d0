"""Training step and peak memory on a Llama shape of 1.2 B parameters, ours beside HF PEFT's, in alternation.

    python benchmarks/llama.py                                     # all rows; needs a GPU with 40 GiB
    python benchmarks/llama.py --rows lora hf-lora-bf16 dora       # some
    python benchmarks/llama.py --layers 2 --device cpu --batch 1 --length 32 --vocabulary 500 --width 64

16 layers of width 2048, vocabulary 128,256, bfloat16, random weights and tokens; r 16 on all seven linear layers
(HiRA r 32 unless --r says otherwise). A step is forward, backward and AdamW. In each round every row builds its model
anew, warms up, and is timed over some steps, rows in an order that rotates, so that drift of the machine hits all
alike. "hf-lora" is HF PEFT as it comes, with float32 adapters; "-bf16" has bfloat16 adapters, "-compiled" compiled
layers. Prints a table, then one line of JSON. Needs the dev extra (peft).
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn

from lit_peft.methods import DoRA, FullFineTuning, HiRA, LoRA
from lit_peft.methods.base import Method

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(args: argparse.Namespace) -> nn.Module:
    """A Llama with random weights in bfloat16, on the device, in training mode."""
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64 or 1,
        num_key_value_heads=max(1, args.width // 256),
        max_position_embeddings=args.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.LlamaForCausalLM(config).train()
        finally:
            torch.set_default_dtype(previous)


def ours(method: Method) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        method.attach(model)
        return model

    return attach


def theirs(config: Any, dtype: torch.dtype | None) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype is None)
        for parameter in adapted.parameters():
            if parameter.requires_grad and dtype is not None:
                parameter.data = parameter.data.to(dtype)
        return adapted

    return attach


def compiled(attach: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def compile_layers(model: nn.Module) -> nn.Module:
        layers = model.model.layers
        adapted = attach(model)
        for layer in layers:
            layer.compile()
        return adapted

    return compile_layers


def floor(model: nn.Module) -> nn.Module:
    """A frozen base through which the gradient of the embeddings flows: what no adapter can be below."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: output.requires_grad_())
    return model


def rows(r: int, r_hira: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    lora = {"r": r, "alpha": 2 * r, "dropout": 0.0, "target_modules": TARGETS}
    plain = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    dora = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, use_dora=True)
    hira = peft.HiraConfig(r=r_hira, target_modules=TARGETS)
    return {
        "floor": floor,
        "full": ours(FullFineTuning(adapter_dtype="bfloat16")),
        "lora": ours(LoRA(**lora)),
        "lora-bf16": ours(LoRA(**lora, adapter_dtype="bfloat16")),
        "hf-lora": theirs(plain, None),
        "hf-lora-bf16": theirs(plain, torch.bfloat16),
        "dora": ours(DoRA(**lora)),
        "hf-dora-bf16": theirs(dora, torch.bfloat16),
        "hira": ours(HiRA(r=r_hira, target_modules=TARGETS)),
        "hf-hira-bf16": theirs(hira, torch.bfloat16),
        "lora-compiled": compiled(ours(LoRA(**lora))),
        "lora-bf16-compiled": compiled(ours(LoRA(**lora, adapter_dtype="bfloat16"))),
        "hf-lora-bf16-compiled": compiled(theirs(plain, torch.bfloat16)),
    }


def measure(attach: Callable[[nn.Module], nn.Module], args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds a step, and the peak memory in GiB."""
    cuda = args.device == "cuda"
    gc.collect()
    torch._dynamo.reset()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = attach(base(args))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1000

    steps(args.warmup)
    milliseconds = steps(args.steps)
    return milliseconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--r-hira", type=int, default=None, help="default: 32, or the width where it is smaller")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    known = rows(args.r, args.r_hira or min(32, args.width // 4))
    names = args.rows or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no row {sorted(unknown)[0]!r}; there are {', '.join(known)}")

    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            milliseconds, peaks[name] = measure(known[name], args)
            times[name].append(milliseconds)
    print("| row | ms a step | min to max | peak GiB |\n|---|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} | {peaks[name]:.1f} |"
        )
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    result = {"device": device, "times_ms": times, "peak_gib": peaks, "versions": versions, "arguments": vars(args)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
