"""What a job says while it works: one line at a time, harmless whatever a file or a person has put in it."""

import argparse
import re
import sys
from typing import NoReturn

from isd_ray.errors import UserError, printable, shown
from isd_ray.names import place_fault, text_fault


def say(line: str) -> None:
    """Print one line for the user, at once; what is unprintable in it is escaped."""
    print(printable(line), flush=True)


def note(line: str) -> None:
    """Print one line on standard error, at once, as `say` does."""
    print(printable(line), file=sys.stderr, flush=True)


def place(text: str) -> str:
    """Take a path or URI of a command line: the `type` of such an option; repeats no key that it holds."""
    if fault := place_fault(text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: {fault}")
    return text


def source(text: str) -> str:
    """Take images of a command line: a path or URI, or what KIND:NAME calls by its kind."""
    if fault := text_fault(text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: {fault}")
    kind = re.match(r"(folder|tars|torchvision):(?!//)", text)
    place(text[kind.end() :] if kind else text)
    return text


class Arguments(argparse.ArgumentParser):
    """A parser of a job's options whose mistakes are one line; its description is printed as it is written."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; --help lists the options")
