"""A typed client of containerd's API: it drives `wherryd` and containerd alike.

    async with await connect() as client:
        print(await client.version())

Names are loaded when they are asked for: the command line uses modules of this package and must start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wherry.client.address import connect
    from wherry.client.api import Client
    from wherry.client.embedded import Embedded

__all__ = ["Client", "Embedded", "connect"]

_HOMES = {"Client": "api", "Embedded": "embedded", "connect": "address"}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only who asks pays

    return getattr(import_module(f"{__name__}.{home}"), name)
