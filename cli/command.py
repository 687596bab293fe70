"""The command `wherry`: finds the command that was asked for, loads only that, runs it, says what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from wherry.cli import startup
from wherry.core.errors import WherryError
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.cli.table import Command


class Group(NamedTuple):
    """A noun of the command line, or a verb that stands alone (`single`); its module is loaded when it is used.

    `bare` is the verb that a noun without one means (`wherry images` lists them), in a module of its own.
    """

    names: tuple[str, ...]
    module: str
    help: str
    single: bool = False
    bare: str = ""
    hidden: bool = False


def _verb(name: str, module: str, help: str) -> Group:  # noqa: A002 - as the field is called
    return Group((name,), module, help, single=True)


EVERYDAY = (
    _verb("run", "run", "run a command in a new container"),
    _verb("create", "run", "make a container without starting it"),
    _verb("start", "lifecycle", "start containers that were created or have ended"),
    _verb("stop", "lifecycle", "stop containers"),
    _verb("restart", "lifecycle", "stop and start containers"),
    _verb("kill", "lifecycle", "send a signal to containers"),
    _verb("rm", "lifecycle", "remove containers"),
    _verb("ps", "ps", "list containers"),
    _verb("inspect", "inspect", "show everything about a container, image, volume or network"),
    _verb("stats", "stats", "show what containers use, live"),
    _verb("top", "stats", "list the processes of a container"),
    _verb("port", "stats", "list the ports that a container publishes"),
    _verb("cp", "cp", "copy files between a container and this host"),
    _verb("diff", "cp", "list what a container changed in its files"),
    _verb("commit", "commit", "make an image of a container's files"),
    _verb("export", "cp", "write a container's file system as a tar archive"),
    _verb("exec", "exec", "run a further process in a container"),
    _verb("attach", "exec", "follow a container that runs"),
    _verb("logs", "logs", "show what a container wrote"),
    _verb("pause", "lifecycle", "freeze containers"),
    _verb("unpause", "lifecycle", "let paused containers go on"),
    _verb("wait", "lifecycle", "wait for containers to end"),
    _verb("update", "update", "change limits of containers"),
    _verb("rename", "lifecycle", "give a container another name"),
)
IMAGES = (
    _verb("pull", "pull", "bring an image from a registry"),
    _verb("push", "push", "bring an image to a registry"),
    Group(
        ("images", "image", "i"), "images", "list images; with a verb: import, export, mount …", bare="docker_images"
    ),
    _verb("tag", "docker_images", "give an image a further name"),
    _verb("rmi", "docker_images", "remove images"),
    _verb("history", "docker_images", "show how an image was built"),
    _verb("save", "docker_images", "write images as an archive"),
    _verb("load", "docker_images", "read images from an archive"),
    _verb("login", "login", "log in to a registry"),
    _verb("logout", "login", "log out of a registry"),
)
GROUPED = (
    Group(("tasks", "task", "t"), "tasks", "containers that run: start, exec, kill, attach, metrics …"),
    Group(("containers", "container", "c"), "containers", "containers as records: run, create, list, remove …"),
    Group(("network", "networks", "net"), "network", "networks of containers", bare="network"),
    Group(("volume", "volumes"), "volume", "folders that outlive containers", bare="volume"),
    Group(("content",), "content", "blobs of the content store"),
    Group(("snapshots", "snapshot"), "snapshots", "file systems of images and containers"),
    Group(("namespaces", "namespace", "ns"), "namespaces", "the daemon's tenants"),
    Group(("leases",), "leases", "what the garbage collector spares"),
    Group(("plugins", "plugin"), "plugins", "the parts of the daemon"),
    Group(("oci",), "oci", "tools for OCI specifications"),
    Group(("generate",), "generate", "units of systemd for containers"),
)
DAEMON = (
    _verb("info", "system", "show what the daemon is and has"),
    Group(("system",), "system", "disk usage, clean-up"),
    Group(("events", "event"), "events", "show what happens as it happens", single=True),
    _verb("trace", "trace", "show what the engine does for a command, call by call"),
    _verb("completion", "completion", "print a script that completes this command"),
    _verb("man", "man", "print a manual page"),
    _verb("version", "version", "versions of client and daemon"),
    _verb("gc", "gc", "remove what nothing references, or say what keeps a thing"),
    _verb("doctor", "doctor", "check what this host allows, and say what to do"),
    _verb("unshare", "unshare", "run a command in the namespaces of a user's containers"),
)
HIDDEN = (Group(("__complete",), "completion", "for the scripts of shells", single=True, hidden=True),)
GROUPS = (*EVERYDAY, *IMAGES, *DAEMON, *GROUPED, *HIDDEN)

HELP = """usage: wherry [GLOBAL OPTION]... COMMAND [OPTION]...

Runs containers. The verbs are those of docker, the nouns below them those of containerd's ctr; the daemon may be
wherryd or containerd.

containers:
{everyday}

images:
{images}

the daemon:
{daemon}

nouns, with verbs of their own:
{grouped}

global options:
  -a, --address PATH       the daemon's socket (WHERRY_ADDRESS, CONTAINERD_ADDRESS; {address})
  -n, --namespace NAME     the namespace to work in (WHERRY_NAMESPACE, CONTAINERD_NAMESPACE; default)
  --timeout DURATION       give up after this time (30s, 5m)
  --connect-timeout DURATION
                           give up when nobody answers after this time (10s)
  --embedded               start a daemon of your own for this command, and stop it afterwards
  --root DIR, --state DIR  folders of that daemon
  --debug                  show where an error comes from
  -v, --version            print the version
  -h, --help               print this; 'wherry COMMAND --help' explains a command

examples:
  wherry run --rm -it alpine
  wherry run -d --name web -p 8080:80 --restart always nginx
  wherry ps -a --filter status=exited --format '{{{{.Names}}}}: {{{{.Status}}}}'
  wherry exec -it web sh
  wherry rm -f web
"""


class Usage(Exception):
    """The command line can't be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit codes: 2 for wrong usage, else what the command says; 1 for its errors."""
    program = argv is None
    if program:
        startup.prepare()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # who read our output has enough of it (`wherry ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except KeyboardInterrupt:
        code = 130
    if program:
        # taking the interpreter apart takes longer than many a command; nothing here needs it
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: list[str]) -> int:
    try:
        session, rest = _globals(argv)
        if session is None:
            return 0
        found = _find(rest)
    except Usage as error:
        sys.stderr.write(f"wherry: {error}\n")
        return 2
    if found is None:
        return 0
    command, prog, rest = found
    return _run(session, command, prog, rest)


def _run(session: Session, command: Command, prog: str, rest: list[str]) -> int:
    from wherry.cli.table import parser_for
    from wherry.client.blocking import drive

    async def work() -> int:
        args = parser_for(command, prog).parse_args(rest)
        try:
            return await command.run(session, args) or 0
        finally:
            await session.close()

    try:
        return drive(work())
    except WherryError as error:
        if session.debug:
            raise
        from wherry.cli.saying import complain

        complain(error)
        code = getattr(error, "exit_code", 1)
        return int(code)
    except BrokenPipeError:
        raise
    except OSError as error:
        if session.debug:
            raise
        sys.stderr.write(f"wherry: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}\n")
        return 1


def _globals(argv: list[str]) -> tuple[Session | None, list[str]]:
    """The session that the options before the command make, and what follows them; None when they said it all."""
    from wherry.cli.session import Session

    session = Session()
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if option in {"-h", "--help"}:
            sys.stdout.write(_help())
            return None, []
        if option in {"-v", "--version"}:
            from wherry.cli.version import VERSION

            sys.stdout.write(f"wherry {VERSION}\n")
            return None, []
        if option in {"--debug", "--embedded"}:
            setattr(session, option[2:], True)
            continue
        if option not in _VALUES:
            raise Usage(f"unknown option {option} (see 'wherry --help')")
        if not equals:
            if not rest:
                raise Usage(f"option {option} needs a value")
            value = rest.pop(0)
        _assign(session, _VALUES[option], value)
    return session, rest


_VALUES = {
    "-a": "address",
    "--address": "address",
    "-n": "namespace",
    "--namespace": "namespace",
    "--timeout": "timeout",
    "--connect-timeout": "connect_timeout",
    "--root": "root",
    "--state": "state",
}


def _assign(session: Session, name: str, value: str) -> None:
    if name not in {"timeout", "connect_timeout"}:
        setattr(session, name, value.removeprefix("unix://") if name == "address" else value)
        return
    import argparse

    from wherry.cli.arguments import duration

    try:
        setattr(session, name, duration(value))
    except argparse.ArgumentTypeError as error:
        raise Usage(f"--{name.replace('_', '-')}: {error}") from None


def _find(rest: list[str]) -> tuple[Command, str, list[str]] | None:
    """The command, what was typed to reach it, and its own arguments; None when help was all that was wanted."""
    if not rest or rest == ["help"]:
        sys.stdout.write(_help())
        return None
    name, rest = rest[0], rest[1:]
    if name == "help":
        return _find([*rest, "--help"])
    group = next((group for group in GROUPS if name in group.names), None)
    if group is None:
        raise Usage(f"unknown command {name!r}: {_ELSEWHERE.get(name) or _close(name)}")
    from wherry.cli.table import find, overview

    prog = f"wherry {name}"
    if _is_bare(name, group, rest):
        return import_module(f"wherry.cli.{group.bare}").COMMANDS[0], prog, rest
    commands: Sequence[Command] = import_module(f"wherry.cli.{group.module}").COMMANDS
    if group.single:
        return find(commands, name) or commands[0], prog, rest
    if not rest or rest[0] in _HELPS:
        sys.stdout.write(overview(prog, group.help, commands) + "\n")
        return None
    command = _dockers(name, rest) or find(commands, rest[0])
    if command is None:
        raise Usage(f"unknown command {rest[0]!r} of 'wherry {name}' (see 'wherry {name} --help')")
    return command, f"{prog} {rest[0]}", rest[1:]


# what people know from docker and podman, and who does it here
_ELSEWHERE = {
    "build": "images are built by others ('buildah build', 'podman build'); 'wherry load' reads what they write",
    "buildx": "images are built by others ('buildah build', 'podman build'); 'wherry load' reads what they write",
    "compose": "there is none; 'wherry generate unit' makes units of systemd, .container files (Quadlet) are read, too",
    "search": "registries have no common search; 'wherry images tags NAME' lists a repository's tags",
    "import": "'wherry load' reads archives of images, and 'wherry run --rootfs' runs a folder",
    "machine": "there is none: containers run on this host",
    "swarm": "there is none: one host is all that is looked after",
    "service": "there is none: one host is all that is looked after",
    "stack": "there is none: one host is all that is looked after",
    "secret": "there is none; files are given by '-v FILE:/run/secrets/NAME:ro'",
    "context": "there is none: daemons are named by --address or WHERRY_ADDRESS",
    "healthcheck": "checks are run by the daemon: 'wherry run --health-cmd'; 'wherry inspect' shows what they found",
    "checkpoint": "'wherry tasks checkpoint' makes one",
}


def _close(name: str) -> str:
    import difflib

    known = [item for group in GROUPS if not group.hidden for item in group.names if len(item) > 1]
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean 'wherry {found[0]}'?" if found else "see 'wherry --help'"


_HELPS = frozenset({"-h", "--help", "help"})


# docker's nouns are in the singular, ctr's in the plural; where both have a verb, the noun that was typed says whose
_DOCKERS = {
    "container": {"ls": "ps", "list": "ps", "ps": "ps"},
    "image": {"ls": "images", "list": "images", "rm": "rmi", "history": "history", "save": "save", "load": "load"},
}


def _dockers(name: str, rest: list[str]) -> Command | None:
    """docker's verb below one of its nouns (`container ls`); None for what ctr's noun has to know."""
    from wherry.cli.table import find

    verbs = _DOCKERS.get(name)
    if verbs is None:
        return None
    own = {group.names[0]: group for group in EVERYDAY} if name == "container" else {}
    verb = verbs.get(rest[0]) or (rest[0] if rest[0] in own else "")
    module = next((group.module for group in (*EVERYDAY, *IMAGES) if verb in group.names and group.single), "")
    if verb == "images":
        module = "docker_images"
    if name == "image" and rest[0] == "inspect":
        from wherry.cli.inspect import command

        return command("image")
    return find(import_module(f"wherry.cli.{module}").COMMANDS, verb) if module else None


def _is_bare(name: str, group: Group, rest: list[str]) -> bool:
    """Whether a noun stands without a verb: `images`, `images -q`, `images alpine`."""
    if not group.bare or name != group.names[0]:
        return False
    if not rest or rest[0].startswith("-"):
        return not rest or rest[0] not in _HELPS
    from wherry.cli.table import find

    return rest[0] != "help" and find(import_module(f"wherry.cli.{group.module}").COMMANDS, rest[0]) is None


def _help() -> str:
    from wherry.core import places

    def section(groups: Sequence[Group]) -> str:
        return "\n".join(f"  {', '.join(group.names):<30} {group.help}" for group in groups)

    return HELP.format(
        everyday=section(EVERYDAY),
        images=section(IMAGES),
        daemon=section(DAEMON),
        grouped=section(GROUPED),
        address=places.address(),
    )


if __name__ == "__main__":
    sys.exit(main())
