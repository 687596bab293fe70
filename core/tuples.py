"""`typing.NamedTuple` for modules that the command line loads: the same classes, made in a third of the time.

typing checks what fields are annotated with when it makes a class; under `from __future__ import annotations` these are
texts, each of which it compiles for that, 10 µs a field: 4 ms of each command. mypy has checked them before. The
classes themselves are those of `collections.namedtuple`, as typing's are.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    __all__ = ["NamedTuple"]
else:
    # what namedtuple and the metaclass give a class by themselves
    _GIVEN = frozenset({"__annotations__", "__module__", "__name__"})

    class _Maker(type):
        """The metaclass of a class statement whose class is to be a tuple's."""

        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
            if not bases:  # the one below
                return super().__new__(cls, name, bases, namespace)
            fields = namespace.get("__annotations__", {})
            defaults = [namespace[field] for field in fields if field in namespace]
            if any(field in namespace for field in list(fields)[: len(fields) - len(defaults)]):
                raise TypeError(f"{name}: a field without a default value follows one that has one")
            made = namedtuple(name, fields, defaults=defaults, module=namespace["__module__"])  # noqa: PYI024
            made.__annotations__ = made.__new__.__annotations__ = fields
            for key, value in namespace.items():
                if key not in _GIVEN and key not in fields:
                    setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_Maker):
        """The base of a class whose annotated names are the fields of a tuple."""
