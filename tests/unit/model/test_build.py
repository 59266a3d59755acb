"""build_model: the configuration's `kind` selects the method."""

from __future__ import annotations

import pytest

from coupalign.config.load import read_config
from coupalign.config.schema import CoupAlignConfig
from coupalign.model.baselines.lavt import Lavt
from coupalign.model.baselines.lts import Lts
from coupalign.model.baselines.vlt import Vlt
from coupalign.model.build import build_model
from coupalign.model.coupalign import CoupAlign
from tests.unit.model.baselines.examples import BASELINES
from tests.unit.model.examples import VOCABULARY


@pytest.mark.parametrize("kind, method", [("lavt", Lavt), ("vlt", Vlt), ("lts", Lts)])
def test_build_model_returns_the_method_of_the_kind(kind, method):
    assert type(build_model(BASELINES[kind], VOCABULARY, 64)) is method


def test_build_model_returns_coupalign():
    small = {"image": {"kind": "small"}, "text": {"kind": "small"}}

    model = build_model(CoupAlignConfig.model_validate(small), VOCABULARY, 64)

    assert type(model) is CoupAlign


@pytest.mark.parametrize("kind", BASELINES)
def test_override_of_model_kind_keeps_encoders_and_nothing_else(kind, tmp_path):
    config_file = tmp_path / "run.yaml"
    config_file.write_text("""
model:
  image: {kind: timm, name: darknet53}
  text: {kind: small, width: 48}
  decoder: {width: 64}
  losses: {contrast: 0.3, foreground: 3.0}
""")

    model = read_config(config_file, [f"model.kind={kind}"]).model
    with_dice = read_config(config_file, [f"model.kind={kind}", "model.losses.dice=1"]).model

    encoders = {
        "image": {"kind": "timm", "name": "darknet53"},
        "text": {"kind": "small", "width": 48},
    }
    assert model == type(BASELINES[kind]).model_validate(encoders)
    assert with_dice.losses.dice == 1
    assert with_dice.losses.foreground == (1.1 if kind == "lavt" else 1.0)
