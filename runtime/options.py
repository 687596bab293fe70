"""The command line's flags in runc's spelling (Go's: `-flag`, `--flag`, `--flag=value`; the first word ends them).

`argparse` costs 10 ms to import, half of what a whole `runc run` takes; what runc's syntax needs is here in one page.
"""

from __future__ import annotations

from wherry.runtime.errors import INVALID, ContainerError

BOOL, STRING, INT, LIST = "bool", "string", "int", "list"

Table = dict[str, tuple[str, str, str]]
"""flag → (kind, one-letter name or "", help)."""

GLOBAL: Table = {
    "debug": (BOOL, "", "enable debug logging"),
    "log": (STRING, "", "set the log file to write logs to (default: stderr)"),
    "log-format": (STRING, "", "set the log format: 'text' (default) or 'json'"),
    "root": (STRING, "", "root directory for storage of container state (default: /run/wherry-runtime)"),
    "criu": (STRING, "", "path to the criu binary (default: criu)"),
    "systemd-cgroup": (BOOL, "", 'cgroupsPath has the form "slice:prefix:name"'),
    "rootless": (STRING, "", "ignore cgroup permission errors ('true', 'false' or 'auto')"),
    "help": (BOOL, "h", "show help"),
    "version": (BOOL, "v", "print the version"),
}

_CREATE: Table = {
    "bundle": (STRING, "b", "path to the root of the bundle directory, defaults to the current directory"),
    "console-socket": (STRING, "", "path of a unix socket which will receive the master end of the terminal"),
    "pidfd-socket": (STRING, "", "path of a unix socket which will receive init's pidfd"),
    "pid-file": (STRING, "", "specify the file to write the process id to"),
    "no-pivot": (BOOL, "", "do not use pivot root to jail the process inside rootfs (for a rootfs on a ramdisk)"),
    "no-new-keyring": (BOOL, "", "do not create a new session keyring for the container"),
    "preserve-fds": (INT, "", "pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N)"),
}

_CRIU: Table = {
    "image-path": (STRING, "", "path of criu's image files (default: ./checkpoint)"),
    "work-path": (STRING, "", "path for criu's work files and logs"),
    "tcp-established": (BOOL, "", "allow open tcp connections"),
    "ext-unix-sk": (BOOL, "", "allow external unix sockets"),
    "shell-job": (BOOL, "", "allow shell jobs"),
    "lazy-pages": (BOOL, "", "use userfaultfd to lazily restore memory pages"),
    "file-locks": (BOOL, "", "handle file locks"),
    "manage-cgroups-mode": (STRING, "", "cgroups mode: soft, full, strict or ignore"),
    "empty-ns": (LIST, "", "create a namespace, but don't restore its properties (network)"),
    "auto-dedup": (BOOL, "", "enable auto deduplication of memory images"),
}

COMMANDS: dict[str, tuple[Table, int, int, str]] = {
    # name: (flags, fewest arguments, most arguments (-1: any number), help)
    "create": (_CREATE, 1, 1, "create a container"),
    "run": (
        {
            **_CREATE,
            "detach": (BOOL, "d", "detach from the container's process"),
            "keep": (BOOL, "", "do not delete the container after it exits"),
            "no-subreaper": (BOOL, "", "do not adopt the container's orphans"),
        },
        1,
        1,
        "create and run a container",
    ),
    "start": ({}, 1, 1, "executes the user defined process in a created container"),
    "state": ({}, 1, 1, "output the state of a container"),
    "list": (
        {
            "format": (STRING, "f", "select one of: table or json"),
            "quiet": (BOOL, "q", "display only container IDs"),
        },
        0,
        0,
        "lists containers with the given root",
    ),
    "ps": ({"format": (STRING, "f", "select one of: table or json")}, 1, -1, "displays the processes of a container"),
    "kill": (
        {"all": (BOOL, "a", "send the signal to all processes inside the container")},
        1,
        2,
        "sends a signal (default: SIGTERM) to the container's init process",
    ),
    "delete": (
        {"force": (BOOL, "f", "forcibly delete the container if it is still running (uses SIGKILL)")},
        1,
        1,
        "delete any resources held by the container",
    ),
    "exec": (
        {
            "console-socket": (STRING, "", "path of a unix socket which will receive the master end of the terminal"),
            "pidfd-socket": (STRING, "", "path of a unix socket which will receive the process's pidfd"),
            "cwd": (STRING, "", "current working directory in the container"),
            "env": (LIST, "e", "set environment variables"),
            "tty": (BOOL, "t", "allocate a pseudo-TTY"),
            "user": (STRING, "u", "UID (format: <uid>[:<gid>])"),
            "additional-gids": (LIST, "g", "additional gids"),
            "process": (STRING, "p", "path to the process.json"),
            "detach": (BOOL, "d", "detach from the container's process"),
            "pid-file": (STRING, "", "specify the file to write the process id to"),
            "process-label": (STRING, "", "set the SELinux label of the process"),
            "apparmor": (STRING, "", "set the AppArmor profile of the process"),
            "no-new-privs": (BOOL, "", "set the no new privileges value for the process"),
            "cap": (LIST, "c", "add a capability to the bounding set of the process"),
            "preserve-fds": (INT, "", "pass N additional file descriptors to the process"),
            "cgroup": (LIST, "", "run the process in an existing sub-cgroup, [<controller>:]<cgroup>"),
            "ignore-paused": (BOOL, "", "allow exec in a paused container"),
        },
        1,
        -1,
        "execute a new process inside the container",
    ),
    "pause": ({}, 1, 1, "suspends all processes inside the container"),
    "resume": ({}, 1, 1, "resumes all processes that have been paused"),
    "update": (
        {
            "resources": (STRING, "r", "file with the resources to update, or '-' for the standard input"),
            "blkio-weight": (INT, "", "cgroup weight, from 10 to 1000"),
            "cpu-period": (INT, "", "CFS period in µs"),
            "cpu-quota": (INT, "", "CFS quota in µs"),
            "cpu-burst": (INT, "", "CFS burst in µs"),
            "cpu-share": (INT, "", "CPU shares (relative weight)"),
            "cpu-rt-period": (INT, "", "realtime period in µs"),
            "cpu-rt-runtime": (INT, "", "realtime runtime in µs"),
            "cpu-idle": (INT, "", "1: SCHED_IDLE for the cgroup"),
            "cpuset-cpus": (STRING, "", "CPU(s) to use"),
            "cpuset-mems": (STRING, "", "memory node(s) to use"),
            "memory": (STRING, "", "memory limit in bytes"),
            "memory-reservation": (STRING, "", "soft limit in bytes"),
            "memory-swap": (STRING, "", "memory + swap in bytes; -1: unlimited"),
            "kernel-memory": (STRING, "", "obsolete, ignored"),
            "kernel-memory-tcp": (STRING, "", "obsolete, ignored"),
            "pids-limit": (INT, "", "most processes in the container"),
            "l3-cache-schema": (STRING, "", "Intel RDT/CAT schema"),
            "mem-bw-schema": (STRING, "", "Intel RDT/MBA schema"),
        },
        1,
        1,
        "update container resource constraints",
    ),
    "events": (
        {
            "interval": (STRING, "", "set the stats collection interval (default: 5s)"),
            "stats": (BOOL, "", "display the container's stats then exit"),
        },
        1,
        1,
        "display container events such as OOM notifications and resource usage",
    ),
    "checkpoint": (
        {
            **_CRIU,
            "parent-path": (STRING, "", "path of the previous images, relative to --image-path"),
            "leave-running": (BOOL, "", "leave the container running"),
            "pre-dump": (BOOL, "", "dump memory only, and leave the container running"),
            "page-server": (STRING, "", "ADDRESS:PORT of the page server"),
            "status-fd": (INT, "", "criu writes \\0 to this descriptor once lazy-pages is ready"),
        },
        1,
        1,
        "checkpoint a running container",
    ),
    "restore": (
        {
            **_CRIU,
            "bundle": _CREATE["bundle"],
            "console-socket": _CREATE["console-socket"],
            "pid-file": _CREATE["pid-file"],
            "no-pivot": _CREATE["no-pivot"],
            "detach": (BOOL, "d", "detach from the container's process"),
            "no-subreaper": (BOOL, "", "do not adopt the container's orphans"),
            "lsm-profile": (STRING, "", "security profile to restore with, TYPE:NAME"),
            "lsm-mount-context": (STRING, "", "security context of the restored mounts"),
        },
        1,
        1,
        "restore a container from a checkpoint",
    ),
    "spec": (
        {
            "bundle": (STRING, "b", "path to the root of the bundle directory"),
            "rootless": (BOOL, "", "generate a configuration for a rootless container"),
        },
        0,
        0,
        "create a new specification file",
    ),
    "features": ({}, 0, 0, "show the enabled features"),
}


def parse(words: list[str], table: Table) -> tuple[dict[str, object], list[str]]:
    """Flags up to the first word that is none (or `--`), and the words after them.

    Every flag of the table is in the result: False, "", None (an int that isn't given) or [].
    """
    values: dict[str, object] = {
        name: {BOOL: False, STRING: "", INT: None, LIST: []}[kind] for name, (kind, _, _) in table.items()
    }
    short = {letter: name for name, (_, letter, _) in table.items() if letter}
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return values, words[position + 1 :]
        if not word.startswith("-") or word == "-":
            break
        position += 1
        name, equals, value = word.lstrip("-").partition("=")
        name = short.get(name, name)
        if name not in table:
            raise ContainerError(f"flag provided but not defined: -{name}", INVALID)
        kind = table[name][0]
        if kind == BOOL:
            values[name] = value.lower() in ("1", "t", "true") if equals else True
            continue
        if not equals:
            if position >= len(words):
                raise ContainerError(f"flag needs an argument: -{name}", INVALID)
            value = words[position]
            position += 1
        _set(values, name, kind, value)
    return values, words[position:]


def _set(values: dict[str, object], name: str, kind: str, value: str) -> None:
    if kind == INT:
        try:
            values[name] = int(value, 0)
        except ValueError:
            raise ContainerError(f'invalid value "{value}" for flag -{name}: parse error', INVALID) from None
    elif kind == LIST:
        given = values[name]
        values[name] = [*given, value] if isinstance(given, list) else [value]
    else:
        values[name] = value


def help_text(command: str = "") -> str:
    """The page for `--help`."""
    name = "wherry-runtime"
    if not command:
        lines = [
            f"{name}: runs containers as the OCI runtime specification says, with runc's command line",
            "",
            f"Usage: {name} [global options] COMMAND [options] [arguments]",
            "",
            "Commands:",
            *(f"   {cmd:<10} {entry[3]}" for cmd, entry in COMMANDS.items()),
            "",
            "Global options:",
        ]
        return "\n".join([*lines, *_flags(GLOBAL)]) + "\n"
    table, fewest, most, about = COMMANDS[command]
    words = " <container-id>" if fewest else ""
    words += {"kill": " [signal]", "ps": " [ps options]", "exec": " <command> [args]"}.get(command, "")
    del most
    return (
        "\n".join([f"{name} {command}: {about}", "", f"Usage: {name} {command} [options]{words}", "", *_flags(table)])
        + "\n"
    )


def _flags(table: Table) -> list[str]:
    rows = []
    for name, (kind, letter, about) in table.items():
        shown = f"--{name}" + ("" if kind == BOOL else " value") + (f", -{letter}" if letter else "")
        rows.append(f"   {shown:<32} {about}")
    return rows
