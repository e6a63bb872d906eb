"""YAML as people write it: plain values below names, each name once; else a refusal with its line.

One reader for every file: configurations, spaces, studies, definitions of data sets. It knows no
tags, so nothing in a file is executed, and no file takes much time or memory to read.
"""

from pathlib import Path
from typing import Any, cast

import yaml

from isd_ray.errors import UserError, harmless, shown

MOST_BYTES = 2**20
DEEPEST = 20  # mappings and lists within each other
MOST_VALUES = 20_000  # an alias counts as all that it stands for; so many take about two seconds
LONGEST_NUMBER = 100  # digits; Python itself gives up at 4,300
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
AS_TEXT = (
    "tag:yaml.org,2002:timestamp",
    "tag:yaml.org,2002:value",
)  # YAML 1.1 would read 2024-05-01 as a date


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """Read a file of `name: value` lines; an empty one is {}.

    what: the kind of file, for messages. Raises UserError that names file, line and fault.
    """
    if not str(path).strip():
        raise UserError(f"{what}: an empty path; give the path of a YAML file (an unset variable?)")
    place = f"{what} {harmless(str(path), 200)}"
    try:
        content = _read(str(path))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; give the path of a YAML file") from None
    except ValueError:
        raise UserError(f"{place}: this is no path; give the path of a YAML file") from None
    return parse_mapping(content, place)


def _read(path: str) -> bytes:
    """Return the beginning of a file on a disk or in a store."""
    if "://" in path:
        from isd_ray.data import files  # Arrow, which a file on a disk does not need

        return files.read_bytes(path, MOST_BYTES + 1)
    with open(path, "rb") as file:
        return file.read(MOST_BYTES + 1)


def parse_mapping(content: bytes | str, place: str) -> dict[str, Any]:
    """Read `name: value` lines; `place`: whose they are. Raises as `read_mapping` does."""
    found = _parse(content, place)
    if not isinstance(found, dict | None):
        raise UserError(f"{place}: expected 'name: value' lines, found {type(found).__name__}")
    return found or {}


def parse_value(text: str, place: str) -> Any:
    """Read a value of a command line: a number, true, null, a text, a list or mapping."""
    return _parse(text, place)


def _parse(content: bytes | str, place: str) -> Any:
    if len(content) > MOST_BYTES:
        raise UserError(f"{place}: more than {MOST_BYTES // 2**20} MiB; that is no file of options")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {error.start + 1})") from None
    try:
        return _construct(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = harmless(error.problem or "it cannot be read", 200)
        raise UserError(f"{place}: {line}{reason}") from None
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"{place}: {line}: an unprintable character; this is not YAML") from None
    except ValueError as error:  # numbers that YAML's grammar knows and Python does not, as 0x_
        raise UserError(f"{place}: {harmless(str(error), 200)}") from None


def _construct(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _Check().measure(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, and none of what a file here may hold."""

    def __init__(self, problem: str, node: yaml.Event | yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=cast(yaml.error.Mark, node.start_mark))


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, dates and deep nesting. Names are texts, `1` and `on` too."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag not in AS_TEXT]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"a tag, {shown(event.tag)}: plain values are enough here", event)
        if self.depth >= DEEPEST:
            raise _Refused(f"more than {DEEPEST} lists and mappings within each other", event)
        self.values += 1
        if self.values > MOST_VALUES:
            raise _Refused(f"more than {MOST_VALUES:,} values", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)  # <<: *other
        return {name.value: self.construct_object(value, deep=deep) for name, value in node.value}


class _Check:
    """Refuses names that come twice, endless numbers and aliases that unfold without bound."""

    def __init__(self) -> None:
        self.known: dict[yaml.Node, tuple[int, int] | None] = {}  # None: is being measured

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return how many values a node stands for, and how deep they lie; raises _Refused."""
        if node in self.known:
            found = self.known[node]
            if found is None:
                raise _Refused("this holds itself (an alias of what it stands in)", node)
            return found
        self.known[node] = None
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated(node)
            parts = [self.measure(part) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = [self.measure(part) for part in node.value]
        else:
            parts = []
            if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise _Refused(f"a number of {len(node.value):,} characters", node)
        values, depth = 1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0)
        if values > MOST_VALUES or depth > DEEPEST:
            limits = f"{MOST_VALUES:,} values, or {DEEPEST} within each other"
            raise _Refused(f"more than {limits}, once all aliases are unfolded", node)
        self.known[node] = values, depth
        return values, depth


def _refuse_repeated(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise _Refused("a list or mapping where a name is expected", name)
        if first := lines.get(name.value):
            raise _Refused(f"{shown(name.value)} stands in line {first} too; keep one", name)
        lines[name.value] = name.start_mark.line + 1
