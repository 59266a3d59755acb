"""Each trainable parameter is in one group with the right decay; apex is never mistaken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from coupalign.config.schema import OptimConfig
from coupalign.engine.optimizer import build_optimizer, installed_apex, parameter_groups
from coupalign.errors import InputError
from coupalign.model.build import build_model
from tests.distributed.jobs import SIZE, VOCABULARY, tiny


@pytest.mark.parametrize("proposals", [None, 5e-5])
def test_groups_partition_the_parameters(proposals: float | None) -> None:
    model = build_model(tiny().model, VOCABULARY, SIZE)
    config = OptimConfig(
        lr=3e-4, lr_image=1e-4, lr_text=2e-4, lr_proposals=proposals, weight_decay=0.1
    )
    rates = {
        "image": 1e-4,
        "text": 2e-4,
        "proposals": proposals or 3e-4,
        "sma": proposals or 3e-4,
    }

    groups = parameter_groups(model, config)

    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(trainable)
    for group in groups:
        for parameter in group["params"]:
            name = trainable[id(parameter)]
            assert group["lr"] == rates.get(name.split(".")[0], 3e-4), name

            is_exempt = any(part in name for part in ("queries", "gate", "position"))
            decay = 0.0 if parameter.ndim < 2 or is_exempt else 0.1
            assert group["weight_decay"] == decay, name


def test_every_layer_of_the_text_encoder_is_updated() -> None:
    """LAVT's and ReLA's optimizers leave out BERT's embeddings and its last two layers."""
    model = build_model(tiny().model, VOCABULARY, SIZE)

    optimizer = build_optimizer(model, OptimConfig())

    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in updated for parameter in model.text.parameters())


def test_layer_decay_lowers_the_rate_of_each_earlier_block() -> None:
    model = build_model(tiny().model, VOCABULARY, SIZE)
    config = OptimConfig(lr=1.0, lr_image=1.0, lr_text=1.0, layer_decay=0.5)

    groups = parameter_groups(model, config)

    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trainable = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)
    for name, rate in trainable.items():
        match name.split("."):
            case ["image", "net", "stages", stage, *_]:
                assert rate == 0.5 ** (3 - int(stage)), name
            case ["text", "bert", "encoder", "layer", layer, *_]:
                assert rate == 0.5 ** (3 - int(layer)), name
            case ["text", *_]:
                assert rate == 0.5**4, "the embeddings come before the first layer"
            case _:
                assert rate == 1.0, name


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for installed packages, without any apex."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_installed_apex_is_recognized_without_importing_it(site: Path) -> None:
    assert installed_apex() == "absent"

    package = site / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert installed_apex() == "unrelated"

    (package / "optimizers").mkdir()
    (package / "optimizers" / "fused_adam.py").write_text("")
    assert installed_apex() == "nvidia without CUDA kernels"

    (site / "amp_C.py").write_text("")
    assert installed_apex() == "nvidia"


def test_missing_apex_is_an_error_that_names_the_remedy(site: Path) -> None:
    model = torch.nn.Linear(2, 2)

    with pytest.raises(InputError, match="not installed.*optim.impl: torch"):
        build_optimizer(model, OptimConfig(impl="apex"))

    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("")
    with pytest.raises(InputError, match="unrelated web toolkit"):
        build_optimizer(model, OptimConfig(impl="apex"))
