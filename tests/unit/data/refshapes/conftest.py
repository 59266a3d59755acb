"""Generated RefShapes sets, one per level."""

from __future__ import annotations

import pytest

from tests.unit.data.refshapes.reader import GeneratedSet


@pytest.fixture(scope="session", params=["easy", "hard"])
def generated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> GeneratedSet:
    """A set of 150 images; tests must not change its files."""
    return GeneratedSet(tmp_path_factory.mktemp("refshapes"), request.param, workers=0)
