"""Unsloth's row of benchmarks/unsloth_turns.py, which starts this in the environment that Unsloth asks for.

    python benchmarks/unsloth_worker.py --folder CHECKPOINT --length 1024 ...

Reads a count a line from its standard input, makes that many steps, and answers with a line of JSON: the milliseconds
of each, and the most memory so far. The first line, before it is asked, tells what is ready. What libraries print goes
to the standard error. Knows nothing of lit-peft, which cannot be installed beside Unsloth.
"""

import argparse
import itertools
import json
import os
import sys
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="checkpoint in bfloat16, with a tokenizer")
    for name in ("batch", "length", "r"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("alpha", "rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--checkpointing", action="store_true", help="its own, which moves what it keeps to the host")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    from unsloth import FastLanguageModel, __version__  # isort: skip  # before all that it patches
    import torch

    model: Any
    model, _ = FastLanguageModel.from_pretrained(
        args.folder, max_seq_length=args.length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if args.checkpointing else False,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=args.checkpointing)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.rate, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), generator=generator).cuda()

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.cuda.reset_peak_memory_stats()
    ready = {
        "unsloth": __version__,
        "dtypes": sorted({str(p.dtype) for p in trainable}),
        "trainable": sum(p.numel() for p in trainable),
        "static_gib": torch.cuda.memory_allocated() / 2**30,
    }
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(int(line) + 1)]
        events[0].record()
        for event in events[1:]:
            loss = step()
            event.record()
        torch.cuda.synchronize()
        answer = {
            "step_ms": [a.elapsed_time(b) for a, b in itertools.pairwise(events)],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "loss": float(loss),
        }
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
