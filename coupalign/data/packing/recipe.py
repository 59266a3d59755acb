"""The recipe of `coupalign pack`: a small YAML file that names annotation sets and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from coupalign.config.load import read_section
from coupalign.config.schema import Section


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder is known for {path.parts[0]}") from None


HomePath = Annotated[Path, AfterValidator(_expand_home)]
Name = Annotated[str, Field(pattern=r"^[\w+-][\w.+-]{0,99}$")]


class AnnotationSet(Section):
    """One refs file: `<root>/<folder>/refs(<split_by>).p`."""

    dataset: Name = Field(
        description="Name of the data set in the index: refcoco, refcoco+, refcocog, refshapes, …"
    )
    split_by: Name = Field(description="Name of the partition: unc, google, umd, …")
    folder: str | None = Field(
        None, description="Folder below root. Default: the name of the data set."
    )


class Recipe(Section):
    """Which annotation sets to pack into one shard set, and how."""

    name: Name = Field(description="Name of the shard set.")
    out: HomePath | None = Field(
        None,
        description="Directory for the shards. Null: give it on the command line with --out.",
    )
    root: HomePath = Field(
        description="Folder that contains refcoco/, images/ and so on. "
        "A relative path starts at the current directory."
    )
    sets: tuple[AnnotationSet, ...] = Field(
        min_length=1,
        description="Annotation sets to pack together. "
        "An image is stored once, with the refs of all sets.",
    )
    images: HomePath | None = Field(
        None,
        description="Folder of the photographs. Null: search the customary folders below root.",
    )
    shard_mb: float = Field(
        256,
        gt=0,
        description="Maximum image bytes per tar, in MB (1e6 bytes). "
        "A larger image gets a tar of its own.",
    )
    max_images: int | None = Field(
        None, ge=1, description="Maximum number of images per tar. Null: only shard_mb limits it."
    )
    vocabulary_size: int | None = Field(
        8000,
        ge=10,
        description="Size of the WordPiece vocabulary to train while packing. "
        "Null: do not train one.",
    )
    missing: Literal["fail", "skip"] = Field(
        "fail",
        description="What to do with a ref without its image or annotation: "
        "fail, or skip it and report the number of skipped refs.",
    )

    @model_validator(mode="after")
    def _no_set_listed_twice(self) -> Recipe:
        names = [f"{item.dataset}/{item.split_by}" for item in self.sets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"sets lists {', '.join(repeated)} more than once")
        return self


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; $VARIABLES and ~ are expanded.

    Raises:
        InputError: the message names the file, the key, the problem and the nearest valid key.
    """
    return read_section(Recipe, Path(path), overrides)
