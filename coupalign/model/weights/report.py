"""Report what became of every tensor when weights were loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The account of one load. Every tensor of the model and of the file is in exactly one list.

    Attributes:
        part: "image" or "text".
        source: the file that was read, or "random start".
        loaded: names in the model of the tensors that were copied unchanged.
        interpolated: (name, shape in the file, shape in the model) of the resized tensors.
        left_out: (name in the file, reason) of the tensors that the model does not need.
        missing: the model's optional tensors that the file lacks. They keep their initial values.
        notes: prefixes taken off, names translated, why nothing was loaded.
        leak: why these weights may have seen the test images; "" if nothing suggests it.
        is_ours: whether the file holds a whole model that a run of this package trained.
    """

    part: str
    source: str
    loaded: tuple[str, ...] = ()
    interpolated: tuple[tuple[str, Shape, Shape], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    leak: str = ""
    is_ours: bool = False

    @property
    def random(self) -> bool:
        """Whether the part starts from random numbers."""
        return not self.loaded

    def text(self) -> str:
        """Summarize in a few lines: the counts, and the first names of what was not just copied."""
        notes = [f"  {note}" for note in self.notes]
        if self.random:
            return "\n".join([f"{self.part}: RANDOM START, no pretrained weights", *notes])

        lines = []
        if self.leak:
            warning = "THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES"
            lines.append(f"{self.part}: {warning}. {self.leak}")
        lines.append(
            f"{self.part}: {len(self.loaded)} tensors loaded, "
            f"{len(self.interpolated)} interpolated, {len(self.left_out)} left out, "
            f"{len(self.missing)} not in the file; from {self.source}"
        )
        lines += notes

        # What was not just copied.
        if self.interpolated:
            resized = [f"{name} {old} -> {new}" for name, old, new in self.interpolated]
            lines.append(f"  interpolated (bicubic): {list_first(resized, 2)}")
        for reason, names in self._left_out_by_reason().items():
            lines.append(f"  left out, {reason}: {list_first(names, 4)}")
        if self.missing:
            lines.append(f"  not in the file, initial values kept: {list_first(self.missing, 4)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return all fields and `random` as a JSON object."""
        return {**asdict(self), "random": self.random}

    def _left_out_by_reason(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            names.setdefault(reason, []).append(name)
        return names


def random_report(part: str, reason: str) -> LoadReport:
    """Report that a part keeps its random start; `text` says so in capitals."""
    return LoadReport(part=part, source="random start", notes=(reason,))


def list_first(names: Iterable[str], limit: int) -> str:
    """Join the first `limit` names by commas, and say how many more there are."""
    names = list(names)
    listed = ", ".join(names[:limit])
    return f"{listed} and {len(names) - limit} more" if len(names) > limit else listed
