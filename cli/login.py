"""`wherry login` and `logout`: who you are to a registry, kept where docker, podman and skopeo keep it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.table import Command
from wherry.cli.terminal import is_terminal
from wherry.client.logins import check, erase, store
from wherry.core.errors import InvalidArgument, WherryError
from wherry.core.reference import DEFAULT_HOST

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def login(session: Session, args: argparse.Namespace) -> None:
    """Asks the registry whether the password is right, and keeps it."""
    host = args.server.removeprefix("https://").removeprefix("http://").partition("/")[0]
    if args.password and args.password_stdin:
        raise InvalidArgument("--password and --password-stdin can't be used together")
    user, password = args.username, args.password
    if args.password:
        sys.stderr.write("wherry: a password on the command line can be seen by others: --password-stdin is safer\n")
    if args.password_stdin:
        if not user:
            raise InvalidArgument("--password-stdin needs --username")
        password = sys.stdin.read().rstrip("\r\n")
    if not user or not password:
        if not is_terminal(0):
            raise InvalidArgument("no terminal to ask for a name and a password: use -u and --password-stdin")
        user, password = _ask(user, password)
    check(host, user, password, plain_http=args.plain_http)
    helper = store(host, user, password)
    if not helper:
        sys.stderr.write(
            "wherry: the password is kept unencrypted in docker's config.json; a credential helper is safer\n"
        )
    print("Login Succeeded")


def _ask(user: str, password: str) -> tuple[str, str]:
    if not user:
        sys.stderr.write("Username: ")
        sys.stderr.flush()
        user = sys.stdin.readline().strip()
    if not password:
        import getpass

        password = getpass.getpass("Password: ")
    if not user or not password:
        raise InvalidArgument("a name and a password are needed")
    return user, password


async def logout(session: Session, args: argparse.Namespace) -> None:
    """Forgets what `login` kept."""
    host = args.server.removeprefix("https://").removeprefix("http://").partition("/")[0]
    if not erase(host):
        raise WherryError(f"not logged in to {host}")
    print(f"Removing login credentials for {host}")


def _login_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-u", "--username", default="", metavar="NAME", help="who you are")
    parser.add_argument("-p", "--password", default="", metavar="PASSWORD", help="(others can see it)")
    parser.add_argument("--password-stdin", action="store_true", help="read the password from the input")
    parser.add_argument("--plain-http", action="store_true", help="HTTP without TLS")
    parser.add_argument(
        "server", nargs="?", default=DEFAULT_HOST, metavar="SERVER", help=f"the registry ({DEFAULT_HOST})"
    )


def _logout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "server", nargs="?", default=DEFAULT_HOST, metavar="SERVER", help=f"the registry ({DEFAULT_HOST})"
    )


COMMANDS = [
    Command(("login",), "log in to a registry", login, _login_options, "wherry login -u me registry.example"),
    Command(("logout",), "log out of a registry", logout, _logout_options, "wherry logout registry.example"),
]
