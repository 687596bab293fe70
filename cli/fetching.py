"""An image brought because a container wants it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli import transfers
from wherry.core.platforms import host, parse

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def fetch(session: Session, image: str, platform: str, snapshotter: str, *, quiet: bool) -> str:
    """Pulls and unpacks an image, with progress on stderr; its full name."""
    client = session.client
    name = transfers.full_name(image)
    wanted = parse(platform) if platform else host()
    where = argparse.Namespace(user="", plain_http=False, hosts_dir="")
    progress = client.transfer.pull(
        transfers.registry(where, name),
        platforms=[wanted],
        unpack=[(wanted, snapshotter or await client.namespaces.default_snapshotter())],
    )
    with transfers.explained():
        await transfers.show(progress, quiet=quiet)
    return name
