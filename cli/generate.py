"""`wherry generate unit`: a systemd unit for a container that is there."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING

from wherry.cli.table import Command
from wherry.client.finding import find, name_of
from wherry.core import places

if TYPE_CHECKING:
    from wherry.cli.session import Session

UNIT = """\
# made by 'wherry generate unit {name}'
[Unit]
Description=Container {name}
{needs}
[Service]
Type=exec
KillMode=mixed
SyslogIdentifier=%N
Restart={restart}
TimeoutStopSec={stop}
ExecStart={wherry} start --attach {name}
ExecStop={wherry} stop {name}

[Install]
WantedBy={target}
"""


async def unit(session: Session, args: argparse.Namespace) -> None:
    """Prints the unit, or writes it with --files."""
    container = await find(session.client, args.container)
    name = name_of(container)
    user = places.is_users()
    wherry = [shutil.which("wherry") or os.path.abspath(sys.argv[0])]
    if session.namespace != "default":
        wherry += ["--namespace", session.namespace]
    if session.address != places.address():
        wherry += ["--address", session.address]
    text = UNIT.format(
        name=name,
        # a user's commands bring their daemon with them
        needs=""
        if user
        else "Wants=wherryd.service network-online.target\nAfter=wherryd.service network-online.target\n",
        restart=args.restart_policy,
        stop=args.stop_timeout + 20,
        wherry=" ".join(wherry),
        target="default.target" if user else "multi-user.target",
    )
    if not args.files:
        sys.stdout.write(text)
        return
    path = os.path.abspath(f"container-{name}.service")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    print(path)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart-policy",
        default="on-failure",
        choices=("no", "on-success", "on-failure", "on-abnormal", "on-watchdog", "on-abort", "always"),
        help="systemd's Restart= (on-failure)",
    )
    parser.add_argument("--stop-timeout", type=int, default=10, metavar="SECONDS", help="until 'stop' kills (10)")
    parser.add_argument("-f", "--files", action="store_true", help="write container-NAME.service here, print its path")
    parser.add_argument("container", metavar="CONTAINER")


COMMANDS = [
    Command(("unit", "systemd"), "a systemd unit for a container", unit, _configure, "wherry generate unit --files web")
]
