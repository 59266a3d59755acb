"""YAML and `key=value` overrides -> Config; Config -> YAML, flat parameters, differences."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from coupalign.config.schema import Config, Section
from coupalign.errors import InputError

AnySection = TypeVar("AnySection", bound=Section)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, change it by `dotted.key=value` overrides, expand $VARIABLES, and check every field.

    Raises:
        InputError: names the file (or the override), the key, what is wrong and the nearest valid key.
    """
    return read_section(Config, Path(path), overrides)


def read_section(kind: type[AnySection], path: Path, overrides: Sequence[str] = ()) -> AnySection:
    """`read_config` for any section that a YAML file may hold by itself.

    A file may say `base: OTHER.yaml` (beside it): it then holds only what differs from the other one.
    """
    return _overridden(kind, _with_base(kind, path), path, overrides)


def override(config: AnySection, overrides: Sequence[str]) -> AnySection:
    """`config` changed by `dotted.key=value` overrides, checked as a whole."""
    return _overridden(type(config), config.model_dump(mode="json"), "the configuration", overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a key given twice is an error, which YAML itself would hide."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, _UniqueKeys) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: a mapping of keys is expected at the top, found {type(tree).__name__}"
        )
    return tree


def parse_section(
    kind: type[AnySection],
    tree: Mapping[str, Any],
    file: Path | str,
    overrides: Mapping[str, str] | None = None,
) -> AnySection:
    """Check `tree` against a section of the schema; `file` and `overrides` are only named in errors."""
    try:
        return kind.model_validate(_expand(tree, str(file)))
    except ValidationError as error:
        lines = [_explain(kind, problem, str(file), overrides or {}) for problem in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def dump(config: Section) -> str:
    """The whole configuration as YAML, defaults included; `read_config` gives the same Config back."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def flatten(config: Section) -> dict[str, Any]:
    """`{"optim.lr": 5e-05, …}`: one entry a leaf, lists by position."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
            walk(prefix, {str(place): inner for place, inner in enumerate(value)})
        else:
            flat[prefix] = value

    walk("", config.model_dump(mode="json"))
    return flat


def diff(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """The leaves that differ: `{"optim.lr": (old, new)}`."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    }


# -------------------------------------------------------------------------------------------------- the small print


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _overridden(
    kind: type[AnySection], tree: dict[str, Any], file: Path | str, overrides: Sequence[str]
) -> AnySection:
    for change in overrides:
        _apply(kind, tree, change)
    return parse_section(
        kind, tree, file, {change.partition("=")[0].strip(): change for change in overrides}
    )


def _with_base(kind: type[Section], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise InputError(
            f"{path}: `base` leads back to the file itself: {' -> '.join(file.name for file in (*above, path))}"
        )
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(
            f"{path}: base: the name of a YAML file beside it is expected, found {base!r}"
        )
    return _merged(kind, [], _with_base(kind, path.parent / base, (*above, path.resolve())), tree)


def _merged(
    kind: type[Section], path: list[str], old: dict[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """`old` with what `new` says instead, mappings key by key; another `kind` keeps of `old` what an override would keep."""
    if "kind" in new and new["kind"] != old.get("kind"):
        kept = _shared(_walk(kind, path), old.get("kind"), new["kind"])
        old = {name: value for name, value in old.items() if name in kept}
    merged = dict(old)
    for key, value in new.items():
        before = old.get(key)
        both = isinstance(value, Mapping) and isinstance(before, dict)
        merged[key] = _merged(kind, [*path, key], before, value) if both else value
    return merged


def _apply(kind: type[Section], tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {change!r}: expected dotted.key=value")
    *path, last = key.strip().split(".")
    place: Any = tree
    for part in path:
        place = _enter(place, part, change)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {change!r}: the value is not valid YAML: {error}") from None
    if isinstance(place, list):
        place[_position(place, last, change)] = value
        return
    if last == "kind" and place.get("kind") != value:
        kept = _shared(_walk(kind, path), place.get("kind"), value)
        for name in set(place) - kept:
            del place[name]
    place[last] = value


def _shared(variants: Sequence[type[Section]], old: str | None, new: Any) -> set[str]:
    """Sections that two variants have alike, which stay where `kind` is changed; all else starts from the new one's defaults."""
    by_tag = {_tag(section): section for section in variants}
    if new not in by_tag:
        return set()
    before, after = by_tag.get(old, variants[0]).model_fields, by_tag[new].model_fields
    return {
        name
        for name, field in before.items()
        if name in after
        and after[name].annotation == field.annotation
        and _sections(field.annotation)
    }


def _enter(place: Any, part: str, change: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, change)]
    if not isinstance(place.get(part), (dict, list)):
        place[part] = {}
    return place[part]


def _position(place: list[Any], part: str, change: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise InputError(f"override {change!r}: {part!r} is not a place in a list of {len(place)}")
    return int(part)


def _expand(value: Any, file: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _expand(inner, file) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, file) for inner in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    expanded = os.path.expandvars(value)
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise InputError(
            f"{file}: {value!r} uses the environment variable {missing[1]}, which is not set"
        )
    return expanded


def _explain(
    kind: type[Section], problem: Mapping[str, Any], file: str, overrides: Mapping[str, str]
) -> str:
    where = [part for part in problem["loc"] if not _is_tag(kind, problem["loc"], part)]
    key = ".".join(str(part) for part in where)
    source = f"override {overrides[key]!r}" if key in overrides else file
    if problem["type"] == "extra_forbidden":
        valid = _fields(kind, problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(where[-1]), valid, n=1, cutoff=0.4)
        hint = (
            f"did you mean {nearest[0]!r}?" if nearest else f"valid keys here: {', '.join(valid)}"
        )
        return f"{source}: unknown key {key!r}; {hint}"
    found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{source}: {key or 'the file'}: {message[0].lower()}{message[1:]}{found}"


def _walk(kind: type[Section], path: Sequence[Any]) -> list[type[Section]]:
    """The section types that stand at `path`, whose parts are field names, list places and union tags."""
    here: list[type[Section]] = [kind]
    for part in path:
        tagged = [section for section in here if _tag(section) == part]
        if tagged and len(here) > 1:
            here = tagged
        elif isinstance(part, str):
            fields = [
                section.model_fields[part].annotation
                for section in here
                if part in section.model_fields
            ]
            here = [section for annotation in fields for section in _sections(annotation)]
    return here


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _tag(section: type[Section]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def _is_tag(kind: type[Section], path: Sequence[Any], part: Any) -> bool:
    sections = _walk(kind, path[: list(path).index(part)])
    return len(sections) > 1 and any(_tag(section) == part for section in sections)


def _fields(kind: type[Section], path: Sequence[Any]) -> list[str]:
    return [name for section in _walk(kind, path) for name in section.model_fields]


def _similar_file(path: Path) -> str:
    names = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
