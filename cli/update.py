"""`wherry update`: other limits, or another restart policy, for containers that are there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wherry.cli.container_flags import limit_options, limits_of
from wherry.cli.lifecycle import containers_argument, each
from wherry.cli.table import Command
from wherry.client import lifecycle, limits
from wherry.client.containers import Container
from wherry.client.states import inspect_state
from wherry.core.errors import InvalidArgument
from wherry.core.labels import RESTART_COUNT, RESTART_POLICY, RESTART_STATUS

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client


async def update(session: Session, args: argparse.Namespace) -> int:
    """Changes containers, at once where they run."""
    asked = limits.resources(limits_of(args))
    policy = lifecycle.policy_labels(args.restart) if args.restart else None
    if not asked and policy is None:
        raise InvalidArgument("nothing to change: name a limit (--memory, --cpus …) or --restart")
    return await each(session.client, args.containers, lambda item: _change(session.client, item, asked, policy))


async def _change(client: Client, container: Container, asked: dict[str, Any], policy: Any) -> None:
    state = await inspect_state(client, container)
    if asked:
        spec = dict(container.spec or {})
        linux = dict(spec.get("linux") or {})
        resources = dict(linux.get("resources") or {})
        merged = {name: {**(resources.get(name) or {}), **part} for name, part in asked.items()}
        if state.running:
            await client.tasks.update(container.id, merged)
        spec["linux"] = {**linux, "resources": {**resources, **merged}}
        await client.containers.update(Container(id=container.id, spec=spec), ["spec"])
    if policy is not None:
        status = "running" if state.running or state.status == "restarting" else "stopped"
        labels = {RESTART_POLICY: "", RESTART_STATUS: "", RESTART_COUNT: ""}
        if policy:
            labels |= {**policy, RESTART_STATUS: status}
        await client.containers.label(container.id, labels)


def _configure(parser: argparse.ArgumentParser) -> None:
    limit_options(parser)
    parser.add_argument("--restart", default="", metavar="POLICY", help="no, on-failure[:N], always, unless-stopped")
    containers_argument(parser)


COMMANDS = [
    Command(
        ("update",), "change limits of containers", update, _configure, "wherry update --memory 512m --cpus 1.5 web"
    )
]
