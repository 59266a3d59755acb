"""The shipped tables: their numbers are those of the paper, their rows can be trained here."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.load import read_config
from coupalign.errors import InputError
from coupalign.evaluation.metrics import METRICS
from coupalign.reproduce import read_table
from coupalign.reproduce.spec import TABLES
from tests.unit.reproduce.conftest import ROOT

SHIPPED = sorted(file.stem for file in (ROOT / TABLES).glob("*.yaml"))

# The supplement's text, typed off a second time: each row's numbers in the order of the columns.
SUPPLEMENT = {
    "table1": {
        "LSCM": "61.47 73.95 69.58 62.59 49.61 20.63",
        "CMPC": "61.36 71.27 64.44 55.03 39.28 12.89",
        "EFN": "62.76 73.95 69.58 62.59 49.61 20.63",
        "LAVT": "68.1 80.55 75.25 67.27 55.05 25.37",
        "CoupAlign": "68.93 81.26 76.54 69.69 57.07 27.44",
    },
    "table2": {
        "LTS": "65.43 75.16 69.51 60.74 45.17 14.41",
        "VLT": "65.65 76.2",
        "CoupAlign": "68.16 81.02 76.35 69.53 56.91 25.95",
    },
    "table3": {
        "N = 0": "73.85 84.86 80.85 74.62 62.29 29.25",
        "N = 20": "74.77 85.46 81.81 76.22 64.83 30.91",
        "N = 50": "74.98 85.67 81.76 76.2 64.86 31.88",
        "N = 100": "75.49 86.4 83.41 77.59 65.94 32.4",
        "N = 150": "74.12 85.33 81.71 75.86 64.74 31.3",
        "N = 200": "74.38 84.91 81.05 75.36 64.23 31.67",
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_of_a_shipped_table_has_valid_configurations(name: str) -> None:
    for row in read_table(name).rows:
        assert row.paper or row.config or row.shapes is not None, row.method

        if row.config:
            read_config(Path("configs") / row.config)
        if row.shapes is not None:
            read_config(Path("configs/refshapes.yaml"), row.shapes)
            read_config(Path("configs/refshapes_tiny.yaml"), row.shapes)


@pytest.mark.parametrize("name", SUPPLEMENT)
def test_shipped_table_has_the_numbers_of_the_supplement(name: str) -> None:
    table = read_table(name)

    numbers = {}
    for row in table.rows:
        in_order = [row.paper[column] for column in table.columns if column in row.paper]
        numbers[row.method] = " ".join(f"{number:g}" for number in in_order)

    assert numbers == SUPPLEMENT[name]
    main_metric = "mIoU" if name == "table3" else "oIoU"
    metrics = [column.split()[1] for column in table.columns]
    assert metrics == [main_metric, *METRICS[2:7]]


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "main"])
def test_header_of_a_configuration_quotes_the_number_of_its_row(name: str) -> None:
    for row in read_table(name).rows:
        if not row.config or not row.paper or row.config == "refcoco_swin_b.yaml":
            continue

        text = (Path("configs") / row.config).read_text(encoding="utf-8")
        header = text.split("name:")[0]
        first_number = next(iter(row.paper.values()))
        assert f"{first_number:.2f}" in header, row.config


def test_unknown_table_lists_the_existing_ones() -> None:
    with pytest.raises(InputError, match="table4.yaml: no such table.*table1, table2, table3"):
        read_table("table4")


def test_unknown_metric_in_a_column_is_refused() -> None:
    Path("own.yaml").write_text("title: x\nsource: y\ncolumns: [val oIoUU]\nrows: []\n")

    with pytest.raises(InputError, match="column 'val oIoUU'"):
        read_table("own.yaml")
