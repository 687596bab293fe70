"""The verbs for images: listing, names, history, archives, commit, and logging in to a registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX
from wherry.cli.docker_images import moment, parse_time, split_name
from wherry.client.logins import erase, store
from wherry.core.credentials import Credential, from_docker_config
from wherry.core.errors import InvalidArgument

SHORT = BUSYBOX.removeprefix("docker.io/library/")


def test_listing_and_names(wherry: Wherry) -> None:
    head, *lines = wherry.run("images").stdout.splitlines()
    assert head.split()[:2] == ["REPOSITORY", "TAG"]
    assert any(line.split()[:2] == SHORT.split(":") for line in lines)
    identity = wherry.run("images", "-q", SHORT).stdout.strip()
    assert re.fullmatch("[0-9a-f]{12}", identity)
    wherry.run("tag", SHORT, "example.com/other:2")
    try:
        assert wherry.run("images", "--format", "{{.ID}}", "example.com/other").stdout.strip() == identity
        assert wherry.run("images", "-q", "--filter", "reference=example.com/*").stdout.strip() == identity
        (found,) = json.loads(wherry.run("inspect", "--type", "image", "example.com/other:2").stdout)
        assert found["Id"].startswith(f"sha256:{identity}")
        assert set(found["RepoTags"]) >= {SHORT, "example.com/other:2"}
        assert "several names" in wherry.run("rmi", identity, code=1).stderr
    finally:
        assert "Untagged: example.com/other:2" in wherry.run("rmi", "example.com/other:2").stdout
    assert wherry.run("images", "-q", SHORT).stdout.strip() == identity
    assert "no such image" in wherry.run("rmi", "nope", code=1).stderr
    assert "IMAGE" in wherry.run("history", SHORT).stdout


def test_an_image_that_is_used(wherry: Wherry) -> None:
    wherry.run("tag", SHORT, "used:1")
    wherry.run("create", "--name", "user", "used:1", "true")
    assert "is made from it" in wherry.run("rmi", "used:1", code=1).stderr
    wherry.run("rm", "user")
    wherry.run("rmi", "used:1")


def test_archives(wherry: Wherry, tmp_path: Path) -> None:
    wherry.run("tag", SHORT, "archived:1")
    wherry.run("save", "-o", str(tmp_path / "a.tar"), "archived:1")
    wherry.run("rmi", "archived:1")
    assert wherry.run("load", "-i", str(tmp_path / "a.tar")).stdout == "Loaded image: archived:1\n"
    assert wherry.run("run", "--rm", "archived:1", "echo", "hi").stdout == "hi\n"
    wherry.run("rmi", "archived:1")


def test_commit(wherry: Wherry) -> None:
    wherry.run("run", "--name", "changed", BUSYBOX, "sh", "-c", "echo new >/new")
    digest = wherry.run("commit", "-m", "with new", "-c", 'CMD ["cat", "/new"]', "changed", "committed:1").stdout
    assert digest.startswith("sha256:")
    wherry.run("rm", "changed")
    assert wherry.run("run", "--rm", "committed:1").stdout == "new\n"
    wherry.run("rmi", "committed:1")


def test_what_takes_space(wherry: Wherry) -> None:
    rows = [json.loads(line) for line in wherry.run("system", "df", "--format", "json").stdout.splitlines()]
    assert [row["Type"] for row in rows] == ["Images", "Containers", "Local Volumes"]
    assert "ServerVersion" in wherry.run("info").stdout
    assert wherry.run("info", "-f", "{{.ContainersRunning}}").stdout == "0\n"
    wherry.run("run", "--name", "ended", BUSYBOX, "true")
    assert "Deleted Containers" in wherry.run("container", "prune", "-f").stdout
    assert wherry.run("system", "prune", code=1).stdout == ""
    assert "reclaimed" in wherry.run("system", "prune", "-f").stdout


def test_logins_are_kept_as_docker_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "config"))
    assert store("r.example:5000", "me", "se:cret") == ""
    assert store("docker.io", "me", "other") == ""
    path = tmp_path / "config" / "config.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert from_docker_config()("r.example:5000") == Credential("me", "se:cret")
    assert from_docker_config()("docker.io") == Credential("me", "other")
    assert erase("r.example:5000")
    assert not erase("r.example:5000")
    assert from_docker_config()("r.example:5000") is None
    assert list(json.loads(path.read_text())["auths"]) == ["https://index.docker.io/v1/"]


def test_nobody_to_log_in_to(wherry: Wherry, tmp_path: Path) -> None:
    done = wherry.run(
        "login",
        "-u",
        "me",
        "--password-stdin",
        "127.0.0.1:1",
        stdin="x\n",
        code=1,
        env={"DOCKER_CONFIG": str(tmp_path)},
    )
    assert "127.0.0.1:1" in done.stderr
    assert "no terminal" in wherry.run("login", code=1).stderr


def test_names_and_times() -> None:
    assert split_name("docker.io/library/alpine:3") == ("alpine", "3")
    assert split_name("r.example:5000/a/b@sha256:" + "0" * 64) == ("r.example:5000/a/b", "<none>")
    assert parse_time("1970-01-02T00:00:00Z") == 86400.0
    assert parse_time("1970-01-02T01:00:00.123+01:00") == 86400.0
    assert parse_time("0001-01-01T00:00:00Z") == parse_time("nonsense") == 0.0
    assert moment("1000") == 1000.0
    with pytest.raises(InvalidArgument):
        moment("yesterday")
