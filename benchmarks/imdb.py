"""IMDB by method: what is kept of long reviews, and reading them whole in windows.

    python benchmarks/make_minilm.py models/minilm
    python benchmarks/imdb.py --backbone models/minilm --data data/imdb --precision bf16-mixed --parallel 4
    python benchmarks/imdb.py ... --methods lora@1e-3 --seeds 0 --parallel 1    # times, nothing else on the GPU
    python benchmarks/imdb.py --report runs/benchmark_imdb/lines.jsonl          # the tables of runs that have ended

Ours run through `lit-peft fit --config imdb/lora --config methods/NAME` at 512 tokens, as a user would run them. The
sweep trains on --sweep-train reviews with seed 0, of which the head is kept, and takes the rate of the highest accuracy
in validation (on a tenth of train). The runs that count train on all, once with the head of long reviews and once with
head and tail, and are scored on the 25,000 reviews of test with the checkpoint of the lowest validation NLL. The rows
"head, read in windows" are the runs of "head", tested again by `lit-peft test --data.windows true`: nothing trains for
them. Memory is the peak of each process; times say little where several share the GPU. What follows `--` goes to every
run, but that test. Each run keeps its files in a folder of its own under --out, and adds a line to --lines. Prints two
tables, then one line of JSON.
"""

from comparison import Study, add_runs, compare, parser

STUDY = Study(
    name="imdb",
    recipe="imdb/lora",
    scores={"acc": 4, "ece": 4, "brier": 4, "nll": 4},
    select="val/acc",
    methods=("lora", "qlora", "linear_probe", "full_fine_tuning"),
    theirs=(),
    rates={"full_fine_tuning": (5e-5, 1e-4, 2e-4), "linear_probe": (2e-3, 5e-3, 1e-2)},
    common_rates=(5e-4, 1e-3, 2e-3),
    several_seeds=("lora",),
    variants={"head": (), "head+tail": ("--data.truncation", "head+tail")},
    retests={"head, read in windows": ("head", ("--data.windows", "true"))},
)


def main() -> None:
    options = parser(__doc__, STUDY)
    add_runs(options, STUDY, sweep_train=4000)
    compare(STUDY, options.parse_args())


if __name__ == "__main__":
    main()
