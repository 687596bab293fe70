"""Fixtures of the CRI's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cri.guest import SYSTEMD, GuestLab
from tests.cri.kubelet import ContainerdLab, WherryLab, closing


@pytest.fixture(scope="module")
def lab() -> Iterator[WherryLab]:
    """`wherryd` with the tests' image, for the tests of one module: each has its own pods, which go with it."""
    yield from closing(WherryLab())


@pytest.fixture(scope="module", params=["wherryd", "containerd"])
def each_lab(request: pytest.FixtureRequest) -> Iterator[WherryLab | ContainerdLab]:
    """The same tests on `wherryd` and on Debian's containerd, which is the reference."""
    yield from closing(WherryLab() if request.param == "wherryd" else ContainerdLab())


@pytest.fixture(scope="session")
def guest() -> Iterator[GuestLab]:
    """In the VM: a node whose handler has systemd make cgroups, for all tests; each leaves it without pods."""
    yield from closing(GuestLab(SYSTEMD))
