"""What type checkers read in class statements, for modules that the command line loads: at run time nothing.

typing makes classes that know their parameters, and takes longer to load than any module of ours.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Generic, Protocol, TypeVar
else:

    class Generic:
        """A base with any parameters."""

        __slots__ = ()

        def __class_getitem__(cls, parameters):
            return cls

    class Protocol(Generic):
        """What implementations have to have; nobody asks at run time."""

        __slots__ = ()

    def TypeVar(name, **_):  # noqa: N802 - as typing calls it
        return name


__all__ = ["Generic", "Protocol", "TypeVar"]
