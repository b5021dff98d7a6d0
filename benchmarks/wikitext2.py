"""WikiText-2 by method: a sweep of learning rates, then runs to early stopping, HF PEFT's LoRA beside ours.

    python benchmarks/wikitext2.py --backbone models/gpt2-mini --data data/wikitext2 --precision bf16-mixed --parallel 6
    python benchmarks/wikitext2.py --masked --backbone models/minilm --data data/wikitext2 --precision bf16-mixed
    python benchmarks/wikitext2.py ... --methods lora@1e-3 --seeds 0 --parallel 1     # times, nothing else on the GPU
    python benchmarks/wikitext2.py ... -- --trainer.val_check_interval .25            # a curve of four points an epoch
    python benchmarks/wikitext2.py --masked ... -- --model.pseudo_perplexity true     # a forward pass a token
    python benchmarks/wikitext2.py --report runs/benchmark_wikitext2/lines.jsonl      # the tables of runs that ended

Next tokens by a decoder, `wikitext2/lora_causal`, or with `--masked` masked tokens by an encoder,
`wikitext2/lora_masked`. The sweep trains on --sweep-train blocks with seed 0 and takes the rate of the lowest NLL in
validation. The runs that count train on all, until three validations in a row bring nothing (the recipe's early
stopping) or --epochs are over, and are scored on the test set with the checkpoint of the lowest validation NLL. A
causal model is evaluated in windows that advance by --stride tokens: with blocks of 512 every token but the first ones
of the text sees 256 at least. Prefix tuning takes 20 positions, and has blocks of 492. What the base scores before
training stands in the first row. Memory is the peak of each process; times say little where several share the GPU.
What follows `--` goes to every run. Each run keeps its files in a folder of its own under --out, and adds a line to
--lines. Prints tables of the rates, the results and, masked, the curve of validation; then one line of JSON. Needs the
dev extra (peft).
"""

import sys

from comparison import Study, add_runs, compare, parser

CAUSAL = Study(
    name="wikitext2",
    recipe="wikitext2/lora_causal",
    scores={"perplexity": 2, "word_perplexity": 2, "nll": 4, "acc": 4, "ece": 4},
    select="val/nll",
    methods=("lora", "hira", "sparse_lora", "qlora", "bitfit", "prefix_tuning", "full_fine_tuning"),
    theirs=("lora",),
    rates={
        "full_fine_tuning": (1e-4, 3e-4, 1e-3),
        "hira": (2e-3, 5e-3, 1e-2),
        "bitfit": (1e-3, 3e-3, 1e-2),
        "prefix_tuning": (3e-3, 1e-2, 3e-2),
    },
    common_rates=(1e-3, 2e-3, 5e-3),
    several_seeds=("lora",),
    own={"prefix_tuning": ("--data.block_size", "492")},  # 20 of 512 positions are the prefix's
    base_of=("lora", "qlora"),  # untrained they are the base: B is 0
)
MASKED = Study(
    name="wikitext2_masked",
    recipe="wikitext2/lora_masked",
    scores={"masked_perplexity": 2, "pseudo_perplexity": 2, "nll": 4, "acc": 4, "ece": 4},
    select="val/nll",
    methods=("lora", "bitfit", "full_fine_tuning"),
    theirs=(),
    rates={"full_fine_tuning": (1e-4, 2e-4, 5e-4), "bitfit": (1e-3, 3e-3, 1e-2)},
    common_rates=(5e-4, 1e-3, 2e-3),
    several_seeds=("lora",),
    base_of=("lora",),
    curve=True,
)


def main() -> None:
    study = MASKED if "--masked" in sys.argv else CAUSAL
    options = parser(__doc__, study)
    add_runs(options, study, sweep_train=2000)
    options.set_defaults(epochs=30)
    options.add_argument("--masked", action="store_true", help="masked tokens by an encoder")
    options.add_argument("--batch-size", type=int, default=32, help="blocks a step")
    options.add_argument("--stride", type=int, default=None, help="default: 256; masked: windows do not overlap")
    args = options.parse_args()
    stride = args.stride or (None if args.masked else 256)
    data = ["--data.batch_size", str(args.batch_size), *(["--data.stride", str(stride)] if stride else [])]
    compare(study, args, data)


if __name__ == "__main__":
    main()
