"""Random numbers by name: the same on every rank and for every kind of device, whatever else is drawn."""

import hashlib

import torch


def stream(name: str) -> torch.Generator:
    """A generator on the host whose numbers follow from this name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
