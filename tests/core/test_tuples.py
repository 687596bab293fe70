"""The tuples of `wherry.core.tuples` are those of typing."""

from __future__ import annotations

import pickle
import typing
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from wherry.core.tuples import NamedTuple


class Ours(NamedTuple):
    """What it holds."""

    name: str
    size: int = 0
    labels: Mapping[str, str] = MappingProxyType({})

    @property
    def twice(self) -> int:
        """Both."""
        return self.size * 2

    @classmethod
    def of(cls, text: str) -> Ours:
        return cls(text)

    def __str__(self) -> str:
        return f"<{self.name}>"


class Theirs(typing.NamedTuple):
    """What it holds."""

    name: str
    size: int = 0
    labels: Mapping[str, str] = MappingProxyType({})


def test_they_are_the_same() -> None:
    ours, theirs = Ours("a", 3), Theirs("a", 3)
    assert tuple(ours) == tuple(theirs) == ("a", 3, {})
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert (Ours._fields, Ours._field_defaults) == (Theirs._fields, Theirs._field_defaults)
    assert (Ours.__doc__, Ours.__module__, Ours.__qualname__) == (Theirs.__doc__, Theirs.__module__, "Ours")
    assert Ours.__match_args__ == ("name", "size", "labels")
    assert typing.get_type_hints(Ours) == typing.get_type_hints(Theirs)
    assert tuple(ours._replace(name="b")) == ("b", 3, {})
    assert ours._asdict() == theirs._asdict()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        Ours()  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        ours.name = "b"  # type: ignore[misc]


def test_methods_and_properties_are_there() -> None:
    assert (Ours.of("x").name, Ours("x", 4).twice, str(Ours("x"))) == ("x", 8, "<x>")
    assert not hasattr(Ours("x"), "__dict__")


def test_it_can_be_sent() -> None:
    one = Ours("a", 1, {"b": "c"})
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_field_without_a_default_comes_first() -> None:
    with pytest.raises(TypeError, match="field without a default value"):

        class Wrong(NamedTuple):
            size: int = 0
            name: str  # type: ignore[misc]
