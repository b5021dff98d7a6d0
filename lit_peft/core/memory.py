"""How much memory a stretch of work took at most, on the host and on a GPU."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Growth:
    """By how many bytes memory had grown at most; None where that cannot be told.

    Attributes:
        host: Resident size of the process: pages of a file that is mapped, as checkpoints are read, count while they
            are there, and the system may take these back. Known on Linux.
        device: What torch has allocated on a GPU; None on a CPU.
    """

    host: int | None = None
    device: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Growth]:
    """Fills what it gives when the block ends; what is imported in it counts too.

    No counter is reset, so that nobody else's figure changes. The system and torch keep the largest size ever: where
    that has not risen, the block stayed below an earlier peak, and its own is not known.
    """
    growth, (host, host_peak), (allocated, peak) = Growth(), _resident(), _allocated(device)
    yield growth
    host_peak_now, peak_now = _resident()[1], _allocated(device)[1]
    growth.host = host_peak_now - host if host_peak_now > host_peak else None
    growth.device = peak_now - allocated if peak_now > peak else None


def _resident() -> tuple[int, int]:
    """Bytes resident now, and at most so far; zeros where /proc is not there."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE)}
    return sizes.get("VmRSS", 0), sizes.get("VmHWM", 0)


def _allocated(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
