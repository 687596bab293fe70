"""containerd's filter language."""

from __future__ import annotations

import pytest

from wherry.core.errors import InvalidArgument
from wherry.core.filters import compile_filters, fields

OBJECT = fields(
    {
        "name": "foo",
        "topic": "/tasks/exit",
        "empty": "",
        "labels": {"bar": "baz", "very complex label": "something", "a.b": "dotted", "q": 'say "x"', "blank": ""},
    }
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("name==foo", True),
        ("name == foo", True),
        ("name==bar", False),
        ("name!=bar", True),
        ("name", True),
        ("empty", False),
        ("absent", False),
        ("absent!=x", True),
        ("absent==x", False),
        ("labels.bar", True),
        ("labels.nothing", False),
        ("labels.blank", True),
        ("labels.a.b==dotted", True),
        ('labels."a.b"==dotted', True),
        ('labels."very complex label"==something', True),
        ('labels."very complex label"==something,name==foo', True),
        ('labels."very complex label"==something,name==x', False),
        (r'labels.q=="say \"x\""', True),
        (r'labels.q=="say \x22x\042"', True),
        ("name~=^f", True),
        ("name~=o$", True),
        ("name~=[[:upper:]]", False),
        (r"name~=\Afoo\z", True),
        ("topic~=|^/tasks/|", True),
        (r"topic~=/^\/tasks\/(exit|oom)$/", True),
        ("topic~=/images/", False),
        ("topic==/tasks/exit", None),
        ('topic=="/tasks/exit"', True),
        ("name==a==b", False),
        ("name==foo ", None),
        ("name=foo", None),
        ("name==", None),
        ("==foo", None),
        ("name==foo,", None),
        (",", None),
        ("name..x", None),
        ("labels.", None),
        ('labels."open', None),
        ("name~=(", None),
        ("name~=/open", None),
        ("name===foo", None),
        (r'name=="\q"', None),
        ("näme==x", None),
    ],
)
def test_one_filter(text: str, holds: bool | None) -> None:
    if holds is None:
        with pytest.raises(InvalidArgument, match="filters: parse error"):
            compile_filters([text])
    else:
        assert compile_filters([text])(OBJECT) is holds


def test_several_filters_are_joined_by_or() -> None:
    assert compile_filters([])(OBJECT)
    assert compile_filters(["name==x", "name==foo"])(OBJECT)
    assert not compile_filters(["name==x", "name==y"])(OBJECT)


def test_an_error_shows_the_place() -> None:
    with pytest.raises(InvalidArgument) as caught:
        compile_filters(["name=foo"])
    assert '[name >|=|< foo]: unsupported operator "="' in caught.value.message
