"""Latency and memory of serving an adapter: on a base in 4 bit, on one in bfloat16, and merged in either.

    python benchmarks/quantized_inference.py --encoder models/minilm               # needs a GPU with 16 GiB
    python benchmarks/quantized_inference.py --device cpu --layers 2 --width 64 --vocabulary 500 --batches 1 2 \
        --length 8 --prefill 16 --rounds 2 --repeats 1                             # tiny, to see that it runs

Forms, all with one LoRA, r 16 on all linear layers:

    4-bit + adapter   NF4 with double quantisation, products in bfloat16
    bf16 + adapter    the base that it was quantised from
    merged bf16       the first one, merged into "dequantized"
    merged 4-bit      the first one, merged into "requantized"

Models: an encoder with a head for two classes (MiniLM's shape, 22.7 M parameters; random weights where `--encoder`
names no folder of `make_minilm.py`), at batches of `--batches` texts of `--length` tokens; and a Llama of 1.2 B
parameters with random weights, for one prompt of `--prefill` tokens ("prefill") and one token after it ("decode").
Eager, without gradients, random tokens. Every round times all forms once, in an order that is drawn anew, so that drift
of the machine hits all alike; a figure is the median over the rounds. "weights" is what a form holds on the device,
without what libraries allocate once and keep (cuBLAS's workspace) and without what merging keeps on the host for
`unmerge`; "peak" is the most while it runs; on a CPU the former is the sum over its tensors, the latter is not known.
"difference" is the largest of the logits from those of the first form, in units of the largest logit. Prints a table,
then one line of JSON.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lit_peft import LoRA, merge
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import stored_as

FORMS: dict[str, tuple[str | None, Any]] = {
    "4-bit + adapter": ("nf4", None),
    "bf16 + adapter": (None, None),
    "merged bf16": ("nf4", "dequantized"),
    "merged 4-bit": ("nf4", "requantized"),
}
"""Form -> how its base is stored, and into what the adapter is merged."""
HEADS = {"encoder": ["classifier", "pre_classifier"], "llama": []}
Pass = Callable[[nn.Module], Callable[[], Tensor]]


@contextmanager
def bfloat16(device: str) -> Iterator[None]:
    """New parameters are made in bfloat16, on the device."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


def encoder(args: argparse.Namespace) -> nn.Module:
    """A classifier in bfloat16, on the device."""
    torch.manual_seed(0)
    if args.encoder is not None:
        cls = transformers.DistilBertForSequenceClassification
        return cls.from_pretrained(args.encoder, dtype=torch.bfloat16).to(args.device).eval()
    width = min(args.width, 384)
    config = transformers.DistilBertConfig(
        vocab_size=min(args.vocabulary, 30522),
        dim=width,
        hidden_dim=4 * width,
        n_layers=min(args.layers, 6),
        n_heads=max(1, width // 32),
    )
    with bfloat16(args.device):
        return transformers.DistilBertForSequenceClassification(config).eval()


def llama(args: argparse.Namespace) -> nn.Module:
    """A causal language model in bfloat16, on the device."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        num_key_value_heads=max(1, args.width // 256),
        max_position_embeddings=args.prefill + 1,
    )
    with bfloat16(args.device):
        return transformers.LlamaForCausalLM(config).eval()


def tokens(args: argparse.Namespace, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, min(args.vocabulary, 30522), shape, generator=generator).to(args.device)


def classify(args: argparse.Namespace, batch: int) -> Pass:
    """A pass over a batch of texts."""
    ids = tokens(args, batch, args.length)
    return lambda model: lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def prefill(args: argparse.Namespace) -> Pass:
    """A pass over a prompt, whose last token's logits are wanted."""
    ids = tokens(args, 1, args.prefill)
    return lambda model: lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def decode(args: argparse.Namespace) -> Pass:
    """A pass of one token after a prompt; its keys and values are cut off the cache again."""
    ids = tokens(args, 1, args.prefill + 1)

    def prepared(model: nn.Module) -> Callable[[], Tensor]:
        cache = transformers.DynamicCache()
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> Tensor:
            logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return step

    return prepared


def build(args: argparse.Namespace, make: Callable[[argparse.Namespace], nn.Module], form: str) -> nn.Module:
    """A model with an adapter that does something, in one of the forms."""
    quantize, into = FORMS[form]
    model = make(args)
    options = {"target_modules": "all-linear", "exclude_modules": HEADS[make.__name__], "quantize": quantize}
    LoRA(r=16, dropout=0.0, adapter_dtype=args.adapter_dtype, **options).attach(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    if into is not None:
        merge(model, into=into)
    return model.requires_grad_(False).eval()


def held(model: nn.Module) -> int:
    """Bytes of a model's tensors, the constants of quantised layers included."""
    quantised = [model.get_submodule(path) for path in stored_as(model)]
    constants = [tensor for layer in quantised for tensor in layer_ops(layer).stored(layer)[1:]]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *constants])


def allocated(device: str) -> int:
    if device != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def clock(step: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Milliseconds a pass, mean of some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def measure(args: argparse.Namespace, make: Any, passes: dict[str, Pass]) -> list[dict[str, Any]]:
    """A row for each pass and form of one model."""
    models, weights = dict[str, nn.Module](), dict[str, int]()
    if args.device == "cuda":  # else the first form to use cuBLAS, which merging does, would be charged its workspace
        for form in FORMS:
            build(args, make, form)
            allocated(args.device)  # which frees it
    for form in FORMS:
        before = allocated(args.device)
        models[form] = build(args, make, form)
        weights[form] = allocated(args.device) - before if args.device == "cuda" else held(models[form])
    rows = []
    for name, make_pass in passes.items():
        steps = {form: make_pass(model) for form, model in models.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        peaks, answers = dict[str, int | None](), dict[str, Tensor]()
        for form, step in steps.items():
            answers[form] = step().float().cpu()  # and warms up
            others = allocated(args.device) - weights[form]
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clock(step, 2, args.device)
            peaks[form] = torch.cuda.max_memory_allocated() - others if args.device == "cuda" else None
        order, names = random.Random(0), list(FORMS)
        for _ in range(args.rounds):
            order.shuffle(names)
            for form in names:
                times[form].append(clock(steps[form], args.repeats, args.device))
        first = answers["4-bit + adapter"]
        for form in FORMS:
            rows.append(
                {
                    "model": make.__name__,
                    "pass": name,
                    "form": form,
                    "ms": statistics.median(times[form]),
                    "spread_ms": [min(times[form]), max(times[form])],
                    "weights_bytes": weights[form],
                    "peak_bytes": peaks[form],
                    "difference": ((answers[form] - first).abs().max() / first.abs().max()).item(),
                }
            )
    return rows


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["encoder", "llama"], choices=["encoder", "llama"])
    parser.add_argument("--encoder", default=None, help="folder of make_minilm.py; random weights without")
    parser.add_argument("--adapter-dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    if "encoder" in args.models:
        passes = {f"{batch} x {args.length}": classify(args, batch) for batch in args.batches}
        rows += measure(args, encoder, passes)
    if "llama" in args.models:
        rows += measure(args, llama, {f"prefill {args.prefill}": prefill(args), "decode 1": decode(args)})
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{machine}, torch {torch.__version__}, adapters {args.adapter_dtype}\n")
    print("| model | pass | form | ms | weights, MiB | peak, MiB | difference |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        sizes = f"{mib(row['weights_bytes'])} | {mib(row['peak_bytes'])}"
        print(
            f"| {row['model']} | {row['pass']} | {row['form']} | {row['ms']:.3f} | {sizes} | {row['difference']:.2g} |"
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"settings": vars(args), "device": machine, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
