"""Names of protocols, and every fault of a choice of them that shows before anything runs.

A name is a protocol's and, in some, a number or a target: `knn20`, `fewshot10` (labelled images a
class), `labels1` (percent of the labelled images), `transfer/cifar10`. Imports no torch: the
configuration checks names.
"""

import re
from collections.abc import Iterator, Sequence

from isd_ray.errors import UserError, nearest, shown
from isd_ray.evaluate.protocol import Name, Protocol
from isd_ray.evaluate.protocols import PROTOCOLS

ALONG = ("knn1", "knn20", "knn200_weighted")  # measured every few epochs, unless others are named
DEFAULT = (*ALONG, "linear")
FORMS = ", ".join(protocol.form for protocol in PROTOCOLS)
CHEAP = ", ".join(protocol.form for protocol in PROTOCOLS if protocol.cheap)


def parse(name: str) -> Name:
    """Read a protocol's name; raises UserError with the nearest one."""
    for protocol in PROTOCOLS:
        if match := re.fullmatch(protocol.pattern, name):
            parts = match.groupdict()
            return Name(protocol, int(parts.get("number", 0)), parts.get("target", ""))
    known = examples()
    head, slash, _ = name.partition("/")
    targets = [other for other in known if slash and other.startswith(head + slash)]
    more = f": {', '.join(targets)}" if targets else ""
    hint = nearest(name, known)
    raise UserError(f"unknown protocol {shown(name)}.{hint} There are {FORMS}{more}")


def examples(cheap: bool = False) -> list[str]:
    """Return a name or two of every protocol, or of every cheap one; of one with targets all."""
    return [name for p in PROTOCOLS if p.cheap or not cheap for name in p.examples]


def listing() -> str:
    """Return what there is to measure, a line a protocol: form, what it is, what it needs."""
    width = max(len(protocol.form) for protocol in PROTOCOLS)
    return "\n".join(f"  {p.form:{width}}  {p.help} [{_needs(p)}]" for p in PROTOCOLS)


def _needs(protocol: Protocol) -> str:
    parts = {
        "bank in memory" if protocol.whole_bank else "bank": protocol.bank,
        "test set": protocol.test,
        "files of the set": protocol.other_set,
        "labels": protocol.labels,
    }
    return ", ".join(part for part, needed in parts.items() if needed)


def name_faults(names: Sequence[str], cheap: bool = False) -> list[str]:
    """Return a fault for each name that is unknown or stands there twice, and one for no name.

    cheap: for each, too, that takes too long to be measured every few epochs.
    """
    faults = [] if names else [f"no protocol is named: choose some of {', '.join(examples(cheap))}"]
    for name in dict.fromkeys(names):
        if list(names).count(name) > 1:
            faults.append(f"protocol {shown(name)} is named twice")
        try:
            protocol = parse(name).protocol
            if cheap and not protocol.cheap:
                faults.append(f"{name} takes too long to be measured on the way; choose of {CHEAP}")
        except UserError as error:
            faults.append(str(error))
    return faults


def transfer_faults(names: Sequence[str], root: str | None) -> list[str]:
    """Return a fault where another set is asked for and nobody says where the sets lie."""
    asked = [name for name in names if parse(name).protocol.other_set]
    if not asked or root is not None:
        return []
    return [f"{', '.join(asked)}: give --evaluate.transfer_root, the folder that holds torchvision's files"]


def size_faults(names: Sequence[str], bank: Sequence[int], test: Sequence[int]) -> Iterator[str]:
    """Yield a fault for each protocol that cannot run on sets of so many images a class [C]."""
    for name in names:
        if reason := parse(name).impossible(bank, test):
            yield f"{name}: {reason}"


def class_faults(bank_counts: Sequence[int], test_counts: Sequence[int]) -> list[str]:
    """Return a fault for the classes that only the bank has, and one for those that only the test set has."""
    pairs = list(zip(bank_counts, test_counts, strict=True))
    untested = [c for c, (bank, test) in enumerate(pairs) if bank and not test]
    unlabelled = [c for c, (bank, test) in enumerate(pairs) if test and not bank]
    faults = []
    if untested:
        faults.append(
            f"{_classes(untested)} labelled images and no test image: there is no accuracy to report"
        )
    if unlabelled:
        faults.append(f"{_classes(unlabelled)} test images and none in the bank: no answer can be right")
    return faults


def _classes(numbers: Sequence[int], most: int = 8) -> str:
    some = ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
    return f"class {some} has" if len(numbers) == 1 else f"classes {some} have"
