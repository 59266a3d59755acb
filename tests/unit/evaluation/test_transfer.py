"""Copies that do not wait: what arrives is what was sent, and items come one late."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from coupalign.evaluation.transfer import PendingCopy, lag_by_one, start_copy


def test_lag_by_one_keeps_order_and_lags_by_one():
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    seen = [(number, len(made)) for number in lag_by_one(numbers())]

    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_lag_by_one_of_none_or_one_item():
    assert list(lag_by_one([])) == []
    assert list(lag_by_one([7])) == [7]


def test_pending_copy_holds_tensor_as_it_was_sent():
    tensor = torch.arange(5)

    copy = PendingCopy(tensor)
    tensor += 1

    assert copy.numpy().tolist() == [0, 1, 2, 3, 4]


def test_start_copy_brings_array_to_device():
    array = np.array([[True, False]])

    tensor = start_copy(array, torch.device("cpu"))

    assert tensor.dtype == torch.bool
    assert tensor.tolist() == [[True, False]]
