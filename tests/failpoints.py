"""The places where processes are killed (`core/failpoints.py`), and what must be true after each.

`POINTS` is all of them; a test compares it with the sources. What a container may end with after its place was reached:

    KEPT    its own exit status, 7, and nothing else: nobody that owned it died, or its end was known before
    LOST    137: its shim died while it ran
    EITHER  one of the two: whether the program had ended in that moment isn't the place's business
    GONE    nothing: it had not been created when the place was reached, so nobody was told that it exists
"""

from __future__ import annotations

from typing import Final, NamedTuple

KEPT, LOST, EITHER, GONE = "kept", "lost", "either", "gone"


class Point(NamedTuple):
    """A place. `dies` is the process that gets SIGKILL there; with `kill_shim` the shim is killed to get there.

    `nth`: the process goes on the first times that it comes there. `hooks`: the container has hooks, with which its
    first process is forked in the old way and starts and deletes are forked, too. `warm`: there is a shim that had a
    container before; else there is none. `held`: somebody else is connected to the shim, so that it isn't kept for the
    next container, but leaves.
    """

    name: str
    dies: str
    end: str
    kill_shim: bool = False
    nth: int = 1
    hooks: bool = False
    warm: bool = False
    held: bool = False

    @property
    def title(self) -> str:
        """What the file says, and a test is called."""
        how = {"+hooks": self.hooks, "+warm": self.warm, "+held": self.held}
        return f"{self.name}:{self.nth}{''.join(word for word, is_so in how.items() if is_so)}"


def _points(dies: str, end: str, *names: str, nth: int = 1, **how: bool) -> list[Point]:
    return [Point(name, dies, end, nth=nth, **how) for name in names]


_EXIT = ("shim.exit.reaped", "shim.exit.written", "shim.exit.published", "shim.exit.told")
POINTS: Final = [
    *_points("daemon", GONE, "daemon.record.created", "daemon.create.bundled"),
    *_points("daemon", GONE, "daemon.create.planned", "daemon.create.spawned", "daemon.create.connected"),
    *_points("daemon", GONE, "daemon.create.occupied", warm=True),
    *_points("daemon", KEPT, "daemon.create.created"),
    *_points("daemon", KEPT, "daemon.start.asked", "daemon.start.done", "daemon.exec.asked"),
    *_points("daemon", KEPT, "daemon.start.asked", "daemon.start.done", nth=2),  # of the exec
    *_points("daemon", KEPT, "daemon.exec.deleted"),
    # of the create, the start, the exec (added, started, ended), the end, the delete
    *(Point("daemon.event.received", "daemon", KEPT, nth=nth) for nth in range(1, 8)),
    *(Point("daemon.event.kept", "daemon", KEPT, nth=nth) for nth in range(1, 8)),
    *_points("daemon", KEPT, "daemon.wait.answered"),
    *_points("daemon", KEPT, "daemon.wait.answered", nth=2),
    *_points("daemon", KEPT, "daemon.delete.asked", "daemon.delete.done"),
    *_points("daemon", KEPT, "daemon.end.vacant", "daemon.end.left", "daemon.end.hidden"),
    *_points("daemon", KEPT, "daemon.record.logless", "daemon.record.deleted"),
    *_points("daemon", LOST, "daemon.bury.begun", "daemon.bury.deleted", "daemon.bury.told", kill_shim=True),
    *_points("daemon", LOST, "daemon.bury.removed", kill_shim=True),
    *_points("fork server", KEPT, "forkserver.asked", "forkserver.forked", "forkserver.reaped"),
    *_points("clean-up", LOST, "cleanup.begun", "cleanup.deleted", "cleanup.unmounted", kill_shim=True),
    *_points("shim", GONE, "shim.spawn.streams", "shim.spawn.bound", "shim.spawn.answered"),
    *_points("shim", GONE, "shim.create.asked", "shim.create.streams", "shim.create.made", "shim.create.done"),
    *_points("shim", LOST, "shim.start.asked", "shim.start.executed", "shim.start.told"),
    *_points("shim", LOST, "shim.exec.added", "shim.exec.streams", "shim.exec.born", "shim.exec.deleted"),
    *_points("shim", EITHER, "shim.event.sent", "shim.event.confirmed"),
    *(Point("shim.event.sent", "shim", EITHER, nth=nth) for nth in range(2, 8)),
    *(Point("shim.event.confirmed", "shim", EITHER, nth=nth) for nth in range(2, 8)),
    # the first end is that of the exec'd process, the second the container's
    *_points("shim", LOST, "shim.exit.seen", *_EXIT),
    *_points("shim", LOST, "shim.exit.seen", nth=2),
    *_points("shim", KEPT, *_EXIT, nth=2),
    *_points("shim", KEPT, "shim.delete.asked", "shim.delete.drained", "shim.delete.deleted", "shim.delete.done"),
    *_points("shim", KEPT, "shim.vacate.emptied", "shim.vacate.done"),
    *_points("shim", KEPT, "shim.shutdown.asked", "shim.shutdown.emptied", "shim.shutdown.unlinked", held=True),
    *_points("shim", GONE, "shim.occupy.asked", "shim.occupy.bound", "shim.create.made", warm=True),
    *_points("runtime", GONE, "runtime.create.mounted", "runtime.create.taken", "runtime.create.cgroup"),
    *_points("runtime", GONE, "runtime.create.recorded", "runtime.answering"),
    *_points("runtime", GONE, "runtime.borrowed.namespaces", "runtime.borrowed.waits"),
    # of a create by the shim itself
    *_points("shim", GONE, "runtime.create.mounted", "runtime.create.taken", "runtime.create.cgroup", warm=True),
    *_points("shim", GONE, "runtime.borrowed.namespaces", "runtime.borrowed.waits", warm=True),
    *_points("shim", GONE, "runtime.create.recorded", warm=True),
    # of an exec by the shim itself
    *_points("shim", LOST, "runtime.entering.started"),
    # of an exec that is for the runtime, and isn't forked there
    *_points("runtime", KEPT, "runtime.borrowed.entering", "runtime.borrowed.executed"),
    # of the container itself
    *_points("runtime", GONE, "runtime.forked", "runtime.child.born", "runtime.child.ready", hooks=True),
    *_points("runtime", GONE, "runtime.recorded", "runtime.init.namespaces", hooks=True),
    # a delete without hooks runs in the shim itself
    *_points("shim", KEPT, "runtime.delete.cgroup", "runtime.delete.removed"),
    *_points("runtime", KEPT, "runtime.delete.cgroup", "runtime.delete.removed", hooks=True),
]
# places whose names begin so are another part's, whose own tests go there
ELSEWHERE: Final = ("network.", "cri.")
