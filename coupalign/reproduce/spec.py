"""What a table consists of: a small YAML file with the published numbers and, for each method that we have, how to train it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from coupalign.config.load import read_section
from coupalign.config.schema import Section
from coupalign.errors import InputError
from coupalign.evaluation.metrics import METRICS

TABLES = Path("configs/tables")


class TableRow(Section):
    method: str
    paper: dict[str, float] = Field({}, description="published number by column, percent")
    config: str | None = Field(
        None,
        description="file in configs/ that trains it on the real data; none: not in this harness",
    )
    shapes: tuple[str, ...] | None = Field(
        None, description="the overrides of configs/refshapes.yaml that make it; none: no such row"
    )


class Table(Section):
    title: str
    source: str = Field(description="where the published numbers are from")
    columns: tuple[str, ...] = Field(description='split and metric: "val oIoU"')
    rows: tuple[TableRow, ...]

    @model_validator(mode="after")
    def _columns_that_exist(self) -> Table:
        for column in self.columns:
            split, _, metric = column.partition(" ")
            if metric not in METRICS:
                raise ValueError(
                    f"column {column!r}: a split and one of {', '.join(METRICS)} are expected, such as 'val oIoU'"
                )
        for row in self.rows:
            if strange := set(row.paper) - set(self.columns):
                raise ValueError(
                    f"row {row.method!r}: {sorted(strange)[0]!r} is none of the columns"
                )
        return self


def read_table(name: str) -> Table:
    """A table of configs/tables by its name, or any other by the path of its file.

    Raises:
        InputError: there is none of that name (lists what is there), or the file is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        known = (
            ", ".join(sorted(file.stem for file in TABLES.glob("*.yaml")))
            or "none: call it in the root of the checkout"
        )
        raise InputError(f"{path}: no such table; in {TABLES} there are {known}")
    return read_section(Table, path)
