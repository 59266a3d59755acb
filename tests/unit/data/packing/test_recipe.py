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


@pytest.mark.parametrize(
    "line, message",
    [
        ("root: ~nosuchuser", "root: no home folder is known for ~nosuchuser"),
        ("root: ~nosuchuser/refer", "no home folder is known for ~nosuchuser"),
        ("root: null", "root: .*found None"),
        ("root: [a]", r"root: .*found \['a'\]"),
        ('root: "a\\0b"', "not allowed"),
        ("root: x\nshard_mb: .nan", "shard_mb"),
        ("root: x\nshard_mb: .inf", "shard_mb"),
        ("root: x\nshard_mb: many", "shard_mb: .*found 'many'"),
        ("root: x\nmax_images: 1.5", "max_images: .*found 1.5"),
        ("root: x\nmissing: perhaps", "missing: .*found 'perhaps'"),
        ("root: x\nvocabulary_size: 5", "vocabulary_size: .*found 5"),
        ("root: x\nname: ..", "name"),
        ("root: x\nroot: y", "root.* twice"),
    ],
)
def test_wrong_values_are_refused_with_file_and_key(
    tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "r.yaml"
    name = "" if "name:" in line else "name: x\n"
    file.write_text(f"{name}sets: [{{dataset: a, split_by: b}}]\n{line}\n")

    with pytest.raises(InputError, match=f"r.yaml: .*{message}") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_bomb_of_aliases_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file.write_text("\n".join(["a0: &a0 [x]", *levels, "root: *a11"]))

    with pytest.raises(InputError, match="r.yaml") as caught:
        read_recipe(file)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFER_ROOT", "~/refer")

    recipe = read_recipe(file)

    assert recipe.name == file.stem
    assert recipe.out == Path("data/shards") / recipe.name
    assert recipe.root in (Path.home() / "refer", Path("data/refshapes"))
