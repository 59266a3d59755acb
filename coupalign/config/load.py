"""Read a configuration from YAML and `key=value` overrides, write it, and compare two of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from coupalign.config.schema import FORMER_KEYS, FORMER_VALUES, Config, Section
from coupalign.errors import InputError

AnySection = TypeVar("AnySection", bound=Section)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides, expand $VARIABLES and check all fields.

    Raises:
        InputError: names the file or override, the key, the mistake and the nearest valid key.
    """
    return read_section(Config, Path(path), overrides)


def read_section(
    section_type: type[AnySection], path: Path, overrides: Sequence[str] = ()
) -> AnySection:
    """Read any section of the schema from a YAML file of its own; see `read_config`.

    A file may start from another one in the same folder with `base: OTHER.yaml`. It then holds only
    the differences.
    """
    tree = _read_with_base(section_type, path)
    return _parse_with_overrides(section_type, tree, path, overrides)


def override(config: AnySection, overrides: Sequence[str]) -> AnySection:
    """Change a configuration by `dotted.key=value` overrides, and check the result as a whole."""
    tree = config.model_dump(mode="json")
    return _parse_with_overrides(type(config), tree, "the configuration", overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: the file is missing, is not valid YAML, or has a key twice (which YAML allows).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_suggest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None

    try:
        tree = yaml.load(text, _UniqueKeyLoader) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected a mapping of keys at the top, found {type(tree).__name__}"
        )
    return tree


def parse_section(
    section_type: type[AnySection],
    tree: Mapping[str, Any],
    file: Path | str,
    overrides: Mapping[str, str] | None = None,
) -> AnySection:
    """Check a tree of mappings, lists and values against a section of the schema.

    Args:
        section_type: the section to make.
        tree: the keys and values, as YAML has them.
        file: where the tree comes from; for error messages.
        overrides: the overrides that are already in the tree, by dotted key; for error messages.

    Raises:
        InputError: one line per mistake.
    """
    try:
        return section_type.model_validate(_expand_variables(tree, str(file)))
    except ValidationError as error:
        lines = [
            _describe_mistake(section_type, mistake, str(file), overrides or {})
            for mistake in error.errors()
        ]
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def dump(config: Section) -> str:
    """Write the whole configuration as YAML, defaults included; `read_config` restores it."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def flatten(config: Section) -> dict[str, Any]:
    """List all settings by dotted key: `{"optim.lr": 5e-05, "data.train.0.split": "train", …}`."""
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        # A list of sections has one setting per field and index, any other list is one setting.
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}

        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                add(f"{key}.{name}" if key else name, inner)
        else:
            flat[key] = value

    add("", config.model_dump(mode="json"))
    return flat


def diff(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ: `{"optim.lr": (old value, new value)}`."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    }


def numeric_diff(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ and can lead to other weights or other scores."""
    return _diff_without(old, new, lambda field: not _effects(field)["numeric"])


def resume_diff(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ and keep `new` from resuming a checkpoint of `old`."""
    return _diff_without(old, new, lambda field: _effects(field)["resumable"])


# ---------------------------------------------------------------------------------------------
# What the schema says about a field


def _diff_without(
    old: Section, new: Section, is_harmless: Callable[[FieldInfo], bool]
) -> dict[str, tuple[Any, Any]]:
    """`diff` without the settings whose field, or a field around it, is harmless."""
    harmful: dict[str, tuple[Any, Any]] = {}
    for key, values in diff(old, new).items():
        fields = _fields_along(old, key) or _fields_along(new, key)
        if not any(is_harmless(field) for field in fields):
            harmful[key] = values
    return harmful


def _effects(field: FieldInfo) -> dict[str, Any]:
    """Read what `schema.setting` recorded. A field declared without it counts as numeric."""
    effects = field.json_schema_extra
    return effects if isinstance(effects, dict) else {"numeric": True, "resumable": False}


def _fields_along(config: Section, key: str) -> list[FieldInfo]:
    """The fields from the top of `config` down to a dotted key; empty if it has no such key."""
    fields: list[FieldInfo] = []
    value: Any = config
    for name in key.split("."):
        if isinstance(value, Section) and name in type(value).model_fields:
            fields.append(type(value).model_fields[name])
            value = getattr(value, name)
        elif isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return []
    return fields


# ---------------------------------------------------------------------------------------------
# Files


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a repeated key is an error instead of silently winning."""

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


def _read_with_base(
    section_type: type[Section], path: Path, readers: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a file on top of its `base`. `readers` are the files whose bases led here."""
    if path.resolve() in readers:
        chain = " -> ".join(file.name for file in (*readers, path))
        raise InputError(f"{path}: `base` leads back to the file itself: {chain}")

    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(
            f"{path}: base: expected the name of a YAML file in the same folder, found {base!r}"
        )

    base_tree = _read_with_base(section_type, path.parent / base, (*readers, path.resolve()))
    return _merge(section_type, [], base_tree, tree)


def _merge(
    section_type: type[Section], path: list[str], old: dict[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """Lay `new` over `old`, mapping by mapping; both stand at `path` below the section."""
    if "kind" in new and new["kind"] != old.get("kind"):
        kept = _names_kept(section_type, path, old.get("kind"), new["kind"])
        old = {name: value for name, value in old.items() if name in kept}

    # Mappings on both sides are merged, any other value replaces the old one.
    merged = dict(old)
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, dict):
            value = _merge(section_type, [*path, name], before, value)
        merged[name] = value
    return merged


def _names_kept(
    section_type: type[Section], path: Sequence[str], old_kind: str | None, new_kind: Any
) -> set[str]:
    """Find the sections that stay when `kind` changes: those that both variants declare alike.

    All other settings start from the defaults of the new variant.
    """
    variants = _sections_at(section_type, path)
    by_kind = {_kind_of(variant): variant for variant in variants}
    if new_kind not in by_kind:
        return set()

    before = by_kind.get(old_kind, variants[0]).model_fields
    after = by_kind[new_kind].model_fields
    kept: set[str] = set()
    for name in before.keys() & after.keys():
        annotation = before[name].annotation
        if annotation == after[name].annotation and _section_types_in(annotation):
            kept.add(name)
    return kept


def _expand_variables(value: Any, file: str) -> Any:
    """Replace $NAME and ${NAME} in all strings by environment variables, which must be set."""
    if isinstance(value, Mapping):
        return {key: _expand_variables(inner, file) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, file) for item in value]
    if not isinstance(value, str) or "$" not in value:
        return value

    expanded = os.path.expandvars(value)
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise InputError(
            f"{file}: {value!r} uses the environment variable {missing[1]}, which is not set"
        )
    return expanded


def _suggest_file(path: Path) -> str:
    names = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


# ---------------------------------------------------------------------------------------------
# Overrides


def _parse_with_overrides(
    section_type: type[AnySection],
    tree: dict[str, Any],
    file: Path | str,
    overrides: Sequence[str],
) -> AnySection:
    for text in overrides:
        _apply_override(section_type, tree, text)
    by_key = {text.partition("=")[0].strip(): text for text in overrides}
    return parse_section(section_type, tree, file, by_key)


def _apply_override(section_type: type[Section], tree: dict[str, Any], override: str) -> None:
    """Write one `dotted.key=value` into the tree."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {override!r}: expected dotted.key=value")

    # Walk to the mapping or list that holds the value, making mappings that are not there yet.
    *path, last = key.strip().split(".")
    node: Any = tree
    for name in path:
        if isinstance(node, list):
            node = node[_list_index(node, name, override)]
            continue
        if not isinstance(node.get(name), (dict, list)):
            node[name] = {}
        node = node[name]

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML: {error}") from None

    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
        return

    # Another kind: drop the settings that belong to the old one.
    if last == "kind" and node.get("kind") != value:
        kept = _names_kept(section_type, path, node.get("kind"), value)
        for name in set(node) - kept:
            del node[name]
    node[last] = value


def _list_index(items: list[Any], text: str, override: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise InputError(
            f"override {override!r}: {text!r} is not an index into a list of {len(items)}"
        )
    return int(text)


# ---------------------------------------------------------------------------------------------
# Error messages


def _describe_mistake(
    section_type: type[Section],
    mistake: Mapping[str, Any],
    file: str,
    overrides: Mapping[str, str],
) -> str:
    """Turn one of pydantic's errors into a line with file or override, key and remedy."""
    location = mistake["loc"]
    names = [name for name in location if not _is_kind_tag(section_type, location, name)]
    key = ".".join(str(name) for name in names)
    source = f"override {overrides[key]!r}" if key in overrides else file

    # An unknown key: say what became of it, or what was probably meant.
    if mistake["type"] == "extra_forbidden" and key in FORMER_KEYS:
        return f"{source}: {key}: {FORMER_KEYS[key]}"
    if mistake["type"] == "extra_forbidden":
        valid = _valid_keys(section_type, location[:-1])
        nearest = difflib.get_close_matches(str(names[-1]), valid, n=1, cutoff=0.4)
        hint = f"valid keys here: {', '.join(valid)}"
        if nearest:
            hint = f"did you mean {nearest[0]!r}?"
        return f"{source}: unknown key {key!r}; {hint}"

    # A wrong value: pydantic says what is valid.
    value = ""
    if mistake["type"] not in ("missing", "value_error"):
        value = f", found {mistake['input']!r}"
    if new_value := FORMER_VALUES.get((key, str(mistake["input"]))):
        value += f", which is now called {new_value!r}"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{source}: {key or 'the file'}: {message[0].lower()}{message[1:]}{value}"


def _sections_at(section_type: type[Section], path: Sequence[Any]) -> list[type[Section]]:
    """The section types that may stand at a path of field names, list indexes and kinds."""
    here: list[type[Section]] = [section_type]
    for name in path:
        of_kind = [section for section in here if _kind_of(section) == name]
        if of_kind and len(here) > 1:
            here = of_kind
        elif isinstance(name, str):
            fields = [section.model_fields.get(name) for section in here]
            annotations = [field.annotation for field in fields if field is not None]
            here = [section for each in annotations for section in _section_types_in(each)]
    return here


def _section_types_in(annotation: Any) -> list[type[Section]]:
    """The section types in an annotation such as `tuple[Source, ...]` or a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _section_types_in(inner)]


def _kind_of(section: type[Section]) -> str | None:
    """The `kind` that selects a section in its union; None for a section without alternatives."""
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def _is_kind_tag(section_type: type[Section], location: Sequence[Any], name: Any) -> bool:
    """Whether a part of pydantic's location is the kind it chose in a union, and not a key."""
    variants = _sections_at(section_type, location[: list(location).index(name)])
    return len(variants) > 1 and any(_kind_of(variant) == name for variant in variants)


def _valid_keys(section_type: type[Section], path: Sequence[Any]) -> list[str]:
    return [name for section in _sections_at(section_type, path) for name in section.model_fields]
