"""What makes the command line start fast; imported and called before everything else.

A command takes half of a tenth of a second from key to answer, and most of that would be imports. Modules that others
import but hardly ever use are loaded when they are first used; modules are found on a shorter way
(`wherry.cli.loading`); and nothing is collected while imports make objects that stay.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any
else:
    ModuleType = type(sys)

# google.protobuf imports its implementation in Python, and what that one needs, beside the one in C, which is the one
# that works; dataclasses needs `inspect` only for classes without a docstring; its times need `calendar` only as text;
# `hashlib` brings OpenSSL, for who hashes; `selectors` serves socket's sendfile
DEFERRED = (
    "google.protobuf.internal.python_message",
    "google.protobuf.internal.python_edition_defaults",
    "google.protobuf.descriptor_database",
    "google.protobuf.text_encoding",
    "calendar",
    "inspect",
    "hashlib",
    "selectors",
)


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
    """Defers the modules that aren't loaded yet, and stops the garbage collector until `settle`. Once is enough."""
    gc.disable()
    from wherry.cli import loading

    loading.install()
    for name in DEFERRED:
        if name not in sys.modules:
            sys.modules[name] = _Deferred(name)
    for name, made in _STANDING_IN.items():
        if name not in sys.modules and (module := made()) is not None:
            sys.modules[name] = module


def _untranslated() -> ModuleType:
    """In place of `gettext`, which looks for argparse's few words in catalogues that no system has."""
    module = ModuleType("gettext")
    vars(module).update(gettext=lambda text: text, ngettext=lambda one, many, count: one if count == 1 else many)
    return module


def _locks() -> ModuleType:
    """Of `threading` protobuf wants a lock; with the first thread comes the rest."""
    import _thread

    module = _Deferred("threading")
    vars(module).update(Lock=_thread.allocate_lock, RLock=_thread.RLock)
    return module


def _times() -> ModuleType | None:
    """`datetime` as it is in C, without the same once more in Python, which 3.11 loads and throws away."""
    try:
        import _datetime  # type: ignore[import-not-found]  # typeshed knows `datetime` alone
    except ImportError:
        return None
    module = ModuleType("datetime", _datetime.__doc__)
    vars(module).update({name: value for name, value in vars(_datetime).items() if not name.startswith("__")})
    return module


def _names() -> ModuleType:
    """Of `typing` the names that annotations need, which nobody reads here; with any other name comes the rest."""
    module = _Deferred("typing")
    vars(module).update(TYPE_CHECKING=False, Any=object, Final=object, Self=object, Union=_Anything())
    vars(module).update(cast=lambda kind, value: value)
    return module


class _Anything:
    """`Union`, of which protobuf makes annotations."""

    def __getitem__(self, kinds: object) -> object:
        return object


_STANDING_IN = {"gettext": _untranslated, "threading": _locks, "datetime": _times, "typing": _names}


def settle() -> None:
    """For commands that run long: what was loaded stays, what is made from now on is collected again."""
    gc.freeze()
    gc.enable()
