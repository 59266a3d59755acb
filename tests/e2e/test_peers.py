"""Sixteen defects that were found by reading the code of other projects, each tried on ours, in the order of the list.

One tiny run is trained once, in this process; its learning rate is high, so that its scores move.
"""

from __future__ import annotations

import errno
import gc
import json
import pickle
import shutil
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.profiler import profile
from transformers import BertConfig

from coupalign.cli.parser import main
from coupalign.config.load import override, read_config
from coupalign.config.schema import Config, Source
from coupalign.data import masks
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader, build_train_loader, open_tokenizer
from coupalign.data.index import read_index
from coupalign.data.loader import EvalLoader, TrainLoader
from coupalign.data.packing.refer import read_annotation_set
from coupalign.data.table import Rule
from coupalign.distributed.launcher import read_ranks
from coupalign.distributed.world import World
from coupalign.engine.base import Engine, LossScale, TrainState
from coupalign.engine.build import build_engine
from coupalign.engine.checkpoint import Checkpoints
from coupalign.engine.open_checkpoint import open_checkpoint
from coupalign.engine.optimizer import build_optimizer, parameter_groups
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import Evaluation, evaluate
from coupalign.evaluation.protocols import find_protocol
from coupalign.model.build import build_model
from coupalign.model.weights.load import read_weights
from coupalign.tracking import read_journal

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CHANGES = [
    "data.image_size=32",
    "data.workers=0",
    "train.steps=6",
    "train.evaluate_every=2",
    "train.save_every=2",
    "train.keep_last=1",
    "train.ema=null",
    "model.losses.foreground=40",
    "optim.lr=0.3",
    "schedule.warmup_steps=0",
    "evaluate.protocol=cris",
    "evaluate.bootstrap=0",
]


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, scored after every second, with three different scores."""
    run = tmp_path_factory.mktemp("peers") / "run"
    assert main(["train", str(config), f"run_dir={run}", *CHANGES]) == 0
    scores = curve(run)
    assert (
        sorted(scores) == [2, 4, 6] and len(set(scores.values())) == 3 and min(scores.values()) > 0
    ), f"it proves nothing: {scores}"
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def curve(run: Path) -> dict[int, float]:
    """The score on the first split by step."""
    return {
        row.step: row.metrics["eval/val/oIoU"]
        for row, _ in read_journal(run / "metrics.jsonl")
        if "eval/val/oIoU" in row.metrics
    }


def best_of(scores: dict[int, float]) -> int:
    """The step with the best score."""
    return max(scores, key=scores.__getitem__)


def state_of(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def config_of(run: Path, *changes: str) -> Config:
    return override(read_config(run / "config.yaml"), [f"run_dir={run}", *changes])


def engine_of(config: Config, seed: int = 99) -> Engine:
    torch.manual_seed(seed)
    model = build_model(config.model, len(open_tokenizer(config.data)), config.data.image_size)
    return build_engine(model, build_optimizer(model, config.optim), config, ALONE)


def train_loader(config: Config) -> TrainLoader:
    return build_train_loader(
        config.data,
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=ALONE,
        tokenizer=open_tokenizer(config.data),
    )


def eval_loader(
    config: Config,
    rank: int = 0,
    ranks: int = 1,
    batch: int = 8,
    rule: Rule = "each",
    split: str = "val",
) -> EvalLoader:
    source = config.data.evaluate[0].model_copy(update={"split": split})
    return build_eval_loader(
        config.data,
        [source],
        batch=batch,
        world=World(rank, ranks, rank, ranks, torch.device("cpu")),
        tokenizer=open_tokenizer(config.data),
        rules=[rule],
    )


class Gathered(Exception):
    """A rank has counted its share."""


def score_over(run: Path, ranks: int, batch: int = 8) -> tuple[Evaluation, list[np.ndarray]]:
    """What rank 0 makes of everybody's rows, and the rows of each rank."""
    config, model, _ = open_checkpoint(run)
    shares: list[np.ndarray] = []

    def infer(part: Batch) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(part.image, part.words, part.word_mask).float()

    def gather(rows: np.ndarray, world: World) -> np.ndarray:
        shares.insert(0, rows)
        if len(shares) < ranks:
            raise Gathered
        return np.concatenate(shares)

    def score(rank: int) -> Evaluation:
        loader = eval_loader(config, rank, ranks, batch)
        world = World(rank, ranks, rank, ranks, torch.device("cpu"))
        results = evaluate(infer, loader, [find_protocol("cris")], world=world, bootstrap=0)
        return results["cris", "each"]

    with patch("coupalign.evaluation.evaluator.gather_rows", gather):
        for rank in range(ranks - 1, 0, -1):
            with pytest.raises(Gathered):
                score(rank)
        return score(0), shares


def test_01_resume_loads_the_weights(trained: Path) -> None:
    """CGFormer restores optimizer and schedule, never the model."""
    config = config_of(trained)
    engine, saved = (
        engine_of(config),
        read_weights(trained / "checkpoints" / "step-00000006" / "weights.safetensors"),
    )
    before = engine.export()
    assert not all(torch.equal(before[name], saved[name]) for name in saved)
    state = Checkpoints(config, ALONE, train_loader(config).fingerprint).resume(engine)
    after = engine.export()
    assert state.step == 6 and all(torch.equal(after[name], saved[name]) for name in saved)


def test_02_the_best_is_kept_however_late_it_comes(trained: Path, tmp_path: Path) -> None:
    """CGFormer saves the best model below epoch 50 only."""
    config = config_of(trained, f"run_dir={tmp_path}")
    engine, checkpoints = engine_of(config), Checkpoints(config, ALONE, "data")
    late = 10**7
    for step in (late, late + 1, late + 2):
        checkpoints.save(
            engine,
            TrainState(step, best=0.9, best_step=late, evaluated=step),
            open_tokenizer(config.data),
        )
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{late:08d}"
    assert (tmp_path / "checkpoints" / "best" / "weights.safetensors").is_file()


def test_03_a_checkpoint_holds_its_own_best_score_and_the_loss_scale(trained: Path) -> None:
    """CRIS, ETRIS, DETRIS, CGFormer store the best score of before the epoch, and not the scaler."""
    scores = curve(trained)
    for step in {best_of(scores), 6}:
        state, best = (
            state_of(trained, step)["state"],
            best_of({at: score for at, score in scores.items() if at <= step}),
        )
        assert (state["best"], state["best_step"], state["evaluated"]) == (scores[best], best, step)
    updates, again = LossScale("fp16"), LossScale("fp16")
    for applied in (False, False, True):
        updates.count(torch.tensor(applied))
    assert state_of(trained, 6)["counters"].keys() == updates.state().keys()
    again.restore(json.loads(json.dumps(updates.state())))
    assert again.state() == updates.state() and again.scale == 16384.0


def test_04_the_newest_is_kept_beside_the_best_and_a_resumed_run_knows_its_best(
    run: Path, config: Path
) -> None:
    """LAVT saves the best only, and begins again at -0.1 when it goes on, so the first epoch replaces the best."""
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        f"step-{best_of(curve(run)):08d}",
        "step-00000006",
        "best",
    }
    assert main(["train", str(config), *CHANGES, f"run_dir={run}", "train.steps=8"]) == 0
    scores = curve(run)
    best = best_of(scores)
    assert (
        sorted(scores) == [2, 4, 6, 8]
        and (run / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    )
    state = state_of(run, 8)["state"]
    assert (state["best"], state["best_step"]) == (scores[best], best)


def test_05_a_step_neither_collects_garbage_nor_empties_caches_nor_waits_for_a_number(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAVT calls gc.collect, empty_cache, synchronize twice and loss.item() in every iteration."""
    config = config_of(trained, "train.ema.decay=0.9")
    engine, calls = engine_of(config), []
    [(_, batches)] = islice(train_loader(config).steps_from(0), 1)
    engine.train_step(batches, 1.0)
    for owner, name in ((gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))
    with profile() as profiler:
        stats = engine.train_step(batches, 1.0)
    assert not calls and len(batches) == 4 and config.train.ema
    assert _waits(profiler) == []
    with profile() as profiler:
        assert stats.applied
    assert _waits(profiler), "this is how a wait would have been seen"


def _waits(profiler: profile) -> list[str]:
    """Where a GPU would be waited for: reading a number, or a size that depends on numbers. (AdamW does so on a CPU only.)"""
    asks = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
    found = []
    for event in profiler.events():
        above, parent = [], event.cpu_parent
        while parent is not None:
            above, parent = [*above, parent.name], parent.cpu_parent
        if event.name in asks and "aten::_fused_adamw_" not in above:
            found.append(f"{event.name} in {above}")
    return found


def test_06_ranks_share_the_samples_and_always_read_the_same_sentences(trained: Path) -> None:
    """In LAVT every rank scores everything, with sentences of its own drawing, and nothing is reduced."""
    config = config_of(trained)
    loaders = [eval_loader(config, rank, 2) for rank in (0, 1)]
    shares = [
        {info.number: info.sentence for batch in loader for info in batch.info}
        for loader in loaders
    ]
    again = [
        {info.number: info.sentence for batch in loader for info in batch.info}
        for loader in loaders
    ]
    assert shares == again and {**shares[0], **shares[1]}.keys() == set(range(loaders[0].samples))
    assert sum(map(len, shares)) == loaders[0].samples, "no sample on two ranks"


def test_07_every_layer_of_the_text_encoder_is_trained(trained: Path, tmp_path: Path) -> None:
    """LAVT and ReLA give layers 0 to 9 of twelve to the optimizer, and not the embeddings."""
    BertConfig(
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=300,
    ).save_pretrained(tmp_path)
    model = build_model(
        config_of(trained, f"model.text={{kind: bert, weights: 'random:{tmp_path}'}}").model,
        300,
        32,
    )
    grouped = [
        id(p)
        for group in parameter_groups(model, config_of(trained).optim)
        for p in group["params"]
    ]
    named = {name: id(p) for name, p in model.named_parameters()}
    assert sorted(grouped) == sorted(named.values()), "each once"
    assert {
        int(name.split("layer.")[1].split(".")[0])
        for name in named
        if name.startswith("text.") and "layer." in name
    } == set(range(12))
    config = config_of(trained)
    engine = engine_of(config)
    [(_, batches)] = islice(train_loader(config).steps_from(0), 1)
    before = engine.export()
    assert engine.train_step(batches, 1.0).applied
    after = engine.export()
    matrices = [
        name for name, value in before.items() if name.startswith("text.") and value.ndim > 1
    ]
    assert any("embeddings" in name for name in matrices)
    assert not [name for name in matrices if torch.equal(before[name], after[name])], (
        "layers that did not move"
    )


def test_08_cudnn_stays_on_and_a_rank_is_the_one_of_the_job(trained: Path) -> None:
    """ETRIS and DETRIS switch cuDNN off for the whole training and take the local rank for the rank."""
    assert trained.is_dir() and torch.backends.cudnn.enabled
    assert read_ranks(
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    ) == (9, 16, 1, 8)


def test_09_every_sample_of_a_mixture_can_be_read_and_no_held_out_image_is_trained_on_unasked(
    trained: Path, shards: Path
) -> None:
    """DETRIS gives its mixture one key too many, and leaves the images of its test splits in."""
    mixture = tuple(Source(index=str(shards), split=split) for split in ("train", "val", "testA"))
    counts, config = read_index(shards).counts["refshapes/unc"], config_of(trained)

    def mixed(leaks: str) -> TrainLoader:
        return train_loader(
            config.model_copy(
                update={"data": config.data.model_copy(update={"train": mixture, "leaks": leaks})}
            )
        )

    with pytest.raises(InputError, match="photographs that are to be scored"):
        mixed("refuse")
    assert mixed("exclude").samples == counts["train"]["refs"]
    loader = mixed("allow")
    assert loader.samples == sum(counts[source.split]["refs"] for source in mixture)
    steps = islice(loader.steps_from(0), -(-loader.samples // 8))
    numbers = [info.number for _, batches in steps for batch in batches for info in batch.info]
    assert sorted(numbers[: loader.samples]) == list(range(loader.samples))


def test_10_nothing_is_removed_before_the_new_one_is_whole_and_no_error_is_swallowed(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LISA removes the old checkpoint before it writes the new one, and catches whatever its data raise."""
    config = config_of(run)
    engine, before = (
        engine_of(config),
        {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()},
    )

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(engine, "save", full)
    with pytest.raises(
        InputError,
        match="step-00000007: the checkpoint could not be written .*Whole checkpoints there: .*step-00000006",
    ):
        Checkpoints(config, ALONE, "data").save(engine, TrainState(7), open_tokenizer(config.data))
    assert {
        file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    } == before
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    for tar in damaged.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    source = Source(index=str(damaged), split="train")
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": (source,)})})
    with pytest.raises(InputError, match="unreadable sample"):
        next(train_loader(config).steps_from(0))


def test_11_the_overall_iou_is_of_all_ranks(trained: Path) -> None:
    """OneRef reduces mIoU over the ranks and prints the sums of one rank for oIoU."""
    (alone, _), (both, shares) = score_over(trained, 1), score_over(trained, 2)
    local = [rows[:, -4].sum() / rows[:, -3].sum() for rows in shares]  # I and U of each rank
    assert both.score == alone.score and both.rows.tolist() == alone.rows.tolist()
    assert local[0] != local[1] and both.score.metrics["oIoU"] not in local


def test_12_sentences_are_drawn_each_epoch_joined_with_a_space_and_refs_share_no_record(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    """mmdet draws its random sentence once, joins without a space, and lets two refs of one annotation overwrite each other."""
    config = config_of(trained)
    loader = train_loader(config)
    read: dict[str, set[str]] = {}
    for _, batches in islice(loader.steps_from(0), 3 * loader.samples // 8):
        for info in (info for batch in batches for info in batch.info):
            read.setdefault(info.name.rpartition("/")[0], set()).add(info.name)
    assert sum(len(names) > 1 for names in read.values()) > len(read) / 2, (
        "three epochs, two or three sentences a ref"
    )
    own: dict[str, list[str]] = {}
    for name, sentence in eval_loader(config).names_and_sentences:
        own.setdefault(name.rpartition("/")[0], []).append(sentence)
    assert [sentence for _, sentence in eval_loader(config, rule="concatenated").names_and_sentences] == [
        " ".join(texts) for texts in own.values()
    ]
    folder = shutil.copytree(shards.parent / "refer" / "refcoco", tmp_path / "refcoco")
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    twin = {
        **refs[0],
        "ref_id": 10**6,
        "split": "val",
        "sentences": [{"sent_id": 10**6, "raw": "Another.", "sent": "another"}],
    }
    (folder / "refs(unc).p").write_bytes(pickle.dumps([*refs, twin], protocol=2))
    found = {referral.ref_id: referral for referral in read_annotation_set(tmp_path, "refcoco", "unc")[0]}
    first, second = found[refs[0]["ref_id"]], found[10**6]
    assert first.ann_id == second.ann_id and (first.split, second.split) == (
        refs[0]["split"],
        "val",
    )
    assert [s.cleaned for s in second.sentences] == ["another"] and len(first.sentences) == len(
        refs[0]["sentences"]
    )


def test_13_what_ranks_repeat_to_stay_in_step_is_not_scored_twice(trained: Path) -> None:
    """CARIS sums over the padded samples and divides by the number of real ones."""
    (alone, _), (three, shares) = score_over(trained, 1), score_over(trained, 3, batch=1)
    assert (
        sum(map(len, shares))
        > len(three.rows)
        == three.score.samples
        == eval_loader(config_of(trained)).samples
    )
    assert three.score == alone.score


def test_14_polygons_that_overlap_are_a_union() -> None:
    """The refer toolbox adds the polygons up, and LAVT, CARIS, DMMI, PolyFormer take the sum of 2 for background."""

    def box(x: int, y: int, side: int) -> list[int]:
        return [x, y, x, y + side, x + side, y + side, x + side, y]

    rle = masks.rle_from_segmentation([box(1, 1, 4), box(3, 3, 4)], 9, 9)
    expected = np.zeros((9, 9), bool)
    expected[1:5, 1:5] = expected[3:7, 3:7] = True
    assert np.array_equal(masks.decode(rle), expected) and masks.area(rle) == 16 + 16 - 4


def test_15_a_score_is_of_the_data_that_the_run_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in CRIS' README takes the configuration of one data set and the images of another."""
    capsys.readouterr()
    assert main(["eval", str(run), "data.evaluate.0.dataset=refshapes", "--json"]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])["val"]
    assert score["conditions"]["sets"] == "refshapes/all val"
    config = config_of(run, "data.evaluate.0.dataset=refshapes")
    assert (
        score["data_fingerprint"]
        == eval_loader(config).fingerprint
        != eval_loader(config, split="testA").fingerprint
    )
    assert main(["eval", str(run), "data.evaluate.0.dataset=refcocog"]) == 2
    assert (
        "no sample of refcocog/*, split 'val'; it holds: refshapes/unc" in capsys.readouterr().err
    )


def test_16_the_number_of_samples_is_that_of_the_shards(trained: Path, shards: Path) -> None:
    """CRIS and its children carry tables of the sizes of the data sets in their code."""
    config, counts = config_of(trained), read_index(shards).counts["refshapes/unc"]
    assert train_loader(config).samples == counts["train"]["refs"]
    sizes = {split: eval_loader(config, split=split).samples for split in ("val", "testA", "testB")}
    assert (
        sizes == {split: counts[split]["sentences"] for split in sizes}
        and len(set(sizes.values())) > 1
    )
    assert sum(len(batch) for batch in eval_loader(config)) == sizes["val"]
