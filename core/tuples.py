"""`typing.NamedTuple` for modules that the command line loads: the same classes, made in a tenth of the time.

typing checks what fields are annotated with when it makes a class; under `from __future__ import annotations` these are
texts, each of which it compiles for that, and `collections.namedtuple` compiles a constructor: 100 µs a class, 5 ms of
each command. Here mypy has checked the annotations before, and a constructor is compiled when the first tuple is made.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    __all__ = ["NamedTuple"]
else:
    try:
        from _collections import _tuplegetter as _getter
    except ImportError:  # another interpreter than CPython
        from operator import itemgetter

        def _getter(index: int, text: str | None) -> property:
            return property(itemgetter(index), doc=text)

    # of a class statement, what the class made of it gets otherwise
    _GIVEN = frozenset({"__annotations__", "__dict__", "__weakref__"})

    class _Tuple(tuple):
        """What the classes have in common: the methods of `collections.namedtuple`."""

        __slots__ = ()
        # without annotations, which a class would inherit
        _fields = ()
        _field_defaults = {}  # noqa: RUF012 - nobody writes to it

        def __new__(cls, *values: object, **named: object) -> _Tuple:  # noqa: PYI034 - `Self` is of typing
            return _constructor(cls)(cls, *values, **named)

        @classmethod
        def _make(cls, values: Any) -> _Tuple:
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"Expected {len(cls._fields)} arguments, got {len(made)}")
            return made

        def _replace(self, /, **named: object) -> _Tuple:
            made = self._make(map(named.pop, self._fields, self))
            if named:
                raise ValueError(f"Got unexpected field names: {list(named)!r}")
            return made

        __replace__ = _replace

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self) -> str:
            fields = zip(self._fields, self, strict=True)
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields)})"

        def __getnewargs__(self) -> tuple[object, ...]:
            return tuple(self)

    def _constructor(cls: type[_Tuple]) -> Any:
        """Gives the class that has the fields its `__new__`: by position or name, in the interpreter's own way."""
        owner = next(one for one in cls.__mro__ if "_fields" in vars(one))
        names = "".join(f"{name}, " for name in owner._fields)
        space = {"_make": tuple.__new__, "__builtins__": {}, "__name__": f"namedtuple_{owner.__name__}"}
        made = eval(f"lambda _cls, {names}: _make(_cls, ({names}))", space)  # noqa: S307 - names of a class statement
        made.__defaults__ = tuple(owner._field_defaults.values())
        made.__name__, made.__qualname__ = "__new__", f"{owner.__qualname__}.__new__"
        owner.__new__ = staticmethod(made)
        return made

    class _Maker(type):
        """The metaclass of a class statement whose class is to be a tuple's."""

        def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
            if not bases:  # the one below
                return super().__new__(cls, name, bases, space)
            annotations = space.get("__annotations__", {})
            fields = tuple(annotations)
            defaults = {field: space[field] for field in fields if field in space}
            if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                raise TypeError(f"{name}: a field without a default value follows one that has one")
            made = {key: value for key, value in space.items() if key not in _GIVEN and key not in annotations}
            made |= {field: _getter(index, None) for index, field in enumerate(fields)}
            made |= {"__slots__": (), "_fields": fields, "_field_defaults": defaults, "__match_args__": fields}
            made["__annotations__"] = annotations
            return type(name, (_Tuple,), made)

    class NamedTuple(metaclass=_Maker):
        """The base of a class whose annotated names are the fields of a tuple."""
