"""What must hold on two ranks; all in one file, so that one worker runs them on one pair of processes."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from language_models import batch, save
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_buffers import MOVED, Net, method
from test_contract import METHODS
from test_data_order import EXAMPLES, QUIET, Data, Recorder
from test_full import Blocks, Moves, moved
from test_long_texts import LENGTHS, save_backbone
from test_long_texts import Data as LongTexts
from torch import nn
from toys import loader
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft import AdaLoRA, FullFineTuning, LoRA, SparseLoRA
from lit_peft.core.quantize import make_quantizer
from lit_peft.core.sharded import is_sharded, whole
from lit_peft.tasks import CausalLanguageModeling, TextClassification
from lit_peft.testing.conformance import assert_same, perturb
from lit_peft.testing.subjects import IN, OUT
from lit_peft.training.sharding import _blocks, shard_blocks


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def sharded_step(rank: int, name: str) -> tuple[float, dict[str, float], float]:
    """Largest difference between one process and two sharded ones: output, then gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def build():
        torch.manual_seed(0)
        module = Two()
        METHODS[name](target_modules=["a", "b"]).attach(module)
        perturb(module)
        return module

    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(3))
    alone, sharded = build(), build()
    expected = alone(x)
    expected.square().mean().backward()
    mesh = init_device_mesh("cpu", (2,))
    for child in (sharded.a, sharded.b):
        fully_shard(child, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    half = sharded(x[2 * rank : 2 * rank + 2])
    half.square().mean().backward()
    gradients = {}
    for (key, mine), reference in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        assert (mine.grad is None) == (reference.grad is None), key
        if mine.grad is not None:
            gradients[key] = (mine.grad.full_tensor() - reference.grad).abs().max().item()
    return (
        (half - expected[2 * rank : 2 * rank + 2]).abs().max().item(),
        gradients,
        expected.abs().max().item(),
    )


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_under_fsdp2_equal_one(two_ranks, name):
    for output, gradients, scale in two_ranks(sharded_step, name):
        assert scale > 0.1
        assert output < 1e-6
        assert gradients and max(gradients.values()) < 1e-6


QUANTISED = ("nf4", {"compute_dtype": "float32", "storage_dtype": "float32"}), ("int8", {})


def spread(module: Any, wrapped: str) -> Any:
    """What a rank runs of two layers: sharded layer by layer by fsdp2, wrapped by ddp, or as they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if wrapped == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for child in (module.a, module.b, module):
            fully_shard(child, mesh=mesh)
    return nn.parallel.DistributedDataParallel(module) if wrapped == "ddp" else module


def quantised_step(rank: int, name: str, mode: str, wrapped: str) -> dict[str, torch.Tensor]:
    """Output and gradients of two quantised layers, whole; each of two ranks has half of the batch."""
    torch.manual_seed(0)
    module: Any = Two()
    for layer in (module.a, module.b):
        make_quantizer({"mode": mode, **dict(QUANTISED)[mode]}).quantize(layer, torch.device("cpu"))
    METHODS[name](target_modules=["a", "b"]).attach(module)
    perturb(module)
    model = spread(module, wrapped)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(3))
    y = model(x if wrapped == "no" else x[2 * rank : 2 * rank + 2])
    y.square().mean().backward()
    gradients = {key: whole(p.grad) for key, p in module.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    return {"output": y.detach(), **gradients}


shards_integers = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="FSDP2 shards integers from torch 2.12 on"
)


@pytest.mark.parametrize(
    ("mode", "wrapped"),
    [("nf4", "ddp"), ("nf4", "fsdp2"), ("int8", "ddp"), pytest.param("int8", "fsdp2", marks=shards_integers)],
)
@pytest.mark.parametrize("name", ["lora", "hira"])
def test_two_ranks_on_a_quantised_base_equal_one(two_ranks, name, mode, wrapped):
    alone = quantised_step(0, name, mode, "no")
    ranks = two_ranks(quantised_step, name, mode, wrapped)
    torch.testing.assert_close(torch.cat([rank["output"] for rank in ranks]), alone["output"])
    for key, gradient in alone.items():
        if key != "output":
            assert torch.equal(ranks[0][key], ranks[1][key])
            torch.testing.assert_close(ranks[0][key], gradient)


def _switched(rank: int, folder: str, sharded: bool) -> dict[str, torch.Tensor]:
    """Outputs of two adapters with a head of their own, alone, summed, off, and loaded from a folder."""
    torch.manual_seed(0)
    module = Two()
    for name in ("one", "two"):
        lit_peft.set_active(module, None)
        LoRA(r=2, dropout=0.0, target_modules="a", train_also="b", name=name).attach(module)
        perturb(module)
        if name == "two":
            perturb(module)
    spread(module, "fsdp2" if sharded else "no")
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(3))
    found = {}
    for names in ("one", "two", None, ["one", "two"], {"one": 0.5}):
        lit_peft.set_active(module, names, head="two" if names == ["one", "two"] else None)
        found[str(names)] = module(x).detach()
    for name in ("one", "two"):
        lit_peft.save(module, folder, name)  # a collective; "two" does not run
        torch.manual_seed(0)
        twin = Two()
        lit_peft.load(twin, folder)
        found[f"{name} from a folder"] = twin(x).detach()
        if sharded:
            torch.distributed.barrier()
    return found


def test_switching_under_fsdp2_is_that_of_one_process(two_ranks, tmp_path):
    alone = _switched(0, str(tmp_path / "1"), False)
    for found in two_ranks(_switched, str(tmp_path / "2"), True):
        for name, output in found.items():
            torch.testing.assert_close(output, alone[name], rtol=1e-5, atol=1e-6)
    for name in ("one", "two"):
        assert torch.equal(alone[f"{name} from a folder"], alone[name])
    outputs = list(alone.values())[:5]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def _adalora_steps(rank: int, wrapped: str) -> list[torch.Tensor]:
    """`A`, `E`, `B` of two layers after six steps; each of two ranks has half of the batch."""
    torch.manual_seed(0)
    module: Any = Two()
    method = AdaLoRA(init_r=5, target_r=2, tinit=0.0, total_steps=6, every=2, target_modules=["a", "b"])
    method.attach(module)
    perturb(module)
    model = spread(module, wrapped)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        x = torch.randn(4, IN, generator=generator)
        (
            model(x if wrapped == "no" else x[2 * rank : 2 * rank + 2]).square().mean() + method.penalty(module)
        ).backward()
        method.before_optimizer_step(module)
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(module)
    return [whole(t).detach() for path in "ab" for t in getattr(module, path).peft["default"].state_dict().values()]


@pytest.mark.parametrize("wrapped", ["fsdp2", "ddp"])
def test_adalora_masks_on_two_ranks_as_on_one(two_ranks, wrapped):
    alone = _adalora_steps(0, "no")
    assert sum(int(t.sum()) for t in alone if t.dtype == torch.bool) == 4
    first, second = two_ranks(_adalora_steps, wrapped)
    for one, other, reference in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, reference)


def _sparse_steps(rank: int, sparsity: Any, wrapped: str) -> list[torch.Tensor]:
    """State of two layers after ten steps; each of two ranks has half of the batch."""
    torch.manual_seed(0)
    module: Any = Two()
    method = SparseLoRA(sparsity, r=5, dropout=0.0, begin=0.2, every=3, target_modules=["a", "b"])
    method.attach(module)
    perturb(module)
    model = spread(module, wrapped)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 11):
        x = torch.randn(4, IN, generator=generator)
        loss = model(x if wrapped == "no" else x[2 * rank : 2 * rank + 2]).square().mean()
        penalty = method.penalty(module)
        (loss if penalty is None else loss + penalty).backward()
        method.before_optimizer_step(module)
        optimizer.step()
        optimizer.zero_grad()
        method.sparsify(module, [optimizer], step, 10)
    state = [whole(t).detach() for path in "ab" for t in getattr(module, path).peft["default"].state_dict().values()]
    return [*state, method.achieved(module)]


@pytest.mark.parametrize("wrapped", ["fsdp2", "ddp"])
@pytest.mark.parametrize("sparsity", ["structured", "magnitude", "l1"])
def test_sparse_lora_masks_on_two_ranks_as_on_one(two_ranks, sparsity, wrapped):
    alone = _sparse_steps(0, sparsity, "no")
    assert alone[-1].item() == pytest.approx(0.5, abs=0.02)
    first, second = two_ranks(_sparse_steps, sparsity, wrapped)
    for one, other, reference in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, reference)


class Indices(BasePredictionWriter):
    def write_on_epoch_end(self, trainer: Any, model: Any, predictions: Any, indices: Any) -> None:
        self.rows, self.numbers = indices[0], predictions


def _train_on_one_rank(rank: int, tokenizer: str, use_distributed_sampler: bool) -> dict[str, Any]:
    writer = Indices("epoch")
    trainer = pl.Trainer(
        **QUIET,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=use_distributed_sampler,
        callbacks=[writer],
        enable_checkpointing=False,
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    model, data = Recorder(tokenizer), Data(batch_size=4, eval_batch_size=4)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    return {**model.seen, "rows": writer.rows, "predicted": writer.numbers}


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_lightning_on_two_ranks(two_ranks: Any, tokenizer: str, use_distributed_sampler: bool) -> None:
    first, second = two_ranks(_train_on_one_rank, tokenizer, use_distributed_sampler)
    for epoch in range(2):
        steps = [[numbers for e, _, numbers in rank["train"] if e == epoch] for rank in (first, second)]
        assert list(map(len, steps[0])) == list(map(len, steps[1])) and len(steps[0]) == 6
        assert sorted(sum((sum(rank, []) for rank in steps), [])) == list(range(EXAMPLES))  # noqa: RUF017
    assert first["train"][0] != first["train"][6]
    # 15 examples: 8 and 7, both in 2 steps of at most 4; in predict the rows are known to a writer
    assert first["predicted"] == [[100, 102, 104, 106], [108, 110, 112, 114]]
    assert second["predicted"] == [[101, 103, 105, 107], [109, 111, 113]]
    assert sorted(sum((*first["test"], *second["test"]), [])) == list(range(100, 115))  # noqa: RUF017
    assert [len(batch) for rank in (first, second) for batch in rank["test"]] == [4, 4, 4, 3]
    assert first["val"][-2:] == first["test"]
    assert second["rows"] == [[1, 3, 5, 7], [9, 11, 13]]


def _score_documents(rank: int, backbone: str, ranks: int) -> tuple[dict[str, float], int]:
    """Metrics of documents of very different lengths, and how often the model runs for them."""
    more = {"strategy": DDPStrategy(process_group_backend="gloo"), "plugins": [TorchElasticEnvironment()]}
    trainer = pl.Trainer(**QUIET, **(more if ranks > 1 else {}), devices=ranks, enable_checkpointing=False)
    data = LongTexts(windows=True, max_length=512, eval_batch_size=2)
    torch.manual_seed(0)
    task = TextClassification(backbone=backbone, label_names=["0", "1", "2"])
    task.configure_model()
    calls: list[int] = []
    task.model.register_forward_hook(lambda *args: calls.append(rank))
    (scores,) = trainer.test(task, data, verbose=False)
    return scores, len(calls)


def test_documents_in_windows_on_two_ranks(two_ranks: Any, tmp_path: Path) -> None:
    """Their metrics are those of one process, and both ranks run the model equally often, as shards demand."""
    backbone = save_backbone(tmp_path)
    (first, calls), (second, others) = two_ranks(_score_documents, backbone, 2)
    assert first == second == pytest.approx(_score_documents(0, backbone, 1)[0], abs=1e-6)
    assert calls == others > len(LENGTHS) / 2


def _unfreeze_on_one_rank(rank: int) -> tuple[list[set[str]], dict[str, torch.Tensor]]:
    watch, module = Moves(), Blocks()
    trainer = pl.Trainer(
        **QUIET,
        strategy=DDPStrategy(process_group_backend="gloo"),  # without find_unused_parameters
        devices=2,
        plugins=[TorchElasticEnvironment()],
        callbacks=[FullFineTuning(1), watch],
        enable_checkpointing=False,
        max_epochs=3,
    )
    trainer.fit(module, loader())
    return watch.moved, module.state_dict()


class Sharded(Net):
    def shard(self, mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        for child in (self.first, self.white, self.head):
            fully_shard(child, mesh=mesh["data_parallel"])


def _move_buffers_on_one_rank(rank: int, sharded: bool, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Ends of a fit of three epochs, and of one that goes on from the checkpoint of the first."""

    def fit(ckpt_path: Path | None) -> dict[str, torch.Tensor]:
        module = (Sharded if sharded else Net)()
        trainer = pl.Trainer(
            **QUIET,
            strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
            if sharded
            else DDPStrategy(process_group_backend="gloo"),
            devices=2,
            plugins=[TorchElasticEnvironment()],
            callbacks=[method(), *([] if ckpt_path else [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)])],
            enable_checkpointing=ckpt_path is None,
            use_distributed_sampler=False,
            max_epochs=3,
        )
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return {key: whole(value).clone() for key, value in module.state_dict().items()}

    return [fit(None), fit(folder / "epoch=0.ckpt")]


@pytest.mark.parametrize("sharded", [False, True])
def test_buffers_that_move_on_two_ranks_are_saved_and_resumed(two_ranks: Any, tmp_path: Path, sharded: bool) -> None:
    ranks = two_ranks(_move_buffers_on_one_rank, sharded, tmp_path)
    assert torch.load(tmp_path / "epoch=0.ckpt")["state_dict"].keys() >= MOVED
    for whole_fit, resumed in ranks:
        assert_same(resumed, whole_fit)
        assert_same(whole_fit, ranks[0][0])
        assert whole_fit["steps"] == 12 and whole_fit["white.mean"].any()


def test_gradual_unfreezing_on_two_ranks(two_ranks: Any) -> None:
    first, second = two_ranks(_unfreeze_on_one_rank)
    assert first[0] == second[0] == [moved(step, 1) for step in range(1, 7)]
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())


def tokens_by_rank(
    rank: int, folder: str, lengths: list[tuple[int, int]], how: str, clip: float | None
) -> dict[str, torch.Tensor]:
    """What a fit over two steps leaves: of one process with all texts, or of two that have a half of each batch."""
    torch.manual_seed(0)
    parts = [batch(*pair, seed=i) for i, pair in enumerate(lengths)]
    if how != "alone":
        parts = [{key: value[rank : rank + 1] for key, value in part.items()} for part in parts]
    strategies = {
        "alone": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "sharded": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
    }
    trainer = pl.Trainer(
        **QUIET,
        strategy=strategies[how](),
        plugins=[] if how == "alone" else [TorchElasticEnvironment()],
        devices=1 if how == "alone" else 2,
        callbacks=[LoRA(r=2, dropout=0.0, target_modules=["c_attn"])],
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    # Steps of SGD are as long as the gradients, which Adam's are not.
    task = CausalLanguageModeling(folder, optimizer=torch.optim.SGD, learning_rate=1.0, warmup=0.0)
    trainer.fit(task, train_dataloaders=torch.utils.data.DataLoader(parts, batch_size=None))
    return {name: whole(p.detach()).clone() for name, p in task.named_parameters() if p.requires_grad}


def _fit_sharded_decoder(rank: int, folder: str, packed: bool) -> float:
    trainer = pl.Trainer(
        **QUIET,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
        devices=2,
        plugins=[TorchElasticEnvironment()],
        callbacks=[LoRA(r=2, dropout=0.0, target_modules=["c_attn"])],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    task = CausalLanguageModeling(folder, learning_rate=0.1, warmup=0.0)
    rows = batch(7) if rank else batch(1)  # a rank's first batch may be a text of one token
    if packed:
        rows["position_ids"] = torch.arange(rows.pop("attention_mask").shape[1])[None]
    trainer.fit(task, train_dataloaders=torch.utils.data.DataLoader([rows], batch_size=None))
    return float(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_sharded_decoder_is_asked_for_what_it_sees_by_all_ranks(two_ranks, tmp_path, packed):
    folder = save(tmp_path, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**batch(7)).loss.item()
    assert two_ranks(_fit_sharded_decoder, folder, packed)[1] == pytest.approx(expected, rel=1e-4)


def _fit_task(rank: int, folder: str, root: Path, how: str, quantize: Any) -> list[dict[str, torch.Tensor]]:
    """Ends of a fit of three epochs, after a test, and of one that goes on from the checkpoint of the first."""

    def fit(ckpt_path: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        strategies = {
            "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
            "sharded": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        }
        trainer = pl.Trainer(
            **QUIET,
            strategy=strategies[how](),
            devices=2,
            plugins=[TorchElasticEnvironment()],
            callbacks=[
                LoRA(r=2, dropout=0.0, target_modules=["c_attn", "wte"], quantize=quantize),
                *([] if ckpt_path else [ModelCheckpoint(root, "{epoch}", save_top_k=-1)]),
            ],
            enable_checkpointing=ckpt_path is None,
            use_distributed_sampler=False,
            max_epochs=3,
        )
        task = CausalLanguageModeling(folder, learning_rate=0.05, warmup=0.0)
        parts = [batch(9, 5, seed=i) for i in range(2)]
        rows = [{key: value[rank : rank + 1] for key, value in part.items()} for part in parts]
        data = torch.utils.data.DataLoader(rows, batch_size=None)
        if ckpt_path is None:
            trainer.test(task, data, verbose=False)  # leaves the outermost weights gathered, those of wte
        trainer.fit(task, data, data, ckpt_path=ckpt_path)
        assert is_sharded(task) is (how == "sharded")
        if how == "sharded":
            lit_peft.save(task, root / "adapter")
        return {name: whole(p.detach()).clone() for name, p in task.named_parameters() if p.requires_grad}

    return [fit(None), fit(root / "epoch=0.ckpt")]


@pytest.mark.parametrize(
    "quantize",
    [
        None,
        {"mode": "nf4", "compute_dtype": "float32", "storage_dtype": "float32"},
        pytest.param({"mode": "nf4", "compute_dtype": "float32"}, marks=shards_integers),
        pytest.param("int8", marks=shards_integers),
    ],
)
def test_a_task_is_sharded_and_ends_where_ddp_ends_also_resumed(two_ranks, tmp_path, quantize):
    folder = save(tmp_path / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ends = {}
    for how in ("ddp", "sharded"):
        (whole_fit, resumed), second = two_ranks(_fit_task, folder, tmp_path / how, how, quantize)
        for other in (resumed, *second):
            assert_same(other, whole_fit)
        assert any(value.abs().max() > 0.01 for key, value in whole_fit.items() if "lora_B" in key)
        ends[how] = whole_fit
    torch.testing.assert_close(ends["sharded"], ends["ddp"], rtol=1e-4, atol=1e-5)
    # One file, of what trains; and a folder, which a whole model takes.
    saved = torch.load(tmp_path / "sharded" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == ends["sharded"].keys()
    model = CausalLanguageModeling(folder)
    model.configure_model()
    lit_peft.load(model, tmp_path / "sharded" / "adapter")
    assert_same({name: p for name, p in model.named_parameters() if name in saved}, ends["sharded"])


def test_blocks_are_what_stands_in_the_outermost_lists():
    a, b, c = (nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])) for _ in range(3))
    model = nn.Sequential(
        nn.Linear(1, 1),
        nn.ModuleDict({"x": nn.Linear(1, 1)}),
        nn.ModuleList([a, nn.ModuleList([b])]),
        nn.ModuleList([a]),
    )
    model.append(nn.ModuleList([nn.ModuleDict({"c": c})]))
    assert _blocks(model) == [a, b, a, c]


class Unsharded(CausalLanguageModeling):
    shard = None


class HalfSharded(CausalLanguageModeling):
    def shard(self, mesh: Any) -> None:
        shard_blocks(self.model.transformer.h[0], mesh)


def _refused(rank: int, folder: str, cls: Any, data: int, tensor: int, *callbacks: Any) -> str:
    trainer = pl.Trainer(
        **QUIET,
        strategy=ModelParallelStrategy(data, tensor, process_group_backend="gloo"),
        devices=2,
        plugins=[TorchElasticEnvironment()],
        callbacks=[*callbacks] or [LoRA(r=2)],
        enable_checkpointing=False,
        max_epochs=1,
    )
    with pytest.raises(ValueError) as raised:
        trainer.fit(cls(folder), torch.utils.data.DataLoader([batch(4)], batch_size=None))
    return str(raised.value)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (
            Unsharded,
            (2, 1),
            "Unsharded is in no shards, so that every one of 2 devices would train adapters of its own.",
        ),
        (HalfSharded, (2, 1), r"HalfSharded.shard leaves model\.transformer\.h\.1\..* and \d more whole, which every"),
        (CausalLanguageModeling, (2, 1, LoRA(), WeightAveraging()), "WeightAveraging averages a copy"),
        (CausalLanguageModeling, (1, 2), "tensor_parallel_size is 2, .* set it to 1, and data_parallel_size to .* 2."),
    ],
)
def test_devices_that_would_train_apart_are_refused(two_ranks, tmp_path, cls, arguments, message):
    for told in two_ranks(_refused, save(tmp_path), cls, *arguments):
        assert re.search(message, told)


class Sizes(dict[str, "Sizes"]):
    """A mesh of one device."""

    def size(self) -> int:
        return 1


def refuse_integers(part: nn.Module, mesh: Any) -> None:
    nn.Parameter(next(part.parameters()).data)  # as torch 2.11 makes its own, which require gradients


def refuse_subclasses(part: nn.Module, mesh: Any) -> None:
    raise NotImplementedError("Int8Tensor dispatch: attempting to run unimplemented operator")


def run_out_of_memory(part: nn.Module, mesh: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("mode", "fails", "error", "message"),
    [
        (
            "nf4",
            refuse_integers,
            ValueError,
            r"no integers, as those of 0\.weight\. .* storage_dtype: float32, or take",
        ),
        (
            "int8_torchao",
            refuse_subclasses,
            ValueError,
            r"no Int8Tensor, as 0\.weight is\. Take .* int8, or take ddp\.",
        ),
        ("nf4", run_out_of_memory, torch.OutOfMemoryError, "CUDA"),
        ("int8_torchao", run_out_of_memory, torch.OutOfMemoryError, "CUDA"),
    ],
)
def test_a_base_that_torch_does_not_shard_is_told_by_name(monkeypatch, mode, fails, error, message):
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    make_quantizer(mode).quantize(layer[0], torch.device("cpu"))
    layer.requires_grad_(False)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", fails)
    with pytest.raises(error, match=message):
        shard_blocks(layer, Sizes(tensor_parallel=Sizes(), data_parallel=Sizes()))


@pytest.mark.parametrize(("how", "clip"), [("ddp", 0.05), ("sharded", None)])
def test_two_ranks_take_the_mean_over_the_tokens_of_both(two_ranks, tmp_path, how, clip):
    folder = save(tmp_path, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    lengths = [(11, 3), (4, 9), (2, 12)]
    alone = tokens_by_rank(0, folder, lengths, "alone", clip)
    for ranks in two_ranks(tokens_by_rank, folder, lengths, how, clip):
        for name, expected in alone.items():
            torch.testing.assert_close(ranks[name], expected, rtol=1e-4, atol=1e-6)
