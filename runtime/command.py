"""The command `wherry-runtime`: runc's command line.

What isn't needed by every command is imported by the one that needs it. Before a container is made the process seals
its executable (`sealed.py`), which may start it anew: so that comes first.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import gc
import os
import sys

from wherry.runtime import options
from wherry.runtime.errors import ContainerError
from wherry.runtime.log import Log

DEFAULT_ROOT = "/run/wherry-runtime"

_ENTERING = ("create", "run", "exec", "restore")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are logged, never raised."""
    if argv is not None:
        return _main(argv)
    gc.disable()  # a short life: what it would free, exit frees
    _open_streams()
    code = _main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    # The interpreter's own end takes 2 ms to free what the kernel frees at once; there are no threads to wait for.
    os._exit(code)


def _open_streams() -> None:
    """A caller may have closed 0, 1 or 2, and then files of ours would take their place: the null device does."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # the lowest number that is free is this one
            os.set_inheritable(fd, True)
    if sys.stdout is None or sys.stderr is None:
        sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _main(words: list[str]) -> int:
    log = Log()
    try:
        flags, rest = options.parse(words, options.GLOBAL)
        log = Log(str(flags["log"] or ""), as_json=flags["log-format"] == "json", debug=bool(flags["debug"]))
        if flags["log-format"] not in ("", "text", "json"):
            raise ContainerError(f"invalid log-format: {flags['log-format']}")
        return _dispatch(flags, rest, log)
    except ContainerError as error:
        log.error("\n".join([error.message, *getattr(error, "__notes__", ())]))
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:
        log.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except Exception as error:  # a caller reads the log, not a traceback; `--debug` shows it
        if log.debug_enabled:
            raise
        log.write("error", f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _dispatch(flags: dict[str, object], rest: list[str], log: Log) -> int:
    if flags["version"]:
        _print_version()
        return 0
    command = rest[0] if rest else "help"
    if flags["help"] or command in ("help", "h"):
        topic = rest[1] if len(rest) > 1 and rest[1] in options.COMMANDS else ""
        sys.stdout.write(options.help_text(topic))
        return 0
    if command not in options.COMMANDS:
        log.write("error", f"No help topic for '{command}'")
        return 3
    table, fewest, most, _ = options.COMMANDS[command]
    given, arguments = options.parse(rest[1:], {**table, "help": (options.BOOL, "h", "show help")})
    if given["help"]:
        sys.stdout.write(options.help_text(command))
        return 0
    _check_count(command, len(arguments), fewest, most)
    if command in _ENTERING:
        from wherry.runtime import sealed

        if os.geteuid() == 0:
            sealed.ensure_sealed()
    from wherry.runtime import commands

    root = str(flags["root"] or "") or _default_root()
    log.write("debug", f"{command} {' '.join(arguments)}: state in {root}, process {os.getpid()}")
    context = commands.Context(
        root,
        log,
        systemd_cgroup=bool(flags["systemd-cgroup"]),
        rootless=flags["rootless"] == "true",
        criu=str(flags["criu"] or "criu"),
    )
    code = commands.run(command, context, given, arguments)
    log.write("debug", f"{command}: exit code {code}")
    return code


def _check_count(command: str, count: int, fewest: int, most: int) -> None:
    if fewest <= count <= most or (most < 0 and count >= fewest):
        return
    wanted = f"a minimum of {fewest}" if count < fewest else f"a maximum of {most}"
    raise ContainerError(
        f'wherry-runtime: "{command}" requires {f"exactly {most}" if fewest == most else wanted} argument(s)'
    )


def _default_root() -> str:
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return f"{folder}/wherry-runtime" if os.geteuid() and folder else DEFAULT_ROOT


def _print_version() -> None:
    from importlib import metadata

    from wherry.runtime.spec import SPEC_VERSION

    try:
        version = metadata.version("wherry")
    except metadata.PackageNotFoundError:
        version = "unknown"
    sys.stdout.write(f"wherry-runtime version {version}\nspec: {SPEC_VERSION}\n")


if __name__ == "__main__":
    sys.exit(main())
