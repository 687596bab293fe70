"""The listings and the other nouns; help, usage errors, and what is said when nobody answers."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX
from wherry.cli.catalog import entries
from wherry.cli.command import GROUPS, main
from wherry.cli.man import page
from wherry.cli.output import age, size
from wherry.cli.version import VERSION


def test_version_and_plugins(wherry: Wherry) -> None:
    document = json.loads(wherry.run("version", "--format", "json").stdout)
    assert document["Server"]["UUID"]
    assert "io.containerd.snapshotter.v1" in wherry.run("plugins", "ls").stdout
    assert "overlayfs" in wherry.run("plugins", "ls", "-q").stdout.split()
    assert wherry.run("--version").stdout.startswith("wherry ")


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_the_default_specification(wherry: Wherry) -> None:
    assert json.loads(wherry.run("oci", "spec").stdout)["root"] == {"path": "rootfs"}


def test_a_socket_that_may_not_be_reached(wherry: Wherry) -> None:
    # the first run loads what the second, as another user, may not read
    script = f"""
import os, sys
from wherry.cli.command import main
main(['-a', {wherry.address!r}, 'version'])
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(['-a', {wherry.address!r}, 'version']))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"wherry: no permission to reach {wherry.address}")


def test_images(wherry: Wherry, tmp_path: Path) -> None:
    row = wherry.run("images", "ls").stdout.splitlines()[1].split()
    assert row[0] == BUSYBOX
    (image,) = json.loads(wherry.run("i", "ls", "--format", "json").stdout)
    assert (image["Name"], image["Platforms"][0].split("/")[0]) == (BUSYBOX, "linux")
    assert wherry.run("images", "tag", BUSYBOX, "example.com/box:1").stdout == "example.com/box:1\n"
    assert "already exists" in wherry.run("images", "tag", BUSYBOX, "example.com/box:1", code=1).stderr
    wherry.run("images", "tag", "--force", BUSYBOX, "example.com/box:1")
    archive = tmp_path / "box.tar"
    wherry.run("images", "export", str(archive), "example.com/box:1")
    assert wherry.run("images", "rm", "example.com/box:1").stdout == "example.com/box:1\n"
    assert wherry.run("images", "import", str(archive)).stdout.startswith("example.com/box:1 (sha256:")
    assert re.search(r"complete \(3/3\).*true", wherry.run("images", "check", "name==example.com/box:1").stdout)
    assert "unpacked" in wherry.run("images", "usage", "example.com/box:1").stdout
    assert wherry.run("images", "label", "example.com/box:1", "a=b").stdout == "a=b\n"
    assert "not found" in wherry.run("images", "rm", "--sync", "example.com/box:1", "none", code=1).stderr
    assert "archive" in wherry.run("images", "import", "/etc/hostname", code=1).stderr
    assert "No such file" in wherry.run("images", "import", f"{tmp_path}/none", code=1).stderr


def test_images_are_mounted(wherry: Wherry, tmp_path: Path) -> None:
    target = str(tmp_path / "m")
    os.mkdir(target)
    assert wherry.run("images", "mount", "--rw", BUSYBOX, target).stdout.strip() == target
    try:
        assert os.path.exists(f"{target}/bin/busybox")
        Path(target, "written").write_text("x")
    finally:
        wherry.run("images", "unmount", "--rm", target)
    assert os.listdir(target) == []
    assert target not in wherry.run("snapshots", "ls", "-q").stdout


def test_content(wherry: Wherry) -> None:
    digest = wherry.run("content", "ingest", "mine", stdin="some text").stdout.strip()
    assert wherry.run("content", "get", digest).stdout == "some text"
    assert wherry.run("content", "label", digest, "a=b").stdout.startswith("a=b,containerd.io/gc.root=")
    rows = json.loads(wherry.run("content", "ls", "--format", "json", f"digest=={digest}").stdout)
    assert [(row["Size"], row["Labels"]["a"]) for row in rows] == [(9, "b")]
    assert wherry.run("content", "edit", "--editor", "sed -i s/some/other/", digest).stdout.startswith("sha256:")
    wherry.run("content", "rm", digest)
    assert "not found" in wherry.run("content", "get", digest, code=1).stderr
    wrong = f"sha256:{'0' * 64}"
    assert wherry.run("content", "ingest", "--expected-digest", wrong, "bad", stdin="x", code=1).stderr
    assert wherry.run("content", "active", "-q").stdout in {"", "bad\n"}


def test_snapshots(wherry: Wherry) -> None:
    (chain,) = wherry.run("snapshots", "ls", "-q").stdout.split()
    lines = wherry.run("snapshots", "prepare", "-t", "/nowhere", "work", chain).stdout
    assert lines.startswith("mount -t overlay")
    assert wherry.run("snapshots", "mounts", "/nowhere", "work").stdout == lines
    assert r"\_ work" in wherry.run("snapshots", "tree").stdout
    assert json.loads(wherry.run("snapshots", "info", "work").stdout)["Kind"] == "Active"
    wherry.run("snapshots", "commit", "done", "work")
    assert "done" in wherry.run("snapshots", "usage", "-b", "done").stdout
    assert wherry.run("snapshots", "diff", "--keep", "done").stdout.startswith("sha256:")
    assert "a=b" in wherry.run("snapshots", "label", "done", "a=b").stdout
    wherry.run("snapshots", "rm", "done")
    assert wherry.run("snapshots", "unpack", BUSYBOX).stdout.strip() == chain


def test_namespaces_and_leases(wherry: Wherry) -> None:
    wherry.run("namespaces", "create", "team", "owner=ann")
    assert json.loads(wherry.run("ns", "ls", "--format", "json", "-q").stdout)
    assert "owner=ann" in wherry.run("ns", "ls").stdout
    assert wherry.run("-n", "team", "images", "ls", "-q").stdout == ""
    wherry.run("ns", "label", "team", "owner=")
    assert wherry.run("ns", "rm", "team").stdout == "team\n"
    lease = wherry.run("leases", "create", "--id", "mine", "-x", "1h", "a=b").stdout.strip()
    assert lease in wherry.run("leases", "ls", "-q").stdout
    assert wherry.run("leases", "resources", lease, "-q").stdout == ""
    assert wherry.run("leases", "rm", "--sync", lease).stdout == "mine\n"


def test_containers(wherry: Wherry) -> None:
    wherry.run("containers", "create", "--label", "a=b", BUSYBOX, "rec", "true")
    info = json.loads(wherry.run("containers", "info", "rec").stdout)
    assert (info["Image"], info["Spec"]["process"]["args"]) == (BUSYBOX, ["true"])
    assert json.loads(wherry.run("c", "info", "--spec", "rec").stdout) == info["Spec"]
    assert wherry.run("c", "ls", "-q", "labels.a==b").stdout == "rec\n"
    assert "c=d" in wherry.run("c", "label", "rec", "c=d").stdout
    assert "already exists" in wherry.run("c", "create", BUSYBOX, "rec", code=1).stderr
    wherry.run("c", "rm", "rec")
    assert 'container "rec" in namespace "default": not found' in wherry.run("c", "info", "rec", code=1).stderr


def test_events(wherry: Wherry) -> None:
    with wherry.start("events", "--format", "json", 'topic=="/containers/create"', stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout is not None
        try:
            for _ in range(50):
                wherry.run("containers", "create", BUSYBOX, "noted", "true")
                wherry.run("containers", "rm", "noted")
                if select.select([watcher.stdout], [], [], 0.1)[0]:
                    break
            event = json.loads(watcher.stdout.readline())
            assert (event["Topic"], event["Event"]["id"]) == ("/containers/create", "noted")
        finally:
            watcher.terminate()


def test_nobody_answers(tmp_path: Path) -> None:
    done = Wherry(f"{tmp_path}/none.sock").run("version", code=1)
    assert f"{tmp_path}/none.sock" in done.stderr
    assert "systemctl start wherryd" in done.stderr
    assert "--embedded" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nope"],
        ["tasks", "nope"],
        ["--nope", "version"],
        ["-a"],
        ["run"],
        ["run", "--cpus", "x", "a"],
        ["--timeout", "x", "version"],
    ],
)
def test_wrong_usage_is_told_from_an_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    # docker's code for what isn't the container's
    assert code == (125 if args[0] == "run" else 2)
    assert capsys.readouterr().err.startswith("wherry: ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(group.names[0] in text for group in GROUPS if not group.hidden)
    for group in GROUPS:
        if not group.single:
            assert main([group.names[0], "--help"]) == 0
            assert "commands:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    assert "--memory" in capsys.readouterr().out


def test_grpc_and_asyncio_are_not_loaded(wherry: Wherry) -> None:
    script = (
        "import sys; from wherry.cli.command import main; "
        f"code = main(['-a', {wherry.address!r}, *sys.argv[1:]]); "
        "sys.exit(code or bool({'grpc', 'asyncio', 'aiohttp', 'ssl'} & set(sys.modules)) * 99)"
    )
    for args in (["version"], ["tasks", "ls"], ["ps", "-a"], ["run", "--rm", BUSYBOX, "true"]):
        command = [sys.executable, "-c", f"from wherry.cli import startup; startup.prepare(); {script}", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_sizes_and_ages_as_people_read_them() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1 << 20, 5 << 40)] == ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "5.0 TiB"]
    assert age(0) == "-"


def test_every_command_has_an_example_and_a_page() -> None:
    found = list(entries())
    assert len(found) > 80
    assert [" ".join(entry.words) for entry in found if not entry.command.example] == []
    text = page(next(entry for entry in found if entry.words == ("run",)))
    assert '.TH "WHERRY-RUN" 1' in text
    assert "\\-\\-memory" in text
    assert "wherry run \\-d" in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["r"], "run\trun a command in a new container"),
        (["images", "l"], "list\tlist images"),
        (["run", "--pull", "al"], "always\t"),
        (["run", "--publish-a"], "--publish-all\t"),
        (["rm", ""], "completed\t"),
        (["run", "--env-file", ""], ":files"),
        (["completion", "z"], "zsh\t"),
    ],
)
def test_completion(wherry: Wherry, words: list[str], answer: str) -> None:
    wherry.run("create", "--name", "completed", BUSYBOX, "true")
    try:
        lines = wherry.run("__complete", *words).stdout.splitlines()
        assert any(line.startswith(answer) for line in lines), lines
    finally:
        wherry.run("rm", "completed")


def test_scripts_for_shells_are_read_by_them(wherry: Wherry) -> None:
    script = wherry.run("completion", "bash").stdout
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "#compdef wherry" in wherry.run("completion", "zsh").stdout
    assert "complete -c wherry" in wherry.run("completion", "fish").stdout
