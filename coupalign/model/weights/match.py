"""Pair the tensors of a file with those of a model, and list what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from coupalign.model.weights.names import NameMap, resize_bias_table
from coupalign.model.weights.report import Shape

# How many tensors an error names per kind of difference.
MAX_NAMED = 4


@dataclass(kw_only=True)
class TensorMatch:
    """How the tensors of a file fit those of a model.

    Attributes:
        target: the model's own tensors by name.
        values: what to copy into them, in their shapes.
        interpolated: (name, shape in the file, shape in the model) of the values that were resized.
        left_out: (name in the file, reason) of the tensors that the model does not need.
        not_in_file: the model's optional tensors that the file lacks.
        notes: how the names of the file were translated.
        missing: required tensors that the file lacks, with their shapes.
        reshaped: (shape in the file, shape in the model) of required tensors whose shapes differ.
        unexpected: required tensors that only the file has, with their shapes.
    """

    target: Mapping[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    interpolated: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    not_in_file: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, Shape] = field(default_factory=dict)
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected: dict[str, Shape] = field(default_factory=dict)

    @property
    def has_differences(self) -> bool:
        """Whether the file and the model differ in any tensor that matters."""
        return bool(self.missing or self.reshaped or self.unexpected)

    def differences(self) -> str:
        """List the first tensors of each kind of difference, in the order of the model or file."""
        reshaped = [
            f"{name} {old} in the file, {new} in the model"
            for name, (old, new) in self.reshaped.items()
        ]
        missing = [f"{name} {shape}" for name, shape in self.missing.items()]
        unexpected = [f"{name} {shape}" for name, shape in self.unexpected.items()]
        lines = [
            *_list_first("in another shape", reshaped),
            *_list_first("missing in the file", missing),
            *_list_first("only in the file", unexpected),
        ]
        return "\n".join(lines)


def match_tensors(
    target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], names: NameMap
) -> TensorMatch:
    """Pair every tensor of the model and of the file. Copies nothing.

    Args:
        target: the model's tensors by name.
        tensors: the file's tensors by name.
        names: how the names differ.
    """
    match = TensorMatch(target=target)

    # Bring the names of the file into the model's form.
    prefix, translated = _translate_names(target, tensors, names, match.notes)
    for name in tensors:
        if name not in translated:
            match.left_out.append((name, f"not below {prefix!r}"))
    name_in_file = {name: old for old, name in translated.items()}

    # Every tensor of the model.
    for name, own in target.items():
        if name in name_in_file:
            old = name_in_file[name]
            _match_tensor(match, name, old, tensors[old], names)
        elif names.optional_reason(name):
            match.not_in_file.append(name)
        else:
            match.missing[name] = tuple(own.shape)

    # The other tensors of the file.
    for name, old in name_in_file.items():
        if name in target:
            continue
        if reason := names.optional_reason(name):
            match.left_out.append((old, reason))
        else:
            match.unexpected[old] = tuple(tensors[old].shape)

    return match


def _match_tensor(
    match: TensorMatch, name: str, name_in_file: str, tensor: Tensor, names: NameMap
) -> None:
    """Add a tensor that both the model and the file have."""
    own = match.target[name]
    shape, own_shape = tuple(tensor.shape), tuple(own.shape)

    if shape == own_shape:
        match.values[name] = tensor
    elif reason := names.optional_reason(name):
        match.not_in_file.append(name)
        match.left_out.append((name_in_file, reason))
    elif names.can_resize(name, tensor, own):
        match.values[name] = resize_bias_table(tensor, own.shape[0])
        match.interpolated.append((name, shape, own_shape))
    else:
        match.reshaped[name] = shape, own_shape


def _translate_names(
    target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], names: NameMap, notes: list[str]
) -> tuple[str, dict[str, str]]:
    """Find the prefix that gives the most names of the model, and translate the names below it.

    Returns:
        the prefix, and {name in the file: name in the model}.
    """
    translations: dict[str, dict[str, str]] = {}
    prefix_notes: dict[str, str | None] = {}
    for prefix in _possible_prefixes(tensors, names.prefixes):
        below = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        renamed, prefix_notes[prefix] = names.rename(set(below.values()))
        translations[prefix] = {name: renamed[rest] for name, rest in below.items()}

    def names_of_the_model(prefix: str) -> int:
        return sum(name in target for name in translations[prefix].values())

    # Of equal prefixes, the first and so the shortest wins.
    best = max(translations, key=names_of_the_model)
    if best:
        notes.append(f"prefix {best!r} taken off the names")
    if note := prefix_notes[best]:
        notes.append(note)
    return best, translations[best]


def _possible_prefixes(names: Iterable[str], components: tuple[str, ...]) -> list[str]:
    """List the prefixes made of these components that the names begin with, shortest first.

    The empty prefix is always possible.
    """
    component = f"(?:{'|'.join(map(re.escape, components))})"
    prefixes = {""}
    for name in names:
        longest = re.match(f"{component}*", name)[0]
        ends = [found.end() for found in re.finditer(component, longest)]
        prefixes |= {longest[:end] for end in ends}
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _list_first(title: str, lines: list[str]) -> list[str]:
    """Put the first lines below a title, and say how many more there are."""
    if not lines:
        return []
    listed = [f"  {title}:", *(f"    {line}" for line in lines[:MAX_NAMED])]
    if len(lines) > MAX_NAMED:
        listed.append(f"    and {len(lines) - MAX_NAMED} more")
    return listed
