"""`wherry pull` and `push` against a real registry."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import subprocess
from pathlib import Path

from tests.cli.conftest import Wherry
from tests.registry.conftest import PASSWORD, USER, locked_registry, registry
from tests.wherryd import BUSYBOX

__all__ = ["locked_registry", "registry"]


def test_push_and_pull(wherry: Wherry, registry: str) -> None:
    name = f"{registry}/library/box:1"
    wherry.run("images", "tag", BUSYBOX, name)
    try:
        pushed = wherry.run("push", "--plain-http", name)
        assert re.search(r"layer-sha256:\w{12} +\w+", pushed.stderr)
        wherry.run("images", "rm", "--sync", name)
        pulled = wherry.run("pull", "--plain-http", "--label", "a=b", name)
        assert pulled.stdout == f"{name}\n"
        assert wherry.run("images", "ls", "-q", "labels.a==b").stdout == f"{name}\n"
        assert wherry.run("containers", "run", "--rm", name, "pulled", "echo", "hi").stdout == "hi\n"
        assert wherry.run("pull", "-q", "--plain-http", name).stderr == ""
    finally:
        wherry.run("images", "rm", name, code=None)


def test_credentials_of_docker_login(wherry: Wherry, locked_registry: str, tmp_path: Path) -> None:
    name = f"{locked_registry}/library/box:1"
    wherry.run("images", "tag", BUSYBOX, name)
    config = tmp_path / "config.json"

    def login(password: str) -> None:
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        config.write_text(json.dumps({"auths": {locked_registry: {"auth": auth}}}))

    env = {"DOCKER_CONFIG": str(tmp_path)}
    try:
        assert "authorization failed" in wherry.run("push", "-q", name, env=env, code=1).stderr
        login(PASSWORD)
        wherry.run("push", "-q", name, env=env)
        wherry.run("images", "rm", "--sync", name)
        assert wherry.run("pull", "-q", name, env=env).stdout == f"{name}\n"
        login("wrong")
        assert "authorization failed" in wherry.run("pull", "-q", name, env=env, code=1).stderr
        wherry.run("pull", "-q", "--user", f"{USER}:{PASSWORD}", name, env=env)
        config.write_text("{")
        assert f"{config}: " in wherry.run("pull", "-q", name, env=env, code=1).stderr
        wherry.run("pull", "-q", "--user", f"{USER}:{PASSWORD}", name, env=env)
    finally:
        wherry.run("images", "rm", name, code=None)


def test_progress_is_redrawn_on_a_terminal(wherry: Wherry, registry: str) -> None:
    name = f"{registry}/library/drawn:1"
    wherry.run("images", "tag", BUSYBOX, name)
    master, slave = pty.openpty()
    try:
        process = wherry.start("push", "--plain-http", name, stderr=slave, stdout=subprocess.DEVNULL)
        os.close(slave)
        assert process.wait(30) == 0
        text = os.read(master, 1 << 16)
        assert b"\x1b[2K" in text
        assert b"manifest-sha256" in text
    finally:
        os.close(master)
        wherry.run("images", "rm", name)


def test_what_the_registry_does_not_have(wherry: Wherry, registry: str) -> None:
    done = wherry.run("pull", "--plain-http", f"{registry}/none:1", code=1)
    assert "not found" in done.stderr
    assert "sense" in wherry.run("pull", "UPPER/case", code=1).stderr or done.stderr
    assert "none" not in wherry.run("images", "ls", "-q").stdout
