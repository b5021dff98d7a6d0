"""What other packages print and nobody can act on, kept off the command line."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_peft.handover.paths import PLACED

RANK_ZERO = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
NOTICES = {
    "transformers.modeling_layers": "Caching is incompatible",  # a classifier has no use for a cache
    **dict.fromkeys(RANK_ZERO, "Tip:"),
    # transformers imports torchao wherever it is installed.
    "torchao": "Failed to load",  # kernels for other GPUs than are here
    "torch.utils._pytree": "is an Enum subclass",  # of torchao's
}
"""Logger -> words of a message that it keeps to itself."""
HERE = f"{Path(__file__).parent}{os.sep}"


@contextmanager
def without_notices() -> Iterator[None]:
    """Keeps Lightning from telling which file it restores, while a fit scores its own checkpoints."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def format_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Ours, which are about what a user gave, without the place in the code that says so."""
    if filename.startswith(HERE) and category is UserWarning:
        return f"Warning: {message}\n"
    return _format(message, category, filename, lineno, line)


_format = warnings.formatwarning


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


def be_quiet(verb: str, answers_only: bool) -> None:
    """Silences what other packages print at every start and nobody can act on; or all but what is asked for."""
    warnings.formatwarning = format_warning
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    if verb != "fit":
        warnings.filterwarnings("ignore", ".*dirpath has changed.*")  # where checkpoints would go, if any were written
    if verb == "plan":
        warnings.filterwarnings("ignore", ".*fp16 is not supported on CPU.*")  # where it is planned, and does not run
    for name, words in NOTICES.items():
        logging.getLogger(name).addFilter(_without(words))
    for name in RANK_ZERO:
        if answers_only:
            logging.getLogger(name).setLevel(logging.ERROR)
        elif verb in (*PLACED, "plan"):  # which say what they have found themselves
            logging.getLogger(name).setLevel(logging.WARNING)
            logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    if answers_only:
        from datasets import disable_progress_bars

        disable_progress_bars()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
