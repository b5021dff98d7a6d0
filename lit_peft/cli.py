"""`lit-peft`: LightningCLI with a method beside model, data and trainer, and the project's own verbs.

Asking for help, the version, the methods, the configurations or what an adapter folder is needs neither torch nor
Lightning; only the verbs that run a trainer import them (`lit_peft.lightning_cli`).
"""

import json
import os
import sys

from lit_peft import __version__
from lit_peft.arguments import closest, configs, resolve
from lit_peft.handover.paths import here_and_alone, place

VERBS = {
    "fit": "train, then validate and test with the best checkpoint",
    "validate": "score the validation set with a checkpoint",
    "test": "score the test set with a checkpoint",
    "predict": "write labels or generations to predictions.jsonl, or print those of --text",
    "plan": "tell what memory training takes, and whether it fits a GPU, before it is run",
    "merge": "write the model with its adapter folded in, for plain transformers",
    "export": "write the adapter as a folder that Hugging Face PEFT opens",
    "inspect": "tell what a checkpoint, an adapter folder or a run is; --json for programs",
    "methods": "list the methods; with a name, show one: paper, arguments, what it trains",
    "configs": "list the configurations that come with the package",
}

SYNONYMS = {
    "train": "fit",
    "estimate": "plan",
    "memory": "plan",
    "finetune": "fit",
    "evaluate": "test",
    "infer": "predict",
    "inference": "predict",
    "fuse": "merge",
    "convert": "export",
    "info": "inspect",
    "show": "inspect",
}
"""What other tools call our verbs."""

HELP = """\
lit-peft {version}: parameter-efficient fine-tuning, native to PyTorch Lightning

usage: lit-peft VERB [--config NAME_OR_FILE ...] [--KEY VALUE ...]

{verbs}

  lit-peft fit --config quickstart                        a minute on two cores, no network
  lit-peft fit --config sst2/lora --config offline        a recipe, on the bundled model and data
  lit-peft fit --config sst2/lora --method BitFit --data.limit_train 2000
  lit-peft fit --run runs/sst2/lora/version_0             go on where a run was killed
  lit-peft plan --config sst2/lora --gpu T4                what a step takes, beside other methods; no weights needed
  lit-peft predict --run runs/sst2/lora/version_0 --text "a great movie"
  lit-peft test --run runs/sst2/lora/version_0 --adapter FOLDER
  lit-peft merge runs/sst2/lora/version_0 FOLDER          a plain model, for transformers alone
  lit-peft inspect runs/sst2/lora/version_0/adapter
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
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if arguments[:1] not in (["inspect"], ["methods"], ["configs"]):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough


def _run(arguments: list[str]) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<10}{what}" for name, what in VERBS.items())
        print(HELP.format(version=__version__, verbs=verbs))
    elif verb in ("-V", "--version"):
        print(f"lit-peft {__version__}")
    elif verb == "inspect":
        _inspect(arguments[1:])
    elif verb == "methods" and arguments[1:]:
        _describe(arguments[1:])
    elif verb == "methods":
        from lit_peft.methods.registry import available

        methods = available()
        width = max(map(len, methods)) + 2
        for name, entry in methods.items():
            origin = "" if entry.package == "lit-peft" else f"  [{entry.package}]"
            print(f"{name:<{width}}{entry.summary()}{origin}")
    elif verb == "configs":
        known = configs()
        width = max(map(len, known)) + 2
        for name, path in known.items():
            print(f"{name:<{width}}{path}")
    elif not verb.startswith("-") and verb not in VERBS:
        meant = closest(verb, [*VERBS, *SYNONYMS])
        hint = f" Did you mean {SYNONYMS.get(meant, meant)!r}?" if meant else ""
        fail(f"unknown verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.")
    else:
        try:
            arguments = resolve(here_and_alone(place(arguments)))
        except (OSError, ValueError) as error:
            if os.environ.get("LIT_PEFT_TRACEBACK") == "1":
                raise
            fail(str(error))
        # Read when these packages are imported: no list of new weights, which the table of sites shows better.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from lit_peft.lightning_cli import run

        run(arguments)


def _describe(names: list[str]) -> None:
    """Prints what there is to say of methods, named in any case."""
    from lit_peft.methods.registry import available, find

    folded = {name.lower(): name for name in available()}
    try:
        entries = [find(folded.get(name.lower(), name)) for name in names]
    except ValueError as error:
        fail(str(error))
    from lit_peft.methods.describe import describe
    from lit_peft.quiet import be_quiet

    be_quiet("methods", answers_only=False)  # a model of transformers' is made
    print("\n\n".join(describe(entry.load()) for entry in entries))


def _inspect(words: list[str]) -> None:
    """Prints what there is at a path."""
    from lit_peft.inspecting import inspect
    from lit_peft.inspecting_text import as_text

    paths = [word for word in words if word != "--json"]
    if unknown := [word for word in paths if word.startswith("-")]:
        fail(f"inspect has no option {unknown[0]!r}; it has --json.")
    if len(paths) != 1:
        fail("inspect takes one path: a checkpoint, the folder of an adapter, or that of a run.")
    try:
        found = inspect(paths[0])
    except (OSError, ValueError) as error:
        if os.environ.get("LIT_PEFT_TRACEBACK") == "1":
            raise
        fail(str(error))
    print(json.dumps(found, indent=2, default=str) if "--json" in words else as_text(found))


def fail(message: str) -> None:
    """Tells a mistake and ends the program with status 2."""
    print(f"lit-peft: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
