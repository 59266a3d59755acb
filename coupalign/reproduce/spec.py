"""Read a table: a small YAML file with published numbers and, per method, how to train it here."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from coupalign.config.load import read_section
from coupalign.config.schema import Section
from coupalign.errors import InputError
from coupalign.evaluation.metrics import METRICS

TABLES = Path("configs/tables")


class TableRow(Section):
    """One method of a table."""

    method: str
    paper: dict[str, float] = Field({}, description="Published numbers by column, in percent.")
    config: str | None = Field(
        None,
        description="File in configs/ that trains it on real data. Null: not in this harness.",
    )
    shapes: tuple[str, ...] | None = Field(
        None,
        description="Overrides of configs/refshapes.yaml that make it. Null: no such row there.",
    )


class Table(Section):
    """A table: published numbers and the runs that reproduce them."""

    title: str
    source: str = Field(description="Source of the published numbers.")
    columns: tuple[str, ...] = Field(description='Split and metric per column: "val oIoU".')
    rows: tuple[TableRow, ...]

    @model_validator(mode="after")
    def _columns_exist(self) -> Table:
        for column in self.columns:
            metric = column.partition(" ")[2]
            if metric not in METRICS:
                raise ValueError(
                    f"column {column!r}: a split and one of {', '.join(METRICS)} are expected, "
                    "such as 'val oIoU'"
                )

        for row in self.rows:
            unknown = sorted(set(row.paper) - set(self.columns))
            if unknown:
                raise ValueError(f"row {row.method!r}: {unknown[0]!r} is not one of the columns")
        return self


def read_table(name: str) -> Table:
    """Read a table of configs/tables by its name, or any other by the path of its file.

    Raises:
        InputError: there is no such table (lists those that exist), or the file is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in TABLES.glob("*.yaml"))
        listing = ", ".join(names) or "none: call it in the root of the checkout"
        raise InputError(f"{path}: no such table; in {TABLES} there are {listing}")
    return read_section(Table, path)
