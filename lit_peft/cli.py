"""`lit-peft`: LightningCLI with a method beside model, data and trainer, and the project's own verbs.

Asking for help, the version, the methods or the configurations needs neither torch nor Lightning; only the verbs
that run a trainer import them (`lit_peft.lightning_cli`).
"""

import difflib
import os
import sys
from pathlib import Path

from lit_peft import __version__

VERBS = {
    "fit": "train, then validate and test with the best checkpoint",
    "validate": "score the validation set with a checkpoint",
    "test": "score the test set with a checkpoint",
    "predict": "write the labels of a data set to predictions.jsonl",
    "methods": "list the methods",
    "configs": "list the configurations that come with the package",
}

HELP = """\
lit-peft {version}: parameter-efficient fine-tuning, native to PyTorch Lightning

usage: lit-peft VERB [--config NAME_OR_FILE ...] [--KEY VALUE ...]

{verbs}

  lit-peft fit --config quickstart                        a minute on two cores, no network
  lit-peft fit --config sst2/lora --config offline        a recipe, on the bundled model and data
  lit-peft fit --config sst2/lora --method BitFit --data.limit_train 2000
  lit-peft fit --help                                     all options (takes some seconds)
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `lit-peft` command.

    Args:
        argv: Arguments without the program's name; null: the command line's.

    Raises:
        SystemExit: With status 2 after a mistake in the arguments, which is told in one to three lines.
            LIT_PEFT_TRACEBACK=1 lets the exception through instead.
    """
    arguments = sys.argv[1:] if argv is None else argv
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<10}{what}" for name, what in VERBS.items())
        print(HELP.format(version=__version__, verbs=verbs))
    elif verb in ("-V", "--version"):
        print(f"lit-peft {__version__}")
    elif verb == "methods":
        from lit_peft.methods.registry import available

        methods = available()
        width = max(map(len, methods)) + 2
        for name, entry in methods.items():
            origin = "" if entry.package == "lit-peft" else f"  [{entry.package}]"
            print(f"{name:<{width}}{entry.summary()}{origin}")
    elif verb == "configs":
        for name, path in configs().items():
            print(f"{name:<22}{path}")
    elif not verb.startswith("-") and verb not in VERBS:
        fail(f"unknown verb {verb!r}.{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}.")
    else:
        try:
            arguments = resolve_configs(arguments)
        except FileNotFoundError as error:
            fail(str(error))
        # Read when these packages are imported: no list of new weights, which the table of sites shows better.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from lit_peft.lightning_cli import run

        run(arguments)


def fail(message: str) -> None:
    """Tells a mistake and ends the program with status 2."""
    print(f"lit-peft: {message}", file=sys.stderr)
    raise SystemExit(2)


def nearest(word: str, known: object) -> str:
    """A question, did you mean …?, with the closest of the known words; empty where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)  # type: ignore[call-overload]
    return f" Did you mean {close[0]!r}?" if close else ""


def configs() -> dict[str, Path]:
    """The configurations that come with the package: name, "sst2/lora", -> file."""
    here = Path(__file__).parent
    folder = next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())  # installed, or a checkout
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def resolve_configs(arguments: list[str]) -> list[str]:
    """Puts the file's path in the place of each `--config NAME`.

    Raises:
        FileNotFoundError: When it is neither a file nor a name.
    """
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c") or not (equals or i + 1 < len(arguments)):
            continue
        value = value if equals else arguments[i + 1]
        if not os.path.isfile(value):  # noqa: PTH113  (a Path would be made of any text)
            known = configs()
            name = value.removesuffix(".yaml")
            if name not in known:
                raise FileNotFoundError(
                    f"--config: there is no file {value!r} and no configuration of that name.{nearest(name, known)}"
                    f" Configurations: {', '.join(known)}."
                )
            value = str(known[name])
        resolved[i if equals else i + 1] = f"{flag}={value}" if equals else value
    return resolved


if __name__ == "__main__":
    main()
