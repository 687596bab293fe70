"""The default AppArmor profile: compiled, loaded once by the daemon, named for containers where it is loaded.

This machine's kernel may have no AppArmor: what the kernel shows is then files of the test's.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wherry.client import security
from wherry.client.sandbox import Limits, Plan
from wherry.client.spec_defaults import default_spec
from wherry.core import apparmor, places
from wherry.daemon.apparmor import provide


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with AppArmor on; its list of profiles."""
    enabled, profiles = tmp_path / "enabled", tmp_path / "profiles"
    enabled.write_text("Y\n")
    profiles.write_text("unconfined-thing (unconfined)\n")
    monkeypatch.setattr(apparmor, "ENABLED", str(enabled))
    monkeypatch.setattr(apparmor, "PROFILES", str(profiles))
    return profiles


@pytest.fixture
def parser(tmp_path: Path, kernel: Path) -> Path:
    """A program in apparmor_parser's place, which notes what it was given."""
    program = tmp_path / "parser"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat > {tmp_path}/text\n'
        f"echo '{apparmor.NAME} (enforce)' >> {kernel}\n"
    )
    program.chmod(0o755)
    return program


def spec(**options: Any) -> dict[str, Any]:
    made = default_spec("default", "one")
    asked = {"privileged": False, "add": (), "drop": (), **options}
    security.apply(made, asked.pop("security", security.Security(seccomp="unconfined")), **asked)
    return made


async def test_the_daemon_loads_it_once(parser: Path, tmp_path: Path) -> None:
    assert not apparmor.loaded()
    await provide(str(parser))
    assert (tmp_path / "text").read_text() == apparmor.PROFILE
    assert apparmor.loaded()
    await provide(str(parser))
    assert (tmp_path / "calls").read_text() == "--replace --skip-cache\n"


async def test_an_ordinary_users_daemon_leaves_it_alone(
    parser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is root in its own namespace, and the kernel refuses."""
    monkeypatch.setenv(places.INSIDE, "1000")
    await provide(str(parser))
    assert not (tmp_path / "calls").exists()


async def test_a_host_without_it_and_a_parser_that_fails_stop_nobody(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await provide("/bin/false")
    assert not apparmor.loaded()
    monkeypatch.setattr(apparmor, "ENABLED", str(tmp_path / "none"))
    await provide(str(tmp_path / "nobody"))


async def test_containers_get_it_where_it_is_loaded(parser: Path) -> None:
    assert "apparmorProfile" not in spec()["process"]
    await provide(str(parser))
    assert spec()["process"]["apparmorProfile"] == apparmor.NAME
    assert "apparmorProfile" not in spec(privileged=True)["process"]
    for text, profile in (("apparmor=unconfined", None), ("apparmor:mine", "mine")):
        asked = security.parse_options([text, "seccomp=unconfined"])
        assert spec(security=asked)["process"].get("apparmorProfile") == profile


async def test_sandboxes_get_it_too(parser: Path) -> None:
    plan = Plan("busybox", Limits())
    assert plan.launch("one", "/bin/true").spec.apparmor_profile == ""
    await provide(str(parser))
    assert plan.launch("one", "/bin/true").spec.apparmor_profile == apparmor.NAME
    assert plan._replace(seccomp=False).launch("one", "/bin/true").spec.apparmor_profile == ""


def test_it_compiles() -> None:
    program = shutil.which("apparmor_parser", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        pytest.skip("apparmor_parser is missing (Debian: apparmor)")
    command = [program, "--skip-kernel-load", "--skip-cache"]
    subprocess.run(command, input=apparmor.PROFILE.encode(), check=True, capture_output=True)
