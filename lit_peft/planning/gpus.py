"""How much memory a GPU has: by its name, by a size, or of the one that is here."""

import re

import torch

from lit_peft.arguments import nearest

GIB = 1 << 30
CONTEXT = GIB // 2
"""What CUDA itself takes of a GPU, its kernels and libraries, and torch's allocator does not see."""
SIZES = {
    "T4": 16,
    "V100": 16,
    "V100-32GB": 32,
    "L4": 24,
    "A10G": 24,
    "RTX3090": 24,
    "RTX4090": 24,
    "A100-40GB": 40,
    "L40S": 48,
    "A100": 80,
    "H100": 80,
    "H200": 141,
    "B200": 192,
}
"""GPU -> memory as its maker gives it; of 80, about 79 GiB can be used."""


def gpu_bytes(gpu: str | None) -> tuple[str, int] | None:
    """Name and bytes of the GPU named, or of the one that is present; None where there is neither.

    Args:
        gpu: A name of `SIZES`, in any case, one as drivers give it, "NVIDIA H100 80GB HBM3", or a size, "24GiB" or
            "24GB"; None: what is here.

    Raises:
        ValueError: For another name, with the nearest one, and a size that is not above 0.
    """
    if gpu is None:
        if not torch.cuda.is_available():
            return None
        here = torch.cuda.get_device_properties(torch.cuda.current_device())
        return here.name, here.total_memory
    if size := re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB)\s*", gpu, re.IGNORECASE):
        if float(size[1]) <= 0:
            raise ValueError(f"gpu is {gpu!r}, expected a size above 0, such as 24GiB, or a name: {', '.join(SIZES)}.")
        unit = GIB if size[2].lower().startswith("g") else 1 << 20
        return gpu.strip(), int(float(size[1]) * unit)
    folded = {_folded(name): name for name in SIZES}
    asked = _folded(gpu)
    if (name := folded.get(asked)) is not None:
        return name, SIZES[name] * GIB
    # "NVIDIA A100-SXM4-80GB", as drivers say it: a name, how it is built in, and a size where there are two.
    for known in sorted(folded, key=len, reverse=True):
        if rest := re.fullmatch(rf"{known}(?:sxm\d?|pcie|nvl|hbm\d?e?|(\d+)gb)*", asked):
            return folded[known], int(rest[1] or SIZES[folded[known]]) * GIB
    hint = f" Did you mean '{gpu.strip()}GiB'?" if re.fullmatch(r"\s*\d+\s*", gpu) else nearest(gpu, SIZES)
    raise ValueError(f"gpu: {gpu!r} is not known.{hint} Known: {', '.join(SIZES)}; or a size, 24GiB.")


def _folded(name: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[\s_-]", "", name.lower())


def workspaces(gpu: tuple[str, int] | None) -> int:
    """Bytes that cuBLAS keeps once products have run: for the thread of the forward pass and that of the backward pass.

    32 MiB each from Hopper on, which is also what is taken of an unknown GPU, a little over 8 MiB each before.
    """
    if gpu is None or gpu[0] not in SIZES:
        older = gpu is not None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9
    else:
        older = not gpu[0].startswith(("H", "B"))
    return 2 * (8_519_680 if older else 32 << 20)
