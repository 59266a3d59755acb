"""Which tensor of a file belongs to which of a module, and what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from coupalign.model.weights.names import NameMap, resize_bias_table

_SHOWN = 4  # tensors named of each kind of difference


@dataclass
class TensorMatch:
    """How the tensors of a file fit those of a module.

    Attributes:
        target: the module's own tensors by name.
        values: what to copy into them, in their shapes; `interpolated` of these had another: (name, file's, module's).
        left_out: (name in the file, why) of what the module does not need.
        kept: the module's optional tensors for which the file has nothing.
        notes: how the file's names were translated.
        missing, unexpected: shapes of the required tensors that only the module, only the file has.
        reshaped: (file's, module's) shapes of the required tensors that differ in them.
    """

    target: Mapping[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    interpolated: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unexpected: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return bool(self.missing or self.reshaped or self.unexpected)

    def differences(self) -> str:
        """The first tensors of each kind of difference, in the order of the model or the file."""
        return "\n".join(
            [
                *_some(
                    "in another shape",
                    [
                        f"{name} {old} in the file, {new} in the model"
                        for name, (old, new) in self.reshaped.items()
                    ],
                ),
                *_some(
                    "missing in the file",
                    [f"{name} {shape}" for name, shape in self.missing.items()],
                ),
                *_some(
                    "only in the file",
                    [f"{name} {shape}" for name, shape in self.unexpected.items()],
                ),
            ]
        )


def match_tensors(
    target: Mapping[str, Tensor], found: Mapping[str, Tensor], naming: NameMap | None
) -> TensorMatch:
    """Give every tensor of both sides its place; copies nothing. Without `naming` the names must be the same."""
    fit = TensorMatch(target)
    prefix, names = (
        _own_names(target, found, naming, fit.notes)
        if naming
        else ("", {name: name for name in found})
    )
    fit.left_out += [(old, f"not below {prefix!r}") for old in found if old not in names]
    sources = {name: old for old, name in names.items()}
    for name, own in target.items():
        if name not in sources:
            if naming and naming.why_optional(name):
                fit.kept.append(name)
            else:
                fit.missing[name] = tuple(own.shape)
            continue
        tensor = found[sources[name]]
        if tensor.shape == own.shape:
            fit.values[name] = tensor
        elif naming and (why := naming.why_optional(name)):
            fit.kept.append(name)
            fit.left_out.append((sources[name], why))
        elif naming and naming.can_resize(name, tensor, own):
            fit.values[name] = resize_bias_table(tensor, own.shape[0])
            fit.interpolated.append((name, tuple(tensor.shape), tuple(own.shape)))
        else:
            fit.reshaped[name] = tuple(tensor.shape), tuple(own.shape)
    for name, old in sources.items():
        if name not in target:
            if naming and (why := naming.why_optional(name)):
                fit.left_out.append((old, why))
            else:
                fit.unexpected[old] = tuple(found[old].shape)
    return fit


def _own_names(
    target: Mapping[str, Tensor], found: Mapping[str, Tensor], naming: NameMap, notes: list[str]
) -> tuple[str, dict[str, str]]:
    """The prefix that makes most names those of the model, and the file's names below it -> the model's."""
    component = f"(?:{'|'.join(map(re.escape, naming.prefixes))})"
    prefixes = {""}
    for name in found:
        longest = re.match(f"{component}*", name)
        prefixes |= {longest[0][: stop.end()] for stop in re.finditer(component, longest[0])}
    trials = {}
    for prefix in sorted(prefixes, key=lambda text: (len(text), text)):
        below = {name: name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        renamed, note = naming.rename(set(below.values()))
        trials[prefix] = {name: renamed[rest] for name, rest in below.items()}, note
    best = max(
        trials, key=lambda prefix: sum(name in target for name in trials[prefix][0].values())
    )
    names, note = trials[best]
    notes += [f"prefix {best!r} taken off the names"] if best else []
    notes += [note] if note else []
    return best, names


def _some(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"    and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {title}:", *(f"    {line}" for line in lines[:_SHOWN]), *more]
