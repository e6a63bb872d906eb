"""What every source of images gives, whatever it reads."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

UNLABELLED = "none"  # given as the name of the label column: there is none


class Sample(NamedTuple):
    """One image as encoded bytes, its name in the source, and its label, None where it has none."""

    key: str
    image: bytes
    label: int | None


class Source(Protocol):
    """A sequence of samples; `classes[label]` is the class name."""

    @property
    def classes(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def names(self) -> list[str]: ...
    def slice(self, start: int, stop: int) -> Self: ...
    def __iter__(self) -> Iterator[Sample]: ...


def row_name(row: int) -> str:
    """Return the key of a row that has none of its own."""
    return f"{row:09d}"
