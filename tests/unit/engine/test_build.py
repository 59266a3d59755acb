"""The name of an engine, as printed and tracked."""

from __future__ import annotations

from coupalign.config.schema import DdpEngine, DeepSpeedEngine
from coupalign.engine.build import engine_name


def test_engine_name_has_the_zero_stage() -> None:
    assert engine_name(DdpEngine()) == "ddp"
    assert engine_name(DeepSpeedEngine(stage=2)) == "deepspeed ZeRO 2"
