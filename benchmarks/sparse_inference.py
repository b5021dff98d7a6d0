"""Time of one adapted linear layer in inference: what zeros in a LoRA buy, by how they are stored.

    python benchmarks/sparse_inference.py                               # CPU
    python benchmarks/sparse_inference.py --device cuda --dtype bfloat16

Forms, each at the shares of zeros that `--sparsity` names:

    base       the layer alone: y = W x
    dense      y = W x + s B A x; zeros are multiplied as other numbers are, so one figure serves all shares
    csr        A and B as torch.sparse_csr, zeros anywhere
    compacted  the ranks that are left, r (1 - share): what SparseLoRA's folders hold
    merged     W + s B A as one weight: the base's time, whatever the share

Beside the whole layer, the adapter's own products are timed alone: of a large layer they are a few percent, less than
what a busy machine varies by. Every round times all forms once, in an order that is drawn anew, so that drift of the
machine hits all alike; a figure is the median over the rounds. Prints tables, then one line of JSON.
"""

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
Form = Callable[[], Tensor]


def thinned(factor: Tensor, share: float) -> Tensor:
    """The factor with the smallest entries set to zero, up to this share."""
    flat = factor.clone().view(-1)
    flat[flat.float().abs().argsort()[: round(share * flat.numel())]] = 0
    return flat.view_as(factor)


def forms(args: argparse.Namespace, rows: int) -> dict[str, Form]:
    """Name -> one forward pass for that many rows; of the adapter's products alone under "name, alone"."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, args.dtype), args.device

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    W, A, B = draw(args.out, args.inputs) / 64, draw(args.r, args.inputs) / 64, draw(args.out, args.r) / 8
    x, s = draw(rows, args.inputs), 2.0
    merged = W + s * (B @ A)
    found: dict[str, Form] = {"base": lambda: F.linear(x, W), "merged": lambda: F.linear(x, merged)}

    def add_dense(name: str, A: Tensor, B: Tensor) -> None:
        found[name] = lambda: torch.addmm(F.linear(x, W), F.linear(x, A), B.t(), alpha=s)
        found[f"{name}, alone"] = lambda: F.linear(F.linear(x, A), B)

    def add_csr(name: str, A: Tensor, B: Tensor) -> None:
        a, b = A.to_sparse_csr(), B.to_sparse_csr()
        found[name] = lambda: F.linear(x, W).add_((b @ (a @ x.t())).t(), alpha=s)
        found[f"{name}, alone"] = lambda: b @ (a @ x.t())
        check(found[f"{name}, alone"]().t(), F.linear(F.linear(x, A), B))

    add_dense("dense", A, B)
    for share in args.sparsity:
        left = round(args.r * (1 - share))
        add_csr(f"csr {share:g}", thinned(A, share), thinned(B, share))
        add_dense(f"compacted {share:g}", A[:left].contiguous(), B[:, :left].contiguous())
    return found


def check(found: Tensor, expected: Tensor) -> None:
    """Two forms of the same factors must agree, or a time would mean nothing."""
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    if error > 2e-2:
        raise RuntimeError(f"The CSR form differs from the dense one by {error:.3g} of the largest output.")


def clock(form: Form, repeats: int, device: str) -> float:
    """Milliseconds a pass, mean of some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        form()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


@torch.inference_mode()
def measure(args: argparse.Namespace, rows: int) -> dict[str, float]:
    """Name -> median milliseconds."""
    found = forms(args, rows)
    names = list(found)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for round_ in range(args.rounds + 1):
        order.shuffle(names)
        for name in names:
            took = clock(found[name], args.repeats, args.device)
            if round_:  # the first one warms up
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    threads = "" if args.device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{machine}{threads}, torch {torch.__version__}, {args.dtype}, W {args.out} x {args.inputs}, r {args.r}\n")
    results = {rows: measure(args, rows) for rows in args.rows}
    print("| rows | form | share of zeros | whole layer, ms | adapter alone, ms | by dense |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for rows, times in results.items():
        for name in (name for name in times if not name.endswith(", alone")):
            form, _, share = name.partition(" ")
            alone = times.get(f"{name}, alone")
            ending = "- | -" if alone is None else f"{alone:.3f} | {alone / times['dense, alone']:.2f}"
            print(f"| {rows} | {form} | {share or '-'} | {times[name]:.3f} | {ending} |")
    settings = vars(args) | {"machine": machine, "torch": torch.__version__}
    print(json.dumps({"settings": settings, "ms": {str(rows): times for rows, times in results.items()}}))


if __name__ == "__main__":
    main()
