"""`wherry events`: what was, what is, and a daemon that is killed in between."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import pytest

from tests.wherryd import BUSYBOX, Wherryd, wherryd
from wherry.cli.moments import moment

__all__ = ["wherryd"]


def command(daemon: Wherryd, *args: str) -> list[str]:
    return [sys.executable, "-m", "wherry.cli", "-a", daemon.address, *args]


def run(daemon: Wherryd, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(daemon, *args), capture_output=True, text=True, timeout=60, check=check)


def parsed(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_happened_before_is_shown_from_a_number_or_a_time(wherryd: Wherryd) -> None:
    for name in ("one", "two", "three"):
        run(wherryd, "namespaces", "create", name)
        time.sleep(0.05)
    seen = parsed(run(wherryd, "events", "--since", "0", "--until", "0s", "--format", "json").stdout)
    names = [event["Event"]["name"] for event in seen if event["Topic"] == "/namespaces/create"]  # type: ignore[index]
    assert names == ["one", "two", "three"]
    numbers = [event["Sequence"] for event in seen]
    assert numbers == sorted(numbers)  # type: ignore[type-var]
    created = [event for event in seen if event["Topic"] == "/namespaces/create"]
    since = run(wherryd, "events", "--since", str(created[1]["Timestamp"]), "--until", "0s").stdout
    assert '"three"' in since
    assert '"one"' not in since
    after = run(
        wherryd, "events", "--since", str(numbers[0]), "--until", "0s", "--sequence", "topic~=namespaces"
    ).stdout
    assert [line.split()[0] for line in after.splitlines()] == [str(number) for number in numbers[1:]]
    refused = run(wherryd, "events", "--since", "99999999", check=False)
    assert refused.returncode == 1
    assert "no event has had the number" in refused.stderr


def test_a_subscriber_misses_and_doubles_nothing_over_killed_daemons(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    follower = subprocess.Popen(
        command(wherryd, "events", "--since", "0", "--format", "json", "topic~=tasks"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ids = []
        for number in range(3):
            script = f"sleep 0.3; exit {number}"
            made = run(wherryd, "run", "-d", "--net", "none", "--log-driver", "none", BUSYBOX, "sh", "-c", script)
            ids.append(made.stdout.strip())
            wherryd.kill()
            time.sleep(0.5)
            wherryd.start()
        exits: dict[str, int] = {}
        seen: list[int] = []
        assert follower.stdout is not None
        while len(exits) < 3:
            event = json.loads(follower.stdout.readline())
            seen.append(event["Sequence"])
            if event["Topic"] == "/tasks/exit":
                name = event["Event"]["container_id"]
                assert name not in exits
                exits[name] = event["Event"].get("exit_status", 0)
        assert exits == {name: number for number, name in enumerate(ids)}
        assert seen == sorted(set(seen))
        run(wherryd, "rm", "-f", *ids)
    finally:
        follower.kill()
        follower.communicate()
    assert wherryd.settle() == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1763835000", 1763835000.0),
        ("@1763835000.5", 1763835000.5),
        ("2025-11-22T18:10:00Z", 1763835000.0),
        ("2025-11-22T18:10:00.25Z", 1763835000.25),
        ("2025-11-22 19:10:00+01:00", 1763835000.0),
        ("2025-11-22T16:10-0200", 1763835000.0),
    ],
)
def test_times_are_written_in_several_ways(text: str, at: float) -> None:
    assert moment(text) == at


def test_a_time_may_be_so_long_ago_or_local_or_nonsense() -> None:
    assert abs(moment("1h30m") - (time.time() - 5400)) < 5
    assert moment("2025-11-22") == time.mktime((2025, 11, 22, 0, 0, 0, 0, 0, -1))
    for text in ("soon", "2025-13-01", "2025-11-22T25:00"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no time"):
            moment(text)
