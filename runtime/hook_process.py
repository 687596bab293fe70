"""How a hook runs: a program with the container's state as JSON on its stdin, and a limit of time.

By fork and exec without `subprocess`, whose import costs more than most hooks. `hooks.py` decides which ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

from wherry.linux import syscalls as sc
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OUTPUT_LIMIT = 64 * 1024  # of what a failing hook wrote, for the message


def run_all(kind: str, hooks: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Run the hooks in order; the first that fails is an error: `error running prestart hook #0: exit status 1, …`."""
    if not hooks:
        return
    payload = json.dumps(state).encode()
    for number, hook in enumerate(hooks):
        try:
            _run(hook, payload)
        except (OSError, ContainerError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ContainerError(f"error running {kind} hook #{number}: {reason}") from None


def _run(hook: dict[str, Any], payload: bytes) -> None:
    stdin_reader, stdin_writer = os.pipe()
    out_reader, out_writer = os.pipe()
    fail_reader, fail_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(hook, stdin_reader, out_writer, fail_writer)
    for fd in (stdin_reader, out_writer, fail_writer):
        os.close(fd)
    try:
        failure = os.read(fail_reader, 4096)
        if failure:
            os.waitpid(pid, 0)
            raise ContainerError(failure.decode("utf-8", "replace"))
        _feed(stdin_writer, payload)
        stdin_writer = -1
        timeout = hook.get("timeout")
        output, in_time = _drain(pid, out_reader, time.monotonic() + timeout if timeout else None)
    finally:
        for fd in (fail_reader, out_reader, stdin_writer):
            if fd >= 0:
                os.close(fd)
    if not in_time:
        raise ContainerError(f"hook ran past specified timeout of {float(timeout or 0):.1f}s")
    code = os.waitstatus_to_exitcode(_wait(pid))
    if code != 0:
        how = f"exit status {code}" if code > 0 else f"signal: {signal.Signals(-code).name}"
        text = output.decode("utf-8", "replace")
        raise ContainerError(f"{how}, stdout: {text}, stderr: " if text else f"{how}, stdout: , stderr: ")


def _become(hook: dict[str, Any], stdin: int, out: int, fail: int) -> None:
    try:
        os.dup2(stdin, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sc.close_range(3, flags=sc.CLOSE_RANGE_CLOEXEC)
        os.set_inheritable(fail, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        args = hook.get("args") or [hook["path"]]
        sc.execve(hook["path"], args, list(hook.get("env") or ()))
    except OSError as error:
        os.write(fail, f"fork/exec {hook['path']}: {(error.strerror or '').lower()}".encode())
    finally:
        os._exit(127)


def _feed(fd: int, payload: bytes) -> None:
    """The state, and end of file. A hook need not read it; what it doesn't read in time is its own loss."""
    os.set_blocking(fd, False)
    signal_before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        while payload:
            try:
                payload = payload[os.write(fd, payload) :]
            except BlockingIOError:
                if not select.select([], [fd], [], 1.0)[1]:
                    break
            except BrokenPipeError:
                break
    finally:
        signal.signal(signal.SIGPIPE, signal_before)
        os.close(fd)


def _drain(pid: int, reader: int, deadline: float | None) -> tuple[bytes, bool]:
    """What the hook writes until it exits; (output, False) if it had to be killed at the deadline.

    A hook may leave a process behind that keeps the pipe open: the hook's own end counts, not the pipe's.
    """
    output = b""
    pidfd = os.pidfd_open(pid)
    try:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([reader, pidfd] if reader >= 0 else [pidfd], [], [], left)
            if reader in ready:
                chunk = os.read(reader, 65536)
                output = (output + chunk)[:_OUTPUT_LIMIT]
                reader = reader if chunk else -1
            elif pidfd in ready:
                return output, True
            if not ready:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return output, False
    finally:
        os.close(pidfd)


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0)[1]
