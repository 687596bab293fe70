"""What makes the command line start fast; imported before everything else.

A command takes a tenth of a second from key to answer, and most of that would be imports. Modules that others import
but hardly ever use are loaded when they are first used; and nothing is collected while imports make objects that stay.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

# google.protobuf imports its implementation in Python beside the one in C, which is the one that works; dataclasses
# needs `inspect` only for classes without a docstring; its times need `calendar` only as text; `hashlib` brings
# OpenSSL, for who hashes; `selectors` serves socket's sendfile
DEFERRED = ("google.protobuf.internal.python_message", "calendar", "inspect", "hashlib", "selectors")


class _Deferred(ModuleType):
    """A module that is loaded by the first look at one of its names."""

    def __getattr__(self, name: str) -> Any:
        # questions of the import system, not of a user
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        own = self.__name__
        if sys.modules.get(own) is self:
            del sys.modules[own]
        from importlib import import_module

        module = import_module(own)
        self.__dict__.update(vars(module))
        return getattr(module, name)


def prepare() -> None:
    """Defers the modules that aren't loaded yet, and stops the garbage collector until `settle`."""
    gc.disable()
    for name in DEFERRED:
        if name not in sys.modules:
            sys.modules[name] = _Deferred(name)
    if "gettext" not in sys.modules:
        sys.modules["gettext"] = _untranslated()


def _untranslated() -> ModuleType:
    """In place of `gettext`, which looks for argparse's few words in catalogues that no system has."""
    module = ModuleType("gettext")
    vars(module).update(gettext=lambda text: text, ngettext=lambda one, many, count: one if count == 1 else many)
    return module


def settle() -> None:
    """For commands that run long: what was loaded stays, what is made from now on is collected again."""
    gc.freeze()
    gc.enable()
