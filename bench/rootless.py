"""An ordinary user's containers, beside podman's as the same user: `python -m bench --only rootless`."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Iterator

from tests import users
from tests.peers import need
from tests.users import User

USER = "barrow"
RUNS, WARM_UPS = 15, 2
LIMIT = 0.5
# what is measured: a name, and the flags of `run`, which both have
NETWORKS: tuple[tuple[str, list[str]], ...] = (("no network", ["--net", "none"]), ("the default network", []))


def figures(image: str) -> list[tuple[str, float, float, float]]:
    """What, milliseconds of ours and of podman's, and the limit of their ratio."""
    for name in ("podman", "runc", "slirp4netns", "pasta"):
        need(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(users.devices("net/tun", "fuse"))
        user = users.of_host(USER)
        stack.callback(user.close)
        user("pull", "--plain-http", image)
        theirs = stack.enter_context(_podman(user, image))
        found = []
        for what, flags in NETWORKS:
            run = ["run", "--rm", *flags, image, "true"]
            ours = by_turns(user, [["wherry", *run], [*theirs, *run]])
            found.append((f"run --rm true as a user, {what}, beside podman", *ours, LIMIT))
        return found


@contextlib.contextmanager
def _podman(user: User, image: str) -> Iterator[list[str]]:
    """podman on folders below the user's, with the image. crun refuses hybrid hosts without root, runc doesn't."""
    words = ["podman", "--root", f"{user.folder}/home/podman", "--runroot", f"{user.run}/podman"]
    words += ["--cgroup-manager", "cgroupfs", "--runtime", "runc", "--storage-driver", "overlay"]
    user.command(*words, "pull", "-q", "--tls-verify=false", image)
    try:
        yield words
    finally:
        user.command(*words, "rm", "-f", "-a", "-t", "0", check=False)
        user.command(*words, "unshare", "rm", "-rf", f"{user.folder}/home/podman", check=False)


def by_turns(user: User, commands: list[list[str]]) -> tuple[float, float]:
    """Median milliseconds of two commands of a user's, run in turn."""
    times: list[list[float]] = [[] for _ in commands]
    for index in range(-WARM_UPS, RUNS):
        for row, command in zip(times, commands, strict=True):
            words = user.words(*command)
            begun = time.perf_counter()
            done = subprocess.run(words, env=user.environment(), cwd="/", capture_output=True, text=True, check=False)
            if index >= 0:
                row.append((time.perf_counter() - begun) * 1000)
            if done.returncode:
                raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip()}")
    ours, theirs = (statistics.median(row) for row in times)
    return ours, theirs
