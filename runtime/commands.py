"""The bodies of the commands. Each takes the parsed flags and arguments and returns the exit code."""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os
import sys

from wherry.runtime import container
from wherry.runtime.errors import INVALID, NOT_FOUND, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry.runtime.log import Log

    Flags = dict[str, Any]


class Context:
    """What the global flags say."""

    def __init__(
        self, root: str, log: Log, *, systemd_cgroup: bool, rootless: bool = False, criu: str = "criu"
    ) -> None:
        self.root = os.path.abspath(root)
        self.criu = criu
        self.log = log
        self.systemd_cgroup = systemd_cgroup
        self.rootless = rootless


def run(command: str, context: Context, flags: Flags, arguments: list[str]) -> int:
    """Run a command of `options.COMMANDS`; errors get runc's prefixes, which callers print as they are."""
    try:
        return _BODIES[command](context, flags, arguments)
    except ContainerError as error:
        if command in ("create", "run"):
            error.message = f"wherry-runtime {command} failed: {error.message}"
        elif command == "exec":
            error.message = f"exec failed: {error.message}"
            error.exit_code = 255
        raise


def listening() -> int:
    """How many descriptors after 2 are sockets that systemd hands to this very process (sd_listen_fds(3))."""
    count = os.environ.get("LISTEN_FDS", "")
    return int(count) if count.isdigit() and os.environ.get("LISTEN_PID") == str(os.getpid()) else 0


def _told(process: dict[str, Any]) -> dict[str, Any]:
    """The process with what it has to know of those sockets; it is the first one in its pid namespace (runc's rule)."""
    env = [*(process.get("env") or ()), f"LISTEN_FDS={listening()}", "LISTEN_PID=1"]
    return {**process, "env": env}


def preserved(flags: Flags) -> int:
    """How many descriptors after 2 go on: those of socket activation, then `--preserve-fds`."""
    count = listening() + int(flags["preserve-fds"] or 0)
    for fd in range(3, 3 + count):
        try:
            os.fstat(fd)
        except OSError:
            raise ContainerError(f"preserve-fds: file descriptor {fd} is not open", INVALID) from None
    return count


def _request(context: Context, flags: Flags, container_id: str) -> container.CreateRequest:
    bundle = os.path.abspath(flags["bundle"] or ".")
    config = None
    if listening():
        from wherry.runtime import spec

        config = spec.load(bundle)
        config = {**config, "process": _told(config.get("process") or {})}
    return container.CreateRequest(
        context.root,
        container_id,
        bundle,
        spec=config,
        console_socket=os.path.abspath(flags["console-socket"]) if flags["console-socket"] else "",
        pid_file=os.path.abspath(flags["pid-file"]) if flags["pid-file"] else "",
        no_pivot=flags["no-pivot"],
        no_new_keyring=flags.get("no-new-keyring", False),
        preserve_fds=preserved(flags) if "preserve-fds" in flags else 0,
        systemd_cgroup=context.systemd_cgroup,
        notify="NOTIFY_SOCKET" in os.environ,
        rootless=context.rootless,
    )


def send_pidfd(path: str, pid: int) -> None:
    if path:
        from wherry.runtime import console

        fd = os.pidfd_open(pid)
        socket_fd = console.connect(os.path.abspath(path))
        console.send_master(socket_fd, fd, "pidfd")
        os.close(socket_fd)
        os.close(fd)


def _create(context: Context, flags: Flags, arguments: list[str]) -> int:
    pid = container.create(_request(context, flags, arguments[0]))
    send_pidfd(flags["pidfd-socket"], pid)
    return 0


def _run(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import foreground

    request = _request(context, flags, arguments[0])
    return foreground.run(request, detach=flags["detach"], keep=flags["keep"], pidfd_socket=flags["pidfd-socket"])


def _start(context: Context, flags: Flags, arguments: list[str]) -> int:
    container.start(context.root, arguments[0])
    return 0


def _state(context: Context, flags: Flags, arguments: list[str]) -> int:
    import json

    sys.stdout.write(json.dumps(container.state(context.root, arguments[0]), indent=2, ensure_ascii=False))
    return 0


def _list(context: Context, flags: Flags, arguments: list[str]) -> int:
    import json

    from wherry.runtime import state

    try:
        names = sorted(os.listdir(context.root))
    except FileNotFoundError:
        names = []
    rows = []
    for name in names:
        try:
            found = state.load(context.root, name)
        except ContainerError as error:
            if error.kind != NOT_FOUND:
                context.log.write("error", f"load container {name}: {error.message}")
            continue
        rows.append({**found.described(), "owner": found.owner or "root"})
    if flags["quiet"]:
        sys.stdout.write("".join(f"{row['id']}\n" for row in rows))
    elif flags["format"] == "json":
        sys.stdout.write(json.dumps(rows or None, separators=(",", ":")))
    elif flags["format"] in ("", "table"):
        keys = ("id", "pid", "status", "bundle", "created", "owner")
        _print_table([[key.upper() for key in keys], *([str(row[key]) for key in keys] for row in rows)])
    else:
        raise ContainerError("invalid format option")
    return 0


def _print_table(rows: list[list[str]]) -> None:
    """Columns at least 12 wide, as Go's tabwriter makes them for runc."""
    widths = [max(12, *(len(row[column]) + 3 for row in rows)) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        sys.stdout.write(cells + row[-1] + "\n")


def _ps(context: Context, flags: Flags, arguments: list[str]) -> int:
    pids = container.pids(context.root, arguments[0])
    if flags["format"] == "json":
        import json

        sys.stdout.write(json.dumps(pids))
        return 0
    if flags["format"] not in ("", "table"):
        raise ContainerError("invalid format option")
    import subprocess

    result = subprocess.run(["ps", *(arguments[1:] or ["-ef"])], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ContainerError(f"exit status {result.returncode}: {result.stderr.strip()}")
    lines = result.stdout.splitlines()
    header = lines[0].split()
    if "PID" not in header:
        raise ContainerError("couldn't find PID field in ps output")
    column = header.index("PID")
    wanted = {str(pid) for pid in pids}
    kept = [lines[0], *(line for line in lines[1:] if len(line.split()) > column and line.split()[column] in wanted)]
    sys.stdout.write("\n".join(kept) + "\n")
    return 0


def signal_number(name: str) -> int:
    """`9`, `KILL`, `SIGKILL`, `sigkill`; `RTMIN+3`."""
    import signal

    if name.isdigit():
        return int(name)
    upper = name.upper().removeprefix("SIG")
    try:
        return int(signal.Signals["SIG" + upper])
    except KeyError:
        pass
    base, plus, offset = upper.partition("+")
    if base == "RTMIN" and plus and offset.isdigit():
        return int(signal.SIGRTMIN) + int(offset)
    base, minus, offset = upper.partition("-")
    if base == "RTMAX" and minus and offset.isdigit():
        return int(signal.SIGRTMAX) - int(offset)
    raise ContainerError(f'unknown signal "{name}"', INVALID)


def _kill(context: Context, flags: Flags, arguments: list[str]) -> int:
    signal = signal_number(arguments[1]) if len(arguments) > 1 and arguments[1] else 15
    container.kill(context.root, arguments[0], signal, all=flags["all"])
    return 0


def _delete(context: Context, flags: Flags, arguments: list[str]) -> int:
    container.delete(context.root, arguments[0], force=flags["force"])
    return 0


def _exec(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import foreground, process_flags

    process = process_flags.build(context.root, flags, arguments)
    if listening():
        process = _told(process)
    request = container.ExecRequest(
        context.root,
        arguments[0],
        process,
        console_socket=os.path.abspath(flags["console-socket"]) if flags["console-socket"] else "",
        pid_file=os.path.abspath(flags["pid-file"]) if flags["pid-file"] else "",
        preserve_fds=preserved(flags),
        ignore_paused=flags["ignore-paused"],
        sub_cgroups=flags["cgroup"],
    )
    return foreground.exec_process(request, detach=flags["detach"], pidfd_socket=flags["pidfd-socket"])


def _pause(context: Context, flags: Flags, arguments: list[str]) -> int:
    container.pause(context.root, arguments[0])
    return 0


def _resume(context: Context, flags: Flags, arguments: list[str]) -> int:
    container.resume(context.root, arguments[0])
    return 0


def _update(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import process_flags

    wanted = process_flags.resources(flags)
    schemas = {"cache": flags["l3-cache-schema"], "bandwidth": flags["mem-bw-schema"]}
    container.update(context.root, arguments[0], wanted, **schemas)
    return 0


def _events(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import events

    return events.run(context.root, arguments[0], once=flags["stats"], interval=flags["interval"] or "5s")


def _checkpoint(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import checkpoint, checkpoint_flags

    checkpoint.checkpoint(context.root, arguments[0], checkpoint_flags.for_checkpoint(context.criu, flags))
    return 0


def _restore(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import checkpoint_flags, foreground

    request = _request(context, flags, arguments[0])
    request.notify = False  # who was waited for has said so before it was written
    return foreground.restore(request, checkpoint_flags.for_restore(context.criu, flags), detach=flags["detach"])


def _spec(context: Context, flags: Flags, arguments: list[str]) -> int:
    from wherry.runtime import default_spec

    default_spec.write(flags["bundle"] or ".", rootless=flags["rootless"])
    return 0


def _features(context: Context, flags: Flags, arguments: list[str]) -> int:
    import json

    from wherry.runtime import features

    sys.stdout.write(json.dumps(features.describe(), indent=4) + "\n")
    return 0


_BODIES: dict[str, Callable[[Context, Flags, list[str]], int]] = {
    "create": _create,
    "run": _run,
    "start": _start,
    "state": _state,
    "list": _list,
    "ps": _ps,
    "kill": _kill,
    "delete": _delete,
    "exec": _exec,
    "pause": _pause,
    "resume": _resume,
    "update": _update,
    "events": _events,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "spec": _spec,
    "features": _features,
}
