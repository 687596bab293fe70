"""Watching for OOM: an inotify descriptor on v2's memory.events, an eventfd at v1's memory.oom_control."""

from __future__ import annotations

import ctypes
import os

from wherry.linux.cgroups.files import key_values, read_or_empty, write
from wherry.linux.cgroups.interface import OomWatch

_IN_MODIFY, _IN_NONBLOCK, _IN_CLOEXEC = 0x2, os.O_NONBLOCK, os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class EventsWatch(OomWatch):
    """v2. The kernel tells of a change of memory.events with IN_MODIFY; a removed cgroup is silent, hence `gone`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._gone = False
        self._fd: int = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"inotify_init1: {os.strerror(code)}")
        if _libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_MODIFY) < 0:
            code = ctypes.get_errno()
            self.close()
            raise OSError(code, os.strerror(code), path)
        self._seen = self._kills()

    def fileno(self) -> int:
        return self._fd

    @property
    def gone(self) -> bool:
        return self._gone

    def read(self) -> bool:
        try:
            os.read(self._fd, 4096)
        except BlockingIOError:
            return False  # told already
        kills = self._kills()
        told, self._seen = kills > self._seen, max(kills, self._seen)
        return told

    def _kills(self) -> int:
        text = read_or_empty(self._path)
        if not text:
            self._gone = True
        return dict(key_values(text)).get("oom_kill", 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class EventfdWatch(OomWatch):
    """v1. An eventfd is bound to memory.oom_control by cgroup.event_control (memory.rst of cgroup-v1, section 9)."""

    def __init__(self, directory: str) -> None:
        self._control = f"{directory}/memory.oom_control"
        self._fd = -1
        self._gone = False
        control = os.open(self._control, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            write(f"{directory}/cgroup.event_control", f"{self._fd} {control}")
        except OSError:
            self.close()
            raise
        finally:
            os.close(control)

    def fileno(self) -> int:
        return self._fd

    @property
    def gone(self) -> bool:
        return self._gone

    def read(self) -> bool:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        # removing the cgroup signals the eventfd too
        self._gone = not os.path.exists(self._control)
        return not self._gone

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
