"""`wherryd systemd install`: the units, with the absolute paths of the environment that it is run from."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

_UNITS = ("wherryd.service", "wherryd.socket")
_DEFAULT_FOLDER = "/etc/systemd/system"
#: Where systemd looks for generators of an administrator (systemd.generator(7)); ours reads quadlet files.
_GENERATORS = {
    "/etc/systemd/system-generators": "wherry-system-generator",
    "/etc/systemd/user-generators": "wherry-user-generator",
}
_DEFAULT_ADDRESS = "/run/wherry/wherryd.sock"
_USERS_ADDRESS = "%t/wherry/wherryd.sock"  # %t is XDG_RUNTIME_DIR
#: Lines of the service that a user's manager may not obey.
_SYSTEMS_ALONE = ("ExecStartPre=", "OOMScoreAdjust=", "Limit", "# shims inherit")
#: systemd makes this folder; without it another init runs the machine (sd_booted(3)).
_BOOTED = "/run/systemd/system"
_SYSTEMCTL_SECONDS = 90  # systemd's own time limit for a start

_DESCRIPTION = """\
Write wherryd.service and wherryd.socket, with the absolute paths of the environment that this command is run from, and
tell systemd about them. What follows "--" is given to the daemon: wherryd systemd install -- --log-level debug"""


class InstallError(Exception):
    """Why the units can't be installed, in words for the user."""


def install(argv: Sequence[str]) -> int:
    """Run the command with its arguments; the exit code is 0, or 1 with the reason on stderr, or 2 for a wrong use."""
    own, flags = _split(list(argv))
    options = _parser().parse_args(own)
    options.dir = options.dir or (_users_folder() if options.user else _DEFAULT_FOLDER)
    try:
        if options.generators:
            _install_generators(options.generators, remove=options.remove)
        elif options.remove:
            _remove(options.dir, user=options.user)
        else:
            _install(options, flags)
    except (InstallError, OSError) as error:
        print(f"wherryd systemd install: {error}", file=sys.stderr)
        return 1
    return 0


def units(flags: Sequence[str] = (), *, user: bool = False) -> dict[str, str]:
    """The text of each unit by its name. `flags`: what the daemon is started with; `user`: by a user's manager.

    Raises InstallError where this environment has no wherryd.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    values = {
        "@WHERRYD@": " ".join(_quote(word) for word in [*_wherryd(), *flags]),
        "@MODPROBE@": shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin") or "/sbin/modprobe",
        "@ADDRESS@": _address(flags, user=user),
    }
    texts: dict[str, str] = {}
    for name in _UNITS:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            text = file.read()
        text = _for_user(text) if user else text
        for mark, value in values.items():
            text = text.replace(mark, value)
        texts[name] = text
    return texts


def _for_user(text: str) -> str:
    """A unit without what only the system's manager may do, wanted by the target that a user's manager reaches."""
    lines = [line for line in text.splitlines() if not line.startswith(_SYSTEMS_ALONE)]
    wanted = "\n".join(lines).replace("WantedBy=multi-user.target", "WantedBy=default.target")
    wanted = wanted.replace("SocketMode=0660", "SocketMode=0600").replace("DirectoryMode=0711", "DirectoryMode=0700")
    return wanted.replace("After=network.target local-fs.target dbus.service", "After=dbus.socket") + "\n"


def _users_folder() -> str:
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "systemd", "user")


def _install_generators(base: str, *, remove: bool) -> None:
    """Write (or remove) the programs that turn quadlet files into services."""
    for folder, name in _GENERATORS.items():
        path = os.path.join(base, folder.lstrip("/"), name)
        if remove:
            if os.path.lexists(path):
                os.unlink(path)
                print(f"removed {path}")
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        call = "import sys; from wherry.systemd.quadlet import main; sys.exit(main(sys.argv[1:]))"
        flag = " --user" if "user" in name else ""
        _write(path, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -c {shlex.quote(call)}{flag} "$@"\n', 0o755)
        print(f"wrote {path}")
    if os.path.isdir(_BOOTED) and base == "/":
        _systemctl("daemon-reload")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    position = argv.index("--")
    return argv[:position], argv[position + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wherryd systemd install",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dir", metavar="FOLDER", default="", help=f"where to ({_DEFAULT_FOLDER}, or the user's)")
    parser.add_argument("--user", action="store_true", help="units for the service manager of the user who calls")
    parser.add_argument(
        "--generators",
        metavar="FOLDER",
        nargs="?",
        const="/",
        help="generators for *.container files too (below FOLDER)",
    )
    parser.add_argument("--enable", action="store_true", help="start it at each boot")
    parser.add_argument("--now", action="store_true", help="start it now too (means --enable)")
    parser.add_argument("--socket", action="store_true", help="enable the socket: the first client starts the daemon")
    parser.add_argument("--remove", action="store_true", help="stop and disable the daemon and remove the units")
    parser.add_argument("--print", action="store_true", help="only print the units")
    return parser


def _install(options: argparse.Namespace, flags: list[str]) -> None:
    texts = units(flags, user=options.user)
    if options.print:
        for name, text in texts.items():
            print(f"# {os.path.join(options.dir, name)}\n{text}")
        return
    if (options.enable or options.now) and not os.path.isdir(_BOOTED):
        msg = "systemd doesn't run this machine; leave out --enable and --now to only write the units"
        raise InstallError(msg)
    os.makedirs(options.dir, exist_ok=True)
    for name, text in texts.items():
        _write(os.path.join(options.dir, name), text)
        print(f"wrote {os.path.join(options.dir, name)}")
    if not os.path.isdir(_BOOTED):
        return
    manager = ["--user"] if options.user else []
    _systemctl(*manager, "daemon-reload")
    started = "wherryd.socket" if options.socket else "wherryd.service"
    if options.enable or options.now:
        _systemctl(*manager, "enable", *(["--now"] if options.now else []), started)
        print(f"{started} is enabled{' and started' if options.now else ''}")


def _remove(folder: str, *, user: bool) -> None:
    manager = ["--user"] if user else []
    present = [name for name in _UNITS if os.path.lexists(os.path.join(folder, name))]
    if present and os.path.isdir(_BOOTED):
        _systemctl(*manager, "disable", "--now", *reversed(present))
    for name in present:
        os.unlink(os.path.join(folder, name))
        print(f"removed {os.path.join(folder, name)}")
    if present and os.path.isdir(_BOOTED):
        _systemctl(*manager, "daemon-reload")


def _write(path: str, text: str, mode: int = 0o644) -> None:
    """Replace the file in one step: systemd may read it at any moment."""
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    os.replace(temporary, path)


def _systemctl(*arguments: str) -> None:
    command = ["systemctl", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SYSTEMCTL_SECONDS)
    if done.returncode:
        msg = f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}"
        raise InstallError(msg)


def _wherryd() -> list[str]:
    """The command of this environment: the script beside the interpreter, or the module where scripts lie elsewhere."""
    script = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "wherryd")
    if os.access(script, os.X_OK):
        return [script]
    called = os.path.abspath(sys.argv[0])
    if os.path.basename(called) == "wherryd" and os.access(called, os.X_OK):
        return [called]
    if not sys.executable:
        msg = "can't find the Python interpreter that runs this"
        raise InstallError(msg)
    return [os.path.abspath(sys.executable), "-I", "-m", "wherry.daemon"]


def _address(flags: Sequence[str], *, user: bool = False) -> str:
    """Where the socket unit listens, as a unit writes it: the daemon's --address, else its default."""
    address = ""
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in {"--address", "-a"}:
            address = value if equals else "".join(flags[index + 1 : index + 2])
    if not address and not any(flag.partition("=")[0] in {"--address", "-a"} for flag in flags):
        return _USERS_ADDRESS if user else _DEFAULT_ADDRESS
    if not address.startswith("/"):
        msg = f"the address {address!r} is not an absolute path"
        raise InstallError(msg)
    return _specifiers(address)


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quote(word: str) -> str:
    """A word of ExecStart=, quoted and escaped as systemd.service(5) reads it."""
    if any(ord(character) < 32 for character in word):
        msg = f"{word!r} can't stand in a unit"
        raise InstallError(msg)
    escaped = _specifiers(word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$"))
    return f'"{escaped}"' if any(character in escaped for character in " ;'\"\\") else escaped
