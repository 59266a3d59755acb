"""Read a configuration from YAML and `key=value` overrides, write it, and compare two of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from coupalign.addresses import hide_secret
from coupalign.config.schema import FORMER_KEYS, FORMER_VALUES, Config, Section
from coupalign.config.yaml_text import parse_value, read_mapping, to_yaml
from coupalign.errors import InputError

AnySection = TypeVar("AnySection", bound=Section)

_MAX_MISTAKES = 20

_VARIABLE = re.compile(r"\$(?:\$|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\}|)", re.ASCII)

# ~, ~/folder or ~user/folder, also behind the prefixes that our settings know.
_HOME = re.compile(r"(?P<scheme>(?:random:|file://|sqlite:///)?)(?P<user>~\Z|~[^/\s~]*(?=/))")


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides and check all fields.

    $NAME, ${NAME} and a leading ~ are expanded in the file and in the overrides; $$ is a dollar
    sign.

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
    tree = _expand(_read_with_base(section_type, path), str(path))
    return _parse_with_overrides(section_type, tree, path, overrides)


def read_stored_config(path: Path | str) -> Config:
    """Read the configuration that a run or checkpoint wrote with `dump`.

    Nothing is expanded. The file may be somebody else's, and a variable of this machine in an
    address would be sent there.

    Raises:
        InputError: as `read_config`.
    """
    return parse_section(Config, _for_each_text(read_yaml(Path(path)), _unescape), path)


def override(config: AnySection, overrides: Sequence[str]) -> AnySection:
    """Change a configuration by `dotted.key=value` overrides, and check the result as a whole."""
    tree = config.model_dump(mode="json")
    return _parse_with_overrides(type(config), tree, "the configuration", overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, see `yaml_text`.

    Raises:
        InputError: the file is missing, is not valid YAML, or has a key twice (which YAML allows).
    """
    if not path.exists():
        raise InputError(f"{path}: no such file{_suggest_file(path)}")
    return read_mapping(path)


def parse_section(
    section_type: type[AnySection],
    tree: Mapping[str, Any],
    file: Path | str,
    overrides: Mapping[str, str] | None = None,
) -> AnySection:
    """Check a tree of mappings, lists and values against a section of the schema.

    Args:
        section_type: the section to make.
        tree: the keys and values, as YAML has them. They are taken literally.
        file: where the tree comes from; for error messages.
        overrides: the overrides that are already in the tree, by dotted key; for error messages.

    Raises:
        InputError: one line per mistake.
    """
    try:
        return section_type.model_validate(tree)
    except ValidationError as error:
        lines = [
            _describe_mistake(section_type, mistake, str(file), overrides or {})
            for mistake in error.errors()
        ]
        unique = list(dict.fromkeys(lines))
        if len(unique) > _MAX_MISTAKES:
            rest = len(unique) - _MAX_MISTAKES
            unique = [*unique[:_MAX_MISTAKES], f"{file}: {rest} more mistakes"]
        raise InputError("\n".join(unique)) from None


def dump(config: Section) -> str:
    """Write the whole configuration as YAML, defaults included.

    `read_config` and `read_stored_config` restore it. A dollar sign is written as $$.
    """
    return to_yaml(_for_each_text(config.model_dump(mode="json"), _escape))


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
            f"{path}: base: expected the name of a YAML file in the same folder, "
            f"found {_short(base)}"
        )

    base_tree = _read_with_base(section_type, path.parent / base, (*readers, path.resolve()))
    return _merge(section_type, [], base_tree, tree)


def _merge(
    section_type: type[Section], path: list[str], old: dict[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """Lay `new` over `old`, mapping by mapping; both stand at `path` below the section."""
    if "kind" in new and new["kind"] != old.get("kind"):
        # Another kind: drop the settings that belong to the old one.
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
    section_type: type[Section], path: Sequence[str], old_kind: Any, new_kind: Any
) -> set[str]:
    """Find the sections that stay when `kind` changes: those that both variants declare alike.

    All other settings start from the defaults of the new variant.
    """
    variants = _sections_at(section_type, path)
    by_kind = {_kind_of(variant): variant for variant in variants}
    if not isinstance(new_kind, str) or new_kind not in by_kind:
        return set()

    # The file may have anything as the old kind.
    known_kind = old_kind if isinstance(old_kind, str) else None
    before = by_kind.get(known_kind, variants[0]).model_fields
    after = by_kind[new_kind].model_fields
    kept: set[str] = set()
    for name in before.keys() & after.keys():
        annotation = before[name].annotation
        if annotation == after[name].annotation and _section_types_in(annotation):
            kept.add(name)
    return kept


def _for_each_text(tree: Any, change: Callable[[str], str]) -> Any:
    """Copy a tree with `change` applied to every string but the keys."""
    if isinstance(tree, Mapping):
        return {key: _for_each_text(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_for_each_text(item, change) for item in tree]
    return change(tree) if isinstance(tree, str) else tree


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _unescape(text: str) -> str:
    return text.replace("$$", "$")


def _expand(tree: Any, source: str) -> Any:
    """Expand the environment variables and the leading ~ of all strings, once.

    A value that an expansion inserts is taken as it is.

    Args:
        source: the file or override that the tree comes from, for error messages.
    """

    def expand(text: str) -> str:
        # The names only: what a variable holds may be a secret.
        problem = f"{source}: {_short(text)}"

        def variable(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            name = match["name"] or match["braced"]
            if name is None:
                raise InputError(f"{problem}: write $NAME, ${{NAME}}, or $$ for a dollar sign")
            if not os.environ.get(name):
                state = "is empty" if name in os.environ else "is not set"
                raise InputError(f"{problem} uses the environment variable {name}, which {state}")
            return os.environ[name]

        if home := _HOME.match(text):
            folder = os.path.expanduser(home["user"])
            if folder == home["user"]:
                raise InputError(f"{problem}: no home folder is known for {home['user']}")
            text = f"{home['scheme']}{folder.replace('$', '$$')}{text[home.end() :]}"
        return _VARIABLE.sub(variable, text)

    return _for_each_text(tree, expand)


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
    source = _source(override)
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"{source}: expected dotted.key=value")

    try:
        value = _expand(parse_value(text), source)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source}: the value: {error}") from None

    # Walk to the mapping or list that holds the value, making mappings that are not there yet.
    *path, last = names
    node: Any = tree
    for name in path:
        key_here: Any = _list_index(node, name, source) if isinstance(node, list) else name
        if isinstance(node, dict) and name not in node:
            node[name] = {}
        if not isinstance(node[key_here], (dict, list)):
            node[key_here] = {}
        node = node[key_here]

    if isinstance(node, list):
        node[_list_index(node, last, source)] = value
        return

    # Another kind: drop the settings that belong to the old one.
    if last == "kind" and node.get("kind") != value:
        kept = _names_kept(section_type, path, node.get("kind"), value)
        for name in set(node) - kept:
            del node[name]
    node[last] = value


def _source(override: str) -> str:
    return f"override {_short(override)}"


def _list_index(items: list[Any], text: str, source: str) -> int:
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    if not is_number or int(text) >= len(items):
        raise InputError(f"{source}: {_short(text)} is not an index into a list of {len(items)}")
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
    names = [
        str(name)
        for depth, name in enumerate(location)
        if not _is_kind_tag(section_type, location[:depth], name)
    ]
    key = ".".join(names)
    source = file
    for path, override in overrides.items():
        # An override of the key, of a section around it, or of something below it.
        if f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}."):
            source = _source(override)

    # An unknown key: say what became of it, or what was probably meant.
    if mistake["type"] == "extra_forbidden" and key in FORMER_KEYS:
        return f"{source}: {key}: {FORMER_KEYS[key]}"
    if mistake["type"] == "extra_forbidden":
        valid = _valid_keys(section_type, location[:-1])
        nearest = difflib.get_close_matches(names[-1][:80], valid, n=1, cutoff=0.4)
        hint = f"valid keys here: {', '.join(valid)}"
        if nearest:
            hint = f"did you mean {nearest[0]!r}?"
        return f"{source}: unknown key {_short(key)}; {hint}"

    if mistake["type"] == "union_tag_not_found":
        kinds = [_kind_of(variant) for variant in _sections_at(section_type, location)]
        return f"{source}: {_cut(key)}.kind is missing; set it to one of {', '.join(kinds)}"

    # A wrong value: pydantic says what is valid.
    found = mistake["input"]
    value = ""
    if mistake["type"] not in ("missing", "value_error"):
        value = f", found {_short(found)}"
    if mistake["type"] == "string_type" and isinstance(found, (int, float)):
        value += "; put it in quotes"
    if new_value := FORMER_VALUES.get((key, str(found))):
        value += f", which is now called {new_value!r}"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{source}: {_cut(key) or 'the file'}: {message[0].lower()}{message[1:]}{value}"


def _short(value: Any) -> str:
    """Quote a value for an error message: without its secrets, in one line of limited length."""
    if isinstance(value, str):
        return repr(_cut(hide_secret(value)))
    return _cut(hide_secret(repr(value)))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def _is_kind_tag(section_type: type[Section], path: Sequence[Any], name: Any) -> bool:
    """Whether a part of pydantic's location is the kind it chose in a union, and not a key.

    Args:
        path: the parts of the location before it.
    """
    variants = _sections_at(section_type, path)
    return len(variants) > 1 and any(_kind_of(variant) == name for variant in variants)


def _valid_keys(section_type: type[Section], path: Sequence[Any]) -> list[str]:
    return [name for section in _sections_at(section_type, path) for name in section.model_fields]
