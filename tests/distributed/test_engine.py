"""DDP, every ZeRO stage and a single process are the same optimizer; a checkpoint is the same run; NaN changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.config.load import override
from tests.distributed.jobs import curves, engines, interrupted, poisoned, tiny
from tests.distributed.ranks import run_ranks

KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero3 offload")
STEPS = 12
# fp32 sums of gradients are taken in another order by each engine: relative differences of 1e-7 a step, which Adam's division
# by sqrt(v) + eps amplifies where the true gradient is zero (an attention's key bias): with eps = 1e-5 that noise stays below
# lr * 1e-7 * |g| / eps. 1e-6 relative on the loss is eight times the unit roundoff of fp32 (1.2e-7); weights move by up to
# lr = 1e-3 a step, and may differ by a hundredth of one step after twelve.
LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_ranks(curves, 1, engines("ddp"), STEPS)[0][0]


@pytest.fixture(scope="module")
def pair() -> dict[str, dict[str, Any]]:
    return dict(zip(KINDS, run_ranks(curves, 2, engines(*KINDS), STEPS)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(
    kind: str, single: dict[str, Any], pair: dict[str, dict[str, Any]]
) -> None:
    one, two = single, pair[kind]
    losses = _losses(one, two)
    norms = torch.tensor(
        [[numbers[1] for numbers in run["numbers"]] for run in (one, two)], dtype=torch.float64
    )
    print(
        f"{kind}: largest relative difference to one process: loss {_relative(losses):.1e}, gradient norm {_relative(norms):.1e}, "
        f"weights {_furthest(one, two, 'weights'):.1e}, average {_furthest(one, two, 'ema'):.1e}"
    )
    assert _relative(losses) < LOSS_TOLERANCE
    assert _relative(norms) < 100 * LOSS_TOLERANCE
    assert _furthest(one, two, "weights") < WEIGHT_TOLERANCE
    assert _furthest(one, two, "ema") < WEIGHT_TOLERANCE
    torch.testing.assert_close(one["logits"], two["logits"], rtol=0, atol=1e-3)
    assert losses[0, -1] < losses[0, 0], "the runs compared did not even learn"


def test_a_resumed_run_equals_an_uninterrupted_one(
    pair: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Loss and gradient norm of a step tell of every weight and every moment of the steps before it."""
    for kind, again in zip(KINDS, run_ranks(interrupted, 2, engines(*KINDS), tmp_path, 3, 8)[0]):
        whole = pair[kind]["numbers"][:8]
        if kind == "ddp":
            assert again == whole
        for found, expected in zip(again, whole):
            assert found == pytest.approx(expected, rel=LOSS_TOLERANCE), kind


def test_sums_over_three_ranks_are_the_same_after_a_restart(tmp_path: Path) -> None:
    """DDP sorts its buckets anew after its first pass, and three numbers added in another order are another number."""
    config = tiny("train.global_batch=12", "train.max_micro_batch=2")
    [whole] = run_ranks(curves, 3, [config], 8)[0]
    [again] = run_ranks(interrupted, 3, [config], tmp_path, 4, 8)[0]
    assert again == whole["numbers"][:8]


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    kinds = [kind for kind in KINDS if "offload" not in kind]
    for kind, result in zip(kinds, run_ranks(poisoned, 2, engines(*kinds))[0]):
        assert not result["stats"].applied, kind
        assert result["stats"].bad_ranks == (1,), kind
        assert all(
            torch.equal(result["before"][name], result["after"][name]) for name in result["before"]
        ), kind
        assert all(loss == loss for loss, _ in result["numbers"]), (
            f"{kind}: the step after a skipped one is healthy"
        )
        assert any(
            not torch.equal(result["after"][name], result["later"][name])
            for name in result["after"]
        ), kind


def test_other_methods_train_alike_under_every_engine() -> None:
    methods = (
        ["model.kind=lavt", "model.decoder.width=8"],
        ["model.kind=vlt", "model.transformer.width=16", "model.transformer.ffn=32"],
        ["model.kind=lts", "model.segment.width=16"],
    )
    configs = [
        override(config, changes) for changes in methods for config in engines("ddp", "zero3")
    ]
    results = run_ranks(curves, 2, configs, 2)[0]
    for changes, ddp, zero in zip(methods, results[::2], results[1::2]):
        assert _relative(_losses(ddp, zero)) < LOSS_TOLERANCE, changes
        # The normalizations in front of LAVT's gates leave gradients near zero, which Adam amplifies the most.
        assert _furthest(ddp, zero, "weights") < 10 * WEIGHT_TOLERANCE, changes
        torch.testing.assert_close(ddp["logits"], zero["logits"], rtol=0, atol=1e-3)


def test_mixed_precision_agrees_between_engines() -> None:
    """Weights and gradients stay fp32 and only autocast rounds: engines differ by less than the rounding itself does.

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
        for config in engines(*kinds[precision])
    ]
    exact, *results = run_ranks(curves, 2, configs, 2)[0]
    for first, *others in (results[:5], results[5:]):
        spread = _relative(_losses(exact, first))
        for other in others:
            assert _relative(_losses(first, other)) < spread < 0.05


def test_recomputing_activations_changes_no_number(pair: dict[str, dict[str, Any]]) -> None:
    kinds = ("ddp", "zero2", "zero3")
    configs = [
        override(config, ["model.image.checkpointing=selective", "model.text.checkpointing=true"])
        for config in engines(*kinds)
    ]
    for kind, found in zip(kinds, run_ranks(curves, 2, configs, 3)[0]):
        for numbers, expected in zip(found["numbers"][:3], pair[kind]["numbers"]):
            assert numbers == pytest.approx(expected, rel=LOSS_TOLERANCE), kind


def _losses(one: dict[str, Any], two: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(
        [[numbers[0] for numbers in run["numbers"]] for run in (one, two)], dtype=torch.float64
    )


def _relative(pair: torch.Tensor) -> float:
    return ((pair[0] - pair[1]).abs() / pair[0].abs()).max().item()


def _furthest(one: dict[str, Any], two: dict[str, Any], what: str) -> float:
    assert one[what].keys() == two[what].keys()
    return max((one[what][name] - two[what][name]).abs().max().item() for name in one[what])
