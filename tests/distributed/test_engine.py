"""DDP, every ZeRO stage and a single process are the same optimizer.

A resumed run is the same run, and a NaN changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.config.load import override
from tests.distributed.jobs import (
    engine_configs,
    follow_loss_scale,
    load_hostile_shares,
    stop_while_averaged,
    tiny,
    train_each,
    train_poisoned,
    train_with_restart,
)
from tests.distributed.ranks import run_ranks

KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero3 offload")
STEPS = 12
# Each engine sums gradients in fp32 in another order: relative differences of 1e-7 per step. Adam's
# division by sqrt(v) + eps amplifies them where the true gradient is zero (an attention's key
# bias). With eps = 1e-5 that noise stays below lr * 1e-7 * |g| / eps. 1e-6 relative on the loss is
# eight times the unit roundoff of fp32 (1.2e-7). Weights move by up to lr = 1e-3 per step, and may
# differ by a hundredth of one step after twelve.
LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-5

Result = dict[str, Any]


@pytest.fixture(scope="module")
def single() -> Result:
    """A single process."""
    return run_ranks(train_each, 1, engine_configs("ddp"), STEPS)[0][0]


@pytest.fixture(scope="module")
def pair() -> dict[str, Result]:
    """Two ranks under every engine."""
    return dict(zip(KINDS, run_ranks(train_each, 2, engine_configs(*KINDS), STEPS)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(kind: str, single: Result, pair: dict[str, Result]) -> None:
    result = pair[kind]

    losses = relative_difference(column(single, 0), column(result, 0))
    norms = relative_difference(column(single, 1), column(result, 1))
    weights = largest_difference(single, result, "weights")
    averages = largest_difference(single, result, "ema")
    print(
        f"{kind}: largest relative difference to one process: loss {losses:.1e}, gradient norm "
        f"{norms:.1e}, weights {weights:.1e}, average {averages:.1e}"
    )

    assert losses < LOSS_TOLERANCE
    assert norms < 100 * LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE
    assert averages < WEIGHT_TOLERANCE
    torch.testing.assert_close(single["logits"], result["logits"], rtol=0, atol=1e-3)
    assert column(single, 0)[-1] < column(single, 0)[0], "the runs compared did not even learn"


def test_restarted_run_equals_an_uninterrupted_one(pair: dict[str, Result], tmp_path: Path) -> None:
    """A step's loss and gradient norm depend on every weight and moment of the steps before it."""
    results = run_ranks(train_with_restart, 2, engine_configs(*KINDS), tmp_path, 3, 8)[0]

    for kind, restarted in zip(KINDS, results):
        uninterrupted = pair[kind]["numbers"][:8]
        if kind == "ddp":
            assert restarted == uninterrupted
        for step, expected in zip(restarted, uninterrupted):
            assert step == pytest.approx(expected, rel=LOSS_TOLERANCE), kind


def test_sums_over_three_ranks_are_the_same_after_a_restart(tmp_path: Path) -> None:
    """DDP reorders its buckets after its first pass, and another order rounds a sum otherwise."""
    config = tiny("train.global_batch=12", "train.max_micro_batch=2")

    [uninterrupted] = run_ranks(train_each, 3, [config], 8)[0]
    [restarted] = run_ranks(train_with_restart, 3, [config], tmp_path, 4, 8)[0]

    assert restarted == uninterrupted["numbers"][:8]


def test_hostile_shares_run_no_code(tmp_path: Path) -> None:
    """DeepSpeed itself loads its files with `weights_only=False`."""
    marker = tmp_path / "ran"
    configs = engine_configs("zero1", "zero2", "zero3")

    [errors] = run_ranks(load_hostile_shares, 1, configs, tmp_path, marker)

    # Two kinds of files, each loaded by DeepSpeed's engine and by its converter.
    assert len(errors) == len(configs) * 2 * 2
    assert all(str(tmp_path) in error and "\n" not in error for error in errors)
    assert not marker.exists()


def test_loss_that_is_not_finite_changes_no_weight() -> None:
    kinds = [kind for kind in KINDS if "offload" not in kind]

    results = run_ranks(train_poisoned, 2, engine_configs(*kinds))[0]

    for kind, result in zip(kinds, results):
        before, after, later = result["before"], result["after"], result["later"]
        assert not result["stats"].applied, kind
        assert result["stats"].bad_ranks == (1,), kind
        assert all(torch.equal(before[name], after[name]) for name in before), kind

        # The step after a skipped one is healthy.
        assert all(loss == loss for loss, _ in result["numbers"]), kind
        assert any(not torch.equal(after[name], later[name]) for name in after), kind


def test_stop_while_averaged_keeps_the_weights() -> None:
    """A stop during an evaluation must not leave averages in the place of weights."""
    kinds = ["ddp", "zero1", "zero3"]

    results = run_ranks(stop_while_averaged, 2, engine_configs(*kinds))[0]

    for kind, result in zip(kinds, results):
        before, after = result["before"], result["after"]
        assert all(torch.equal(before[name], after[name]) for name in before), kind


def test_other_methods_train_alike_under_every_engine() -> None:
    methods = (
        ["model.kind=lavt", "model.decoder.width=8"],
        ["model.kind=vlt", "model.transformer.width=16", "model.transformer.ffn=32"],
        ["model.kind=lts", "model.segment.width=16"],
    )
    configs = [
        override(config, changes)
        for changes in methods
        for config in engine_configs("ddp", "zero3")
    ]

    results = run_ranks(train_each, 2, configs, 2)[0]

    for changes, ddp, zero in zip(methods, results[::2], results[1::2]):
        losses = relative_difference(column(ddp, 0), column(zero, 0))
        assert losses < LOSS_TOLERANCE, changes
        # The norms in front of LAVT's gates leave gradients near zero, which Adam amplifies most.
        assert largest_difference(ddp, zero, "weights") < 10 * WEIGHT_TOLERANCE, changes
        torch.testing.assert_close(ddp["logits"], zero["logits"], rtol=0, atol=1e-3)


def test_mixed_precision_agrees_between_engines() -> None:
    """Weights and gradients stay fp32, so engines differ by less than autocast's rounding does.

    That holds for ZeRO 0 as well, whose own bf16 mode would take a step with zero gradients first.
    """
    kinds = {
        "fp32": ("ddp",),
        "bf16": ("ddp", "zero0", "zero1", "zero2", "zero3"),
        "fp16": ("ddp", "zero2"),
    }
    configs = [
        config.model_copy(update={"precision": precision})
        for precision in kinds
        for config in engine_configs(*kinds[precision])
    ]

    exact, *results = run_ranks(train_each, 2, configs, 2)[0]

    bf16, fp16 = results[:5], results[5:]
    for first, *others in (bf16, fp16):
        rounding = relative_difference(column(exact, 0), column(first, 0))
        for other in others:
            difference = relative_difference(column(first, 0), column(other, 0))
            assert difference < rounding < 0.05


def test_deepspeed_follows_the_loss_scale_of_fp16_down_to_one() -> None:
    """It falls to 1 after many overflows, and DeepSpeed must not keep the 2 before it."""
    configs = [
        config.model_copy(update={"precision": "fp16"})
        for config in engine_configs("zero1", "zero2", "zero3")
    ]

    used = run_ranks(follow_loss_scale, 1, configs, [4.0, 2.0, 1.0, 2.0])[0]

    assert used == [[4.0, 2.0, 1.0, 2.0]] * len(configs)


def test_recomputing_activations_changes_no_number(pair: dict[str, Result]) -> None:
    kinds = ("ddp", "zero2", "zero3")
    recompute = ["model.image.checkpointing=selective", "model.text.checkpointing=true"]
    configs = [override(config, recompute) for config in engine_configs(*kinds)]

    results = run_ranks(train_each, 2, configs, 3)[0]

    for kind, result in zip(kinds, results):
        for step, expected in zip(result["numbers"][:3], pair[kind]["numbers"]):
            assert step == pytest.approx(expected, rel=LOSS_TOLERANCE), kind


def column(result: Result, index: int) -> torch.Tensor:
    """The losses (index 0) or gradient norms (1) of all steps."""
    return torch.tensor(result["numbers"], dtype=torch.float64)[:, index]


def relative_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest one of all steps."""
    return ((expected - found).abs() / expected.abs()).max().item()


def largest_difference(expected: Result, found: Result, kind: str) -> float:
    """The largest one of all "weights" or of their average, "ema"."""
    assert expected[kind].keys() == found[kind].keys()
    return max(
        (found[kind][name] - value).abs().max().item() for name, value in expected[kind].items()
    )
