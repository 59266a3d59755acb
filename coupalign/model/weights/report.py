"""What became of every tensor when weights were loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """The account of one load; every tensor of the model and of the file is in exactly one of the lists.

    Attributes:
        part: "image" or "text".
        source: the file that was read, or "random start".
        loaded: names, the model's, of the tensors copied as they are.
        interpolated: (name, shape in the file, shape in the model) of the tensors that were resized.
        left_out: (name in the file, why) of the tensors the model has no use for.
        missing: names of the model's tensors that the file may lack, and does: they keep their start.
        notes: prefixes taken off, names translated, why nothing was loaded.
        leak: why these weights may have seen the test images; "" where nothing says so.
    """

    part: str
    source: str
    loaded: tuple[str, ...] = ()
    interpolated: tuple[tuple[str, Shape, Shape], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    leak: str = ""

    @property
    def random(self) -> bool:
        """Whether the part starts from random numbers."""
        return not self.loaded

    def text(self) -> str:
        """A few lines for people: counts, and the first names of what is not simply loaded."""
        if self.random:
            return "\n".join(
                [
                    f"{self.part}: RANDOM START, no pretrained weights",
                    *(f"  {note}" for note in self.notes),
                ]
            )
        lines = (
            [f"{self.part}: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES. {self.leak}"]
            if self.leak
            else []
        )
        lines += [
            f"{self.part}: {len(self.loaded)} tensors loaded, {len(self.interpolated)} interpolated, "
            f"{len(self.left_out)} left out, {len(self.missing)} not in the file; from {self.source}"
        ]
        lines += [f"  {note}" for note in self.notes]
        if self.interpolated:
            shown = [f"{name} {old} -> {new}" for name, old, new in self.interpolated]
            lines.append(f"  interpolated (bicubic): {first_of(shown, 2)}")
        for why in dict.fromkeys(why for _, why in self.left_out):
            lines.append(
                f"  left out, {why}: {first_of([name for name, reason in self.left_out if reason == why], 4)}"
            )
        if self.missing:
            lines.append(f"  not in the file, keep their start: {first_of(self.missing, 4)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON object, with `random`."""
        return {**asdict(self), "random": self.random}


def random_report(part: str, why: str) -> LoadReport:
    """The report of a part that keeps its random start, which `text` says in capitals."""
    return LoadReport(part, "random start", notes=(why,))


def first_of(names: Iterable[str], count: int) -> str:
    """The first `count` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
