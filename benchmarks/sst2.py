"""SST-2 by every method: a sweep of learning rates, then quality runs at the best one, HF PEFT's beside ours.

    python benchmarks/make_minilm.py models/minilm
    python benchmarks/sst2.py --backbone models/minilm --data data/sst2 --parallel 8 --precision bf16-mixed
    python benchmarks/sst2.py ... --methods sparse_lora:sparsity=l1,strength=.1 --at 1e-3   # with arguments of a method
    python benchmarks/sst2.py ... --methods lora@1e-3 qlora --rates 5e-4 1e-3   # one at its rate, one with rates to try
    python benchmarks/sst2.py --report runs/benchmark_sst2/lines.jsonl          # the tables of runs that have ended

Ours run through `lit-peft fit --config sst2/lora --config methods/NAME` as a user would run them; HF PEFT's adapter
is put into the same task, data and trainer. The sweep trains on --sweep-train sentences with seed 0 and takes the
rate of the highest validation accuracy (on a part cut from train); the runs that count train on all, with the seeds
given, and are scored once on the official validation set (872 sentences) with the checkpoint of the lowest validation
NLL. Memory is the peak of each process; times say little where several share the GPU. What follows `--` goes to every
run. Each run keeps log.txt and metrics.json in a folder of its own under --out, and adds a line to --lines.
Prints two tables, then one line of JSON. Needs the dev extra (peft).
"""

from comparison import KNOWN, Study, add_runs, compare, parser
from peft_worker import TheirClassifier

STUDY = Study(
    name="sst2",
    recipe="sst2/lora",
    scores={"acc": 4, "ece": 4, "brier": 4, "nll": 4},
    select="val/acc",
    methods=KNOWN,
    theirs=TheirClassifier.methods,
    rates={"full_fine_tuning": (2e-5, 5e-5, 1e-4, 2e-4), "prompt_tuning": (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)},
    common_rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    several_seeds=(
        *("lora", "full_fine_tuning", "bitfit", "hira", "dora"),
        *("qlora", "sparse_lora", "ia3", "adalora", "vera"),
    ),
)


def main() -> None:
    options = parser(__doc__, STUDY)
    add_runs(options, STUDY, sweep_train=8000)
    compare(STUDY, options.parse_args())


if __name__ == "__main__":
    main()
