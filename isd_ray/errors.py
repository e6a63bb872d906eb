"""Errors that a person can mend: one line that names the thing and the remedy."""

import difflib
from collections.abc import Iterable, Sequence

LONGEST = 100  # characters of a name that a message repeats or looks for


class UserError(Exception):
    """A mistake in the input, said in one line. A job prints it and ends with `exit_code`."""

    exit_code = 2


class MachineError(UserError):
    """The input is good; disk, store, network, memory or a process failed. The same command may go on."""

    exit_code = 3


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest option, or "" when none is close."""
    if len(name) > LONGEST:
        return ""  # to compare takes the product of the lengths
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{printable(matches[0])}'?" if matches else ""


def printable(text: str) -> str:
    """Return `text`, which may come from a hostile file, as one line: what is unprintable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def without_secrets(text: str) -> str:
    """Return `text` up to a URI that may hold a key: one with a user's name or with parameters."""
    head, mark, rest = text.partition(":/")
    return f"{head}://..." if mark and ("@" in rest or "?" in rest) else text


def shown(value: object, most: int = LONGEST) -> str:
    """Return a value that somebody gave, as a message may repeat it: short, one line, no secret."""
    if isinstance(value, dict):
        return "a mapping"  # nobody knows what stands in it
    if isinstance(value, list | tuple) and any(isinstance(p, dict | list | tuple) for p in value):
        return "a list of lists or mappings"
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return harmless(text, most)


def harmless(text: str, most: int = LONGEST) -> str:
    """Return `text`, whoever wrote it, as a message may repeat it: short, one line, no secret."""
    text = printable(" ".join(without_secrets(text).split()))
    return text if len(text) <= most else text[: most - 3] + "..."


def listed(faults: Sequence[str], most: int = 8) -> str:
    """Return faults as one sentence; of very many the first ones and how many there are."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*faults[:most], *more])
