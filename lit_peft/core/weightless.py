"""Building models without their weights, wherever in the code they are built."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_WEIGHTLESS = ContextVar("is_weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Lets tasks build their models on the meta device, from configurations alone."""
    token = _IS_WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _IS_WEIGHTLESS.reset(token)


def is_weightless() -> bool:
    """Whether a model that is built now is to have shapes and no weights."""
    return _IS_WEIGHTLESS.get()
