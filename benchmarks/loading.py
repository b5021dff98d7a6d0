"""Memory and time of bringing a Llama into 4 bit: quantised as it is read, or loaded in bfloat16 and quantised then.

    python benchmarks/loading.py                                  # the 8 B shape, 16 GB on disk
    python benchmarks/loading.py --layers 2 --width 256 --vocabulary 1000 --device cpu

Writes a checkpoint of random bfloat16 weights, one shard a layer, into a temporary folder, and loads it as a sequence
classifier in a fresh process for each row:

    read        our tasks: transformers' loader quantises each weight as it reads it
    host        the whole model in bfloat16 on the host, then layer by layer in place, onto the device
    device      the whole model in bfloat16 on the device, then in place there; on a GPU alone

Host memory is the growth of the process beyond its imports: "resident" with the mapped pages of the file, which the
system may take back, "own" without, looked at every 5 ms. Device memory is what torch allocated. Peaks are of the load;
"left" is what stays. Prints a table, then one line of JSON.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from lit_peft import LoRA
from lit_peft.core.memory import measured
from lit_peft.core.quantize import make_quantizer, parse, quantize_base, stored_as
from lit_peft.core.quantized import bitsandbytes
from lit_peft.tasks.loading import BaseStorage, load_classifier

LABELS = ["negative", "positive"]


def write_checkpoint(folder: Path, model: Any, device: str) -> int:
    """Writes config and shards of random bfloat16 weights, never more than one layer in memory.

    Args:
        folder: Where to.
        model: A Llama on the meta device; matrices are drawn from N(0, .02^2), as Llama's, norms are 1.
        device: Where they are drawn.

    Returns:
        The bytes of the weights.
    """
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator(device).manual_seed(0)
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            made = torch.ones(shape, dtype=torch.bfloat16, device=device)
            tensors[name] = (made.normal_(0, 0.02, generator=generator) if len(shape) > 1 else made).cpu()
        save_file(tensors, folder / file, {"format": "pt"})
    size = 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: f for f, names in shards.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.update({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    model.config.save_pretrained(folder)
    return size


def skeleton(args: argparse.Namespace) -> Any:
    """The Llama of the arguments, on the meta device."""
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 128 or 1,
        num_key_value_heads=max(1, args.width // 512),
        pad_token_id=0,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def load(row: str, folder: str, device: torch.device) -> nn.Module:
    if row == "read":
        storage = BaseStorage(parse("nf4") or {}, [LoRA(quantize="nf4", train_also=["model.score"])], "model", device)
        return load_classifier(folder, LABELS, torch.bfloat16, storage)[0].to(device)
    model, _ = load_classifier(folder, LABELS, torch.bfloat16)
    if row == "device":
        model.to(device)
    quantize_base(nn.ModuleDict({"model": model}), make_quantizer("nf4"), ["model.score"], device)
    return model.to(device)


class OwnMemory(threading.Thread):
    """The largest anonymous resident size of the process, beyond that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_size = self.most = self.now()
        self.done = threading.Event()

    @staticmethod
    def now() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, self.now())


def measure(row: str, folder: str, device: torch.device) -> None:
    """Prints one row as JSON; runs in a process of its own."""
    bitsandbytes().functional.quantize_4bit(torch.ones(64, device=device))  # its libraries are loaded before
    own = OwnMemory()
    own.start()
    start = time.perf_counter()
    with measured(device) as growth:
        model = load(row, folder, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    own.done.set()
    own.join()
    left = {"host_left": own.now() - own.start_size}
    left["device_left"] = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    figures = {"resident": growth.host, "own": own.most - own.start_size, "device": growth.device, "seconds": seconds}
    print(json.dumps({"row": row, "layers": len(stored_as(model)), **figures, **left}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--rows", nargs="+", default=["read", "host", "device"])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure, torch.device(args.device, 0 if args.device == "cuda" else None))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_checkpoint(Path(folder), skeleton(args), args.device)
        found = []
        for row in args.rows:
            if row == "device" and args.device == "cpu":
                continue
            command = [sys.executable, __file__, "--device", args.device, "--measure", row, folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; the checkpoint has {size / 2**30:.2f} GiB; GiB and seconds\n")
    columns = ("resident", "own", "host_left", "device", "device_left", "seconds")
    print(f"| row | {' | '.join(columns)} |\n|---|{' ---: |' * len(columns)}")
    for row in found:
        cells = ("-" if row[c] is None else f"{row[c] / (1 if c == 'seconds' else 2**30):.2f}" for c in columns)
        print(f"| {row['row']} | {' | '.join(cells)} |")
    print(json.dumps({"device": name, "bytes": size, "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()
