"""What a training step does to the weights, and what it does not do to the machine."""

from __future__ import annotations

import gc
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from transformers import BertConfig

from coupalign.engine.optimizer import parameter_groups
from coupalign.model.build import build_model
from tests.e2e.scored_run import build_fresh_engine, config_of, train_loader_of

# Operators that read a number, or a size that depends on numbers: a GPU would be waited for.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


def test_step_collects_no_garbage_empties_no_cache_and_waits_for_no_number(
    scored_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAVT calls gc.collect, empty_cache, twice synchronize, and loss.item() in every iteration."""
    config = config_of(scored_run, "train.ema.decay=0.9")
    engine, calls = build_fresh_engine(config), []
    [(_, batches)] = islice(train_loader_of(config).steps_from(0), 1)
    engine.train_step(batches, 1.0)
    for owner, name in ((gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))

    with profile() as profiler:
        stats = engine.train_step(batches, 1.0)

    assert not calls and len(batches) == 4 and config.train.ema
    assert waits(profiler) == []

    with profile() as profiler:
        assert stats.applied
    assert waits(profiler), "this is how a wait would have been seen"


def waits(profiler: profile) -> list[str]:
    """List where a GPU would be waited for. AdamW does so too, but only on a CPU."""
    found = []
    for event in profiler.events():
        if event.name not in WAITING:
            continue
        callers, parent = [], event.cpu_parent
        while parent is not None:
            callers.append(parent.name)
            parent = parent.cpu_parent
        if "aten::_fused_adamw_" not in callers:
            found.append(f"{event.name} in {callers}")
    return found


def test_every_layer_of_bert_is_in_the_optimizer_once(scored_run: Path, tmp_path: Path) -> None:
    """LAVT and ReLA give layers 0 to 9 of twelve to the optimizer, and not the embeddings."""
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=300,
    )
    bert.save_pretrained(tmp_path)
    text = f"model.text={{kind: bert, weights: 'random:{tmp_path}'}}"
    model = build_model(config_of(scored_run, text).model, 300, 32)

    groups = parameter_groups(model, config_of(scored_run).optim)

    optimized = [id(parameter) for group in groups for parameter in group["params"]]
    named = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert sorted(optimized) == sorted(named.values()), "each once"
    layers = {
        int(name.split("layer.")[1].split(".")[0])
        for name in named
        if name.startswith("text.") and "layer." in name
    }
    assert layers == set(range(12))


def test_step_moves_every_matrix_of_the_text_encoder(scored_run: Path) -> None:
    config = config_of(scored_run)
    engine = build_fresh_engine(config)
    [(_, batches)] = islice(train_loader_of(config).steps_from(0), 1)
    before = engine.export()

    assert engine.train_step(batches, 1.0).applied

    after = engine.export()
    matrices = [
        name for name, value in before.items() if name.startswith("text.") and value.ndim > 1
    ]
    assert any("embeddings" in name for name in matrices)
    unmoved = [name for name in matrices if torch.equal(before[name], after[name])]
    assert not unmoved


def test_cudnn_stays_on_after_a_training(scored_run: Path) -> None:
    """ETRIS and DETRIS switch cuDNN off for the whole training."""
    assert scored_run.is_dir()
    assert torch.backends.cudnn.enabled
