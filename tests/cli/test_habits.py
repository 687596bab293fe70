"""What the hands of docker's users do: each of these was a place where they would have tripped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["run", "--no-such-flag", BUSYBOX], 125, "(see 'wherry run --help')"),
        (["create", "--no-such-flag", BUSYBOX], 125, "(see 'wherry create --help')"),
        (["exec", "--no-such-flag", "x", "y"], 125, "(see 'wherry exec --help')"),
        (["ps", "--no-such-flag"], 2, "(see 'wherry ps --help')"),
        (["run", "--link", "a:b", BUSYBOX], 125, "'wherry network create'"),
        (["run", "--storage-opt", "size=1g", BUSYBOX], 125, "Sandbox"),
        (["run", "--rm", "--network", "nosuch", BUSYBOX], 125, "'wherry network ls'"),
        (["run", "--pull", "never", "--platform", "linux/s390x", BUSYBOX], 125, "not for linux/s390x"),
        (["push", "nosuch"], 1, "'wherry images'"),
        (["image", "rm", "nosuch"], 1, "'wherry images'"),
        (["logs", "nosuch"], 1, "'wherry ps -a'"),
        (["build", "."], 2, "buildah build"),
        (["compose", "up"], 2, "generate unit"),
        (["imgaes"], 2, "did you mean 'wherry images'?"),
        (["events", "--filter", "event=nope"], 1, "start, die"),
        (["--address", "/no/such/socket", "ps"], 1, "wherryd &"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_to_do_next(
    wherry: Wherry, command: list[str], code: int, said: str
) -> None:
    done = wherry.run(*command, code=code)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_dockers_nouns_have_dockers_verbs(wherry: Wherry) -> None:
    wherry.run("container", "run", "--name", "noun", BUSYBOX, "true", code=None)
    wherry.run("create", "--name", "listed", BUSYBOX, "true")
    try:
        assert "listed" in wherry.run("container", "ls", "-a", "--format", "{{.Names}}").stdout.split()
        assert "listed" not in wherry.run("container", "ls", "--format", "{{.Names}}").stdout.split()
        assert wherry.run("image", "ls", "-q").stdout == wherry.run("images", "-q").stdout
        assert "CONTAINER" in wherry.run("containers", "ls").stdout  # ctr's
        assert wherry.run("image", "inspect", "-f", "{{.Id}}", BUSYBOX).stdout.startswith("sha256:")
    finally:
        wherry.run("rm", "listed")
        wherry.run("rm", "noun", code=None)


def test_what_is_shown_by_template_and_in_full(wherry: Wherry) -> None:
    assert wherry.run("version", "--format", "{{.Server.Version}}").stdout.strip()
    assert json.loads(wherry.run("version", "-f", "json").stdout)["Client"]["Version"]
    wherry.run("create", "--name", "sized", "--label", "mine=1", "--net", "none", BUSYBOX, "true")
    try:
        full = wherry.run("system", "df", "-v").stdout
        assert "busybox:test" in full
        assert "sized" in full
        row = json.loads(wherry.run("ps", "-a", "--format", "json").stdout)
        assert wherry.run("ps", "-a", "--format", '{{.Label "mine"}} {{.Names}}').stdout == "1 sized\n"
        assert row["Labels"] == "mine=1"
        assert row["Networks"] == "none"
    finally:
        wherry.run("rm", "sized")


def test_events_of_one_container(wherry: Wherry) -> None:
    for name in ("heard", "unheard"):
        wherry.run("run", "-d", "--name", name, "--net", "none", BUSYBOX, "true")
    wherry.run("wait", "heard", "unheard")
    try:
        filters = ["--filter", "event=start", "--filter", "event=die", "--filter", "container=heard"]
        lines = wherry.run("events", "--since", "0", "--until", "0s", "--format", "json", *filters).stdout.splitlines()
        assert [json.loads(line)["Topic"] for line in lines] == ["/tasks/start", "/tasks/exit"]
        everything = wherry.run("events", "--since", "0", "--until", "0s", "-f", "type=container").stdout
        assert "/containers/create" in everything
        assert "/snapshot/" not in everything
    finally:
        wherry.run("rm", "heard", "unheard")


def test_streams_that_are_named_are_the_only_ones(wherry: Wherry) -> None:
    script = "echo out; echo err >&2"
    done = wherry.run("run", "--rm", "-a", "stdout", BUSYBOX, "sh", "-c", script)
    assert (done.stdout, done.stderr) == ("out\n", "")
    done = wherry.run("run", "--rm", "-a", "STDERR", BUSYBOX, "sh", "-c", script)
    assert (done.stdout, done.stderr) == ("", "err\n")


def test_variables_from_a_file_as_docker_reads_them(wherry: Wherry, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=1\n# no\n\n  B=two words\nHERE\n")
    done = wherry.run("run", "--rm", "--env-file", str(file), BUSYBOX, "env", env={"HERE": "yes"})
    assert {"A=1", "B=two words", "HERE=yes"} <= set(done.stdout.splitlines())
    file.write_text("B = 2\n")
    error = wherry.run("run", "--rm", "--env-file", str(file), BUSYBOX, "env", code=125).stderr
    assert "no spaces" in error


def test_a_kill_for_lack_of_memory_says_so(wherry: Wherry) -> None:
    script = "x=a; while true; do x=$x$x; done"
    wherry.run("run", "--name", "greedy", "-m", "8m", "--net", "none", BUSYBOX, "sh", "-c", script, code=137)
    try:
        state = json.loads(wherry.run("inspect", "-f", "{{json .State}}", "greedy").stdout)
        assert state["OOMKilled"]
        assert "the kernel killed sh" in state["Error"]
        assert "(out of memory)" in wherry.run("ps", "-a", "--filter", "name=greedy").stdout
    finally:
        wherry.run("rm", "greedy")


def test_what_runs_not_is_helped_to_run(wherry: Wherry) -> None:
    wherry.run("create", "--name", "asleep", BUSYBOX, "true")
    try:
        assert "('wherry start asleep')" in wherry.run("exec", "asleep", "true", code=1).stderr
    finally:
        wherry.run("rm", "asleep")
