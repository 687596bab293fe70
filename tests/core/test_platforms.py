"""Platforms: specifiers, names that mean the same, and what fits a host."""

from __future__ import annotations

import pytest

from wherry.core import platforms
from wherry.core.errors import InvalidArgument
from wherry.core.platforms import Platform, best, matches, parse, ranker, runs_on


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("Linux/x86_64", Platform("linux", "amd64")),
        ("linux/amd64/v1", Platform("linux", "amd64")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
        ("linux/armhf", Platform("linux", "arm")),
        ("linux/arm/7", Platform("linux", "arm", "v7")),
        ("linux/armel", Platform("linux", "arm", "v6")),
        ("arm64", Platform("linux", "arm64")),
        ("i386", Platform("linux", "386")),
        ("windows(10.0.17763+win32k)/amd64", Platform("windows", "amd64", "", "10.0.17763", ("win32k",))),
    ],
)
def test_specifiers(text: str, expected: Platform) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("bad", ["", "*", "linux/*", "a/b/c/d", "nonsense", "linux/a b", "linux(/x"])
def test_bad_specifiers(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(bad)


def test_the_host_is_one() -> None:
    assert parse("linux").architecture == platforms.host().architecture
    assert str(platforms.host()).startswith("linux/")


def test_what_runs_on_what() -> None:
    assert [str(p) for p in runs_on(Platform("linux", "amd64", "v3"))] == [
        "linux/amd64/v3",
        "linux/amd64/v2",
        "linux/amd64",
        "linux/386",
    ]
    assert [str(p) for p in runs_on(Platform("linux", "arm", "v7"))] == ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]
    assert "linux/arm/v7" in [str(p) for p in runs_on(Platform("linux", "arm64", "v8"))]
    assert "linux/arm64/v8.5" in [str(p) for p in runs_on(Platform("linux", "arm64", "v9"))]


def test_the_best_of_an_index() -> None:
    offered = [None, parse("linux/386"), parse("linux/arm64"), parse("linux/amd64"), parse("linux/amd64")]
    assert best(parse("linux/amd64"), offered) == 3
    assert best(parse("linux/386"), offered) == 1
    assert best(parse("linux/s390x"), offered) is None


def test_ranks() -> None:
    strict = ranker([parse("linux/amd64")], strict=True)
    assert strict(parse("linux/386")) is None
    assert ranker([])(parse("linux/s390x")) == 0
    assert matches(parse("linux/arm64"), Platform("linux", "aarch64", "v8"))
