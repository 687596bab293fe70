"""`runtime` is each of the runtimes in turn, `bundle` a folder to write config.json in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.rootfs import build_busybox_rootfs
from tests.runtime import crun as crun_table
from tests.runtime.bundles import Bundle, Runtime, crun, wherry
from tests.runtime.matrix import Matrix


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if "tests/runtime" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="making containers takes root"))

    left_out = [item for item in items if _runtime_of(item) == "crun" and _name(item) in crun_table.DIFFERENCES]
    for item in left_out:
        _matrix.add(_module(item), _name(item), "crun", crun_table.DIFFERENCES[_name(item)])
        items.remove(item)
    config.hook.pytest_deselected(items=left_out)


def _module(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("test_")


def _name(item: pytest.Item) -> str:
    name = str(getattr(item, "originalname", "") or item.name)
    caller = getattr(getattr(item, "callspec", None), "params", {}).get("caller")
    return f"{name}_under_{caller}" if caller else name


def _runtime_of(item: pytest.Item) -> str:
    if "tests/runtime" not in str(item.path):
        return ""
    fixtures = getattr(item, "fixturenames", ())
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return str(parameters.get("runtime", "wherry-runtime" if "ours" in fixtures else ""))


_matrix = Matrix()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    name = _runtime_of(item)
    if name and (report.when == "call" or not report.passed):
        outcome = {"passed": "holds", "skipped": "not here"}.get(report.outcome, "fails")
        _matrix.add(_module(item), _name(item), name, outcome)
    return report


def pytest_sessionfinish() -> None:
    if path := os.environ.get("WHERRY_MATRIX"):
        _matrix.write(Path(path))


@pytest.fixture(scope="session")
def rootfs() -> Iterator[str]:
    """Outside of pytest's folders, which only root may enter: the root of a user namespace is somebody else."""
    need("busybox")
    folder = tempfile.mkdtemp(prefix="wherry-rootfs-")
    yield build_busybox_rootfs(folder)
    shutil.rmtree(folder)


@pytest.fixture
def bundle(tmp_path: Path, rootfs: str) -> Bundle:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return Bundle(folder, rootfs)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Bundle:
    """With a rootfs that the test may change."""
    need("busybox")
    folder = tmp_path / "bundle"
    folder.mkdir()
    return Bundle(folder, build_busybox_rootfs(folder / "rootfs"))


@pytest.fixture
def open_bundle() -> Iterator[Bundle]:
    """The same where everybody may go: pytest's folders are root's (each run of it makes them so again)."""
    need("busybox")
    folder = Path(tempfile.mkdtemp(prefix="wherry-bundle-"))
    folder.chmod(0o755)
    yield Bundle(folder, build_busybox_rootfs(folder / "rootfs"))
    shutil.rmtree(folder)


@pytest.fixture(params=["wherry-runtime", "runc", "crun"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runtime]:
    """Each: a test that both references fail is wrong."""
    if request.param == "runc":
        made = Runtime("runc", [need("runc")], tmp_path / "state")
    elif request.param == "crun":
        made = crun(tmp_path / "state")
    else:
        made = wherry(tmp_path / "state")
    yield made
    made.clean()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Runtime]:
    """For what runc 1.1 can't do, or does otherwise."""
    made = wherry(tmp_path / "state")
    yield made
    made.clean()
