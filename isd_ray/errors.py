"""Errors that a person can mend: one line that names the thing and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, said in one line. A job prints it and ends with `exit_code`."""

    exit_code = 2


class MachineError(UserError):
    """The input is good; disk, store, network, memory or a process failed. The same command may go on."""

    exit_code = 3


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest option, or "" when none is close."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def printable(text: str) -> str:
    """Return `text`, which may come from a hostile file, as one line: what is unprintable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
