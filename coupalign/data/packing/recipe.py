"""What `coupalign pack` reads: a small YAML file that names annotation sets and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from coupalign.config.load import read_section
from coupalign.config.schema import Section

HomePath = Annotated[Path, AfterValidator(lambda path: path.expanduser())]
Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


class AnnotationSet(Section):
    """One refs file: `<root>/<folder>/refs(<split_by>).p`."""

    dataset: Name = Field(
        description="refcoco, refcoco+, refcocog, refshapes …: its name in the index"
    )
    split_by: Name = Field(description="unc, google, umd …")
    folder: str | None = Field(
        None, description="folder below root; none: the name of the data set"
    )


class Recipe(Section):
    name: Name = Field(description="of the shard set")
    out: HomePath | None = Field(
        None, description="where the shards go; none: given on the command line"
    )
    root: HomePath = Field(
        description="folder that holds refcoco/, images/ …; relative to the current directory"
    )
    sets: tuple[AnnotationSet, ...] = Field(
        min_length=1, description="packed together: an image once, with the refs of all"
    )
    images: HomePath | None = Field(
        None, description="folder of the photographs; none: the customary places below root"
    )
    shard_mb: float = Field(
        256,
        gt=0,
        description="most image bytes in one tar, MB (1e6 bytes); a larger image has its own",
    )
    max_images: int | None = Field(
        None, ge=1, description="most images in one tar; none: only shard_mb counts"
    )
    vocabulary_size: int | None = Field(
        8000, ge=10, description="of the WordPiece vocabulary trained here; none: none"
    )
    missing: Literal["fail", "skip"] = Field(
        "fail", description="a ref without its image or annotation; skip counts and reports"
    )

    @model_validator(mode="after")
    def _each_set_once(self) -> Recipe:
        names = [f"{part.dataset}/{part.split_by}" for part in self.sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sets name {', '.join(twice)} more than once")
        return self


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, changed by `key=value` overrides; $VARIABLES and ~ are expanded.

    Raises:
        InputError: names the file, the key, what is wrong and the nearest valid key.
    """
    return read_section(Recipe, Path(path), overrides)
