"""The result of a benchmark: as JSON, as a table, and compared with an earlier one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from tabulate import tabulate

from coupalign.errors import InputError
from coupalign.files import read_json


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """Base class of the results that `--out` writes and `--against` reads.

    Attributes:
        bench: kind of the benchmark, as in `coupalign bench KIND`.
        machine: see `describe_machine`.
        config: name of the configuration.
    """

    bench: ClassVar[str]

    machine: dict[str, str]
    config: str

    def to_json(self) -> dict[str, Any]:
        """Return the kind and all fields as plain values."""
        return {"bench": self.bench, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Restore a result from `to_json`. Fields that an older file lacks keep their defaults."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: value[name] for name in names if name in value})

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Return the figures to compare with an earlier result, by name."""

    @abstractmethod
    def table(self) -> str:
        """Format the result for people."""


def ratios(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return now / before for every figure that both have. A figure that was 0 is left out."""
    return {name: value / before[name] for name, value in now.items() if before.get(name)}


def read_result(file: Path, machine: Mapping[str, str], bench: str) -> dict[str, Any]:
    """Read an earlier result to compare with.

    Args:
        file: written by --out.
        machine: this machine, see `describe_machine`.
        bench: kind of benchmark that the result must have.

    Raises:
        InputError: the file cannot be read, is not a result of this kind of benchmark, or was
            measured on another machine.
    """
    value = read_json(file, "a result of coupalign bench (--against)")
    try:
        earlier_bench, earlier_device = value["bench"], value["machine"]["device"]
    except (KeyError, TypeError):
        raise InputError(
            f"--against {file}: not a result of coupalign bench; --out writes one"
        ) from None

    if earlier_bench != bench:
        raise InputError(
            f"--against {file}: this is a result of bench {earlier_bench}; "
            f"pass a result of bench {bench}"
        )
    if earlier_device != machine["device"]:
        raise InputError(
            f"--against {file}: measured on {earlier_device}, but this is {machine['device']}; "
            "compare only results of one machine"
        )
    return value


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Put a prefix before each name."""
    return {prefix + name: value for name, value in values.items()}


def format_values(template: str, values: Mapping[str, float]) -> dict[str, str]:
    """Format each value: `format_values("{:.1f} ms", {"step": 3.14})` is {"step": "3.1 ms"}."""
    return {name: template.format(value) for name, value in values.items()}


def format_pairs(values: Mapping[str, str]) -> str:
    """Format names and values in one line."""
    return "  ".join(f"{name} {value}" for name, value in values.items())


def format_rows(rows: Iterable[Sequence[str]], headers: Sequence[str] = ()) -> str:
    """Format rows of at least two cells as a table. The first column is left-aligned."""
    rows = list(rows)
    alignment = ("left", *("right" for _ in rows[0][1:]))
    return tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=alignment)
