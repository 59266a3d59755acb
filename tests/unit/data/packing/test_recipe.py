"""Recipes: errors in them, and the ones that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.data.packing.recipe import read_recipe
from coupalign.errors import InputError

SHIPPED = Path(__file__).resolve().parents[4] / "shards" / "recipes"


def test_unknown_keys_are_named_with_file_and_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nroot: /x\nsets: [{dataset: refcoco, splitby: unc}]\nshard_md: 3\n")

    with pytest.raises(InputError) as caught:
        read_recipe(file)

    message = str(caught.value)
    assert "r.yaml" in message
    assert "'shard_mb'" in message
    assert "'split_by'" in message


@pytest.mark.parametrize(
    "sets, message",
    [
        ("[]", "sets"),
        ("[{dataset: a, split_by: b}, {dataset: a, split_by: b, folder: c}]", "a/b more than once"),
    ],
)
def test_missing_and_repeated_sets_are_refused(tmp_path: Path, sets: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\nroot: /x\nsets: {sets}\n")

    with pytest.raises(InputError, match=message):
        read_recipe(file)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFER_ROOT", "~/refer")

    recipe = read_recipe(file)

    assert recipe.name == file.stem
    assert recipe.out == Path("data/shards") / recipe.name
    assert recipe.root in (Path.home() / "refer", Path("data/refshapes"))
