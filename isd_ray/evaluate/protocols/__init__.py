"""The protocols, a file each or one for those that share their code.

A file is found by itself: every `Protocol` in it is one more that the configuration, tables, studies and sweeps know.
"""

from importlib import import_module
from pkgutil import iter_modules

from isd_ray.evaluate.protocol import Protocol

PROTOCOLS: tuple[Protocol, ...] = tuple(
    dict.fromkeys(  # a file may import another one's record
        record
        for module in iter_modules(__path__)
        for record in vars(import_module(f"{__name__}.{module.name}")).values()
        if isinstance(record, Protocol)
    )
)
