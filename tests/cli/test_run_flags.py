"""What the options of `run` do, seen from inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.peers import need
from tests.wherryd import BUSYBOX


@pytest.mark.parametrize(
    ("options", "script", "output"),
    [
        (["-u", "nobody", "-w", "/etc", "-e", "A=b"], "id -un; pwd; echo $A", "nobody\n/etc\nb\n"),
        (["--hostname", "box"], "hostname; echo $HOSTNAME", "box\nbox\n"),
        (
            ["--read-only", "--tmpfs", "/t:size=1m"],
            "touch /x 2>/dev/null || echo ro; touch /t/x && echo rw",
            "ro\nrw\n",
        ),
        (["--shm-size", "2m"], "df -k /dev/shm | awk 'NR==2{print $2}'", "2048\n"),
        (["--ulimit", "nofile=99:100"], "ulimit -n; ulimit -Hn", "99\n100\n"),
        (["--group-add", "nobody", "--group-add", "4711"], "id -G", "0 4711 65534\n"),
        (["--cap-drop", "ALL", "--cap-add", "chown"], "grep CapEff /proc/self/status", "CapEff:\t0000000000000001\n"),
        (["--security-opt", "no-new-privileges"], "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n"),
        ([], "grep -E 'NoNewPrivs|Seccomp:' /proc/self/status", "NoNewPrivs:\t0\nSeccomp:\t2\n"),
        (["--security-opt", "seccomp=unconfined"], "grep Seccomp: /proc/self/status", "Seccomp:\t0\n"),
        (["--oom-score-adj", "500"], "cat /proc/self/oom_score_adj", "500\n"),
        (["--device", "/dev/null:/dev/nil:rw"], "echo x >/dev/nil && ls -l /dev/nil | cut -c1", "c\n"),
        (["--uts", "host"], "cat /proc/sys/kernel/hostname >/tmp/h; test -s /tmp/h && echo ok", "ok\n"),
        (["--entrypoint", "echo"], None, "a b\n"),
        (["--memory", "32m", "--pids-limit", "33", "--cpus", "0.5"], "echo limited", "limited\n"),
        (
            ["--privileged"],
            "test -e /dev/kmsg || test -e /dev/vda || ls /dev | wc -l | grep -q .. && echo many",
            "many\n",
        ),
        (["--sysctl", "net.ipv4.ip_default_ttl=33"], "cat /proc/sys/net/ipv4/ip_default_ttl", "33\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(wherry: Wherry, options: list[str], script: str | None, output: str) -> None:
    command = ["sh", "-c", script] if script is not None else ["a", "b"]
    assert wherry.run("run", "--rm", *options, BUSYBOX, *command).stdout == output


def test_files_of_variables_and_labels(wherry: Wherry, tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# a comment\nONE=1\nHERE\nNOT_HERE\n")
    script = "echo $ONE $TWO $HERE ${NOT_HERE-none}"
    words = ["run", "--rm", "--env-file", str(path), "-e", "TWO=2", BUSYBOX, "sh", "-c", script]
    done = wherry.run(*words, env={"HERE": "there"})
    assert done.stdout == "1 2 there none\n"


def test_an_init_reaps(wherry: Wherry) -> None:
    need("tini")
    assert "docker-init" in wherry.run("run", "--rm", "--init", BUSYBOX, "cat", "/proc/1/cmdline").stdout


def test_namespaces_of_another_container(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "first", BUSYBOX, "sleep", "1234")
    try:
        inside = wherry.run("run", "--rm", "--pid", "container:first", BUSYBOX, "ps", "-o", "args").stdout
        assert "sleep 1234" in inside
        error = wherry.run("run", "--rm", "--ipc", "container:nope", BUSYBOX, "true", code=125).stderr
        assert "no such container: nope" in error
    finally:
        wherry.run("rm", "-f", "first")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--security-opt", "nope=1"], "unknown option 'nope'"),
        (["--cap-add", "nope"], "unknown capability"),
        (["--restart", "sometimes"], "invalid restart policy"),
        (["--rm", "--restart", "always"], "can't be used together"),
        (["-v", "a b:/x"], "neither an absolute path nor a volume"),
        (["-v", "/a:/b", "-v", "/c:/b"], "two mounts for /b"),
        (["--mount", "type=bind,dst=/x"], "needs a source"),
        (["--mount", "type=bind,src=/no/such/place,dst=/x"], "doesn't exist"),
        (["--ulimit", "nope=1"], "invalid ulimit"),
        (["--device", "/no/such/device"], "No such file"),
        (["--device", "vendor.example/class=x"], "CDI"),
        (["--memory", "1k"], "too small"),
        (["--stop-signal", "NOPE"], "is no signal"),
        (["--health-retries", "3"], "need --health-cmd"),
        (["--gpus", "some"], "expected all"),
        (["--userns", "nonsense"], "it is host, auto"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be(wherry: Wherry, options: list[str], complaint: str) -> None:
    done = wherry.run("run", "--rm", *options, BUSYBOX, "true", code=125)
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_devices_by_name(wherry: Wherry, tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho of the vendor\n")
    (tmp_path / "tool").chmod(0o755)
    document = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.example/thing",
        "containerEdits": {"env": ["ALL=yes"]},
        "devices": [
            {
                "name": "one",
                "containerEdits": {
                    "env": ["THING=one"],
                    "deviceNodes": [{"path": "/dev/thing", "hostPath": "/dev/null"}],
                    "mounts": [{"hostPath": str(tmp_path / "tool"), "containerPath": "/bin/tool"}],
                },
            }
        ],
    }
    (tmp_path / "vendor.json").write_text(json.dumps(document))
    script = "echo $THING $ALL; tool; echo x >/dev/thing && echo written"
    done = wherry.run(
        "run", "--rm", "--device", "vendor.example/thing=one", BUSYBOX, "sh", "-c", script,
        env={"WHERRY_CDI_DIRS": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "one yes\nof the vendor\nwritten\n"
