"""A typed client of containerd's API: it drives `wherryd` and containerd alike.

    async with Wherry() as wherry:
        async with wherry.run("alpine", ["uname", "-a"]) as container:
            print((await container.stdout.read()).decode())

`Wherry` is for programs; `connect` gives a `Client`, the services of the API one by one.

Names are loaded when they are asked for: the command line uses modules of this package and must start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wherry.client.address import connect
    from wherry.client.api import Client
    from wherry.client.embedded import Embedded
    from wherry.client.failures import CommandFailed, OutOfMemory, TimedOut
    from wherry.client.guest import Completed
    from wherry.client.sandbox import Sandbox
    from wherry.client.wherry import Container, Wherry

__all__ = [
    "Client",
    "CommandFailed",
    "Completed",
    "Container",
    "Embedded",
    "OutOfMemory",
    "Sandbox",
    "TimedOut",
    "Wherry",
    "connect",
]

_HOMES = {
    "Client": "api",
    "CommandFailed": "failures",
    "Completed": "guest",
    "Container": "wherry",
    "Embedded": "embedded",
    "OutOfMemory": "failures",
    "Sandbox": "sandbox",
    "TimedOut": "failures",
    "Wherry": "wherry",
    "connect": "address",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
