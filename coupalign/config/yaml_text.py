"""Read and write YAML: mappings, lists and plain values by the core rules of YAML 1.2.

PyYAML follows YAML 1.1, which reads 010 as eight, 1:30 as ninety, `no` as false, 2026-01-01 as a
date and 1e-3 as a word. Here they are the number ten, three words and the number 0.001. Tags,
merge keys (`<<`) and repeated keys are refused. What is read is bounded in size and in depth, also
where aliases multiply it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from coupalign.errors import InputError, quoted

# A configuration has some hundred values, four levels deep.
MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 64
MAX_DIGITS = 64

_STRING = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"

# YAML 1.2.2, section 10.3.2, with the characters that a value of each type may start with.
_CORE = (
    (_NULL, r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    (_INT, r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", list("-+0123456789")),
    (
        _FLOAT,
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+0123456789."),
    ),
)

# Characters that no file name, number or sentence of ours needs, and lone surrogates, which cannot
# be written to a file.
_UNUSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. An empty file is an empty mapping.

    Raises:
        InputError: the file cannot be read, is not valid YAML, is too large or too deep, or has
            a key twice; the message names the line.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES} bytes, so it is no such file")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error})"
        raise InputError(f"{path}: cannot be read: {reason}") from None

    try:
        tree = _value_of(_compose(text))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected a mapping of keys at the top, found {type(tree).__name__}"
        )
    return tree


def parse_value(text: str) -> Any:
    """Parse one value, by the same rules as a file.

    Raises:
        ValueError: in one line, what is wrong with it.
    """
    try:
        node = _compose(text)
        if node is not None and text[node.end_mark.index :].lstrip().startswith("#"):
            raise ValueError("`#` after a space begins a comment; put the value in quotes")
        return _value_of(node)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_one_line(error)}") from None


def to_yaml(tree: Any) -> str:
    """Write mappings, lists and plain values. Readers of YAML 1.1 and of 1.2 read the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Composes nodes, with the types of the core rules."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either version of YAML would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a configuration has no use for."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


def _compose(text: str) -> yaml.Node | None:
    """Parse a text to nodes; an alias is the node that it names."""
    if unusable := _UNUSABLE.search(text):
        line = text.count("\n", 0, unusable.start()) + 1
        raise yaml.YAMLError(f"line {line}: the character {unusable[0]!r} is not allowed")

    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep") from None
    finally:
        loader.dispose()


def _value_of(root: yaml.Node | None) -> Any:
    """Turn a node into Python values."""
    if root is None:
        return None
    values = 0

    def convert(node: yaml.Node, depth: int) -> Any:
        nonlocal values
        values += 1
        # Aliases make a short text large, or hold themselves.
        if values > MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values", node)
        if depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep", node)

        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            _refuse_tag(node, "tag:yaml.org,2002:seq")
            return [convert(item, depth + 1) for item in node.value]

        _refuse_tag(node, "tag:yaml.org,2002:map")
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in mapping:
                raise _Refused(f"key {quoted(key)} is given twice", key_node)
            mapping[key] = convert(value_node, depth + 1)
        return mapping

    return convert(root, 0)


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _STRING:
        found = quoted(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
        raise _Refused(f"expected a name as the key, found {found}", node)
    return _scalar(node)


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    try:
        match node.tag:
            case "tag:yaml.org,2002:str":
                # An escape such as "\ud800" can make a character that the text itself has not.
                if unusable := _UNUSABLE.search(text):
                    raise _Refused(f"the character {unusable[0]!r} is not allowed", node)
                return text
            case "tag:yaml.org,2002:null":
                return None
            case "tag:yaml.org,2002:bool":
                return {"true": True, "false": False}[text.lower()]
            case "tag:yaml.org,2002:int":
                return _integer(text)
            case "tag:yaml.org,2002:float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        name = node.tag.rpartition(":")[2]
        raise _Refused(f"{quoted(text)} cannot be read as {name}", node) from None
    _refuse_tag(node, _STRING)
    raise AssertionError("every other tag was refused")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("more digits than any setting has")
    for prefix, base in (("0o", 8), ("0x", 16)):
        if text.startswith(prefix):
            return int(text.removeprefix(prefix), base)
    return int(text, 10)


def _refuse_tag(node: yaml.Node, expected: str) -> None:
    if node.tag != expected:
        raise _Refused(f"the tag {quoted(node.tag)} is not allowed here", node)


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong and on which line, without the excerpt that PyYAML adds."""
    if isinstance(error, yaml.MarkedYAMLError):
        problem = " ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        return f"{place}{problem}"
    return " ".join(str(error).split())[:200]
