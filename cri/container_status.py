"""What the CRI says of a container: its status, its line in a list, and what `crictl inspect` shows."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, cast

from wherry.core.errors import NotFound
from wherry.cri.records import Member
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.client.containers import Container
    from wherry.cri.node import Node

# reasons as containerd gives them; dashboards and controllers know the words
COMPLETED, ERROR, OOM_KILLED, START_ERROR, UNKNOWN = "Completed", "Error", "OOMKilled", "StartError", "Unknown"
START_EXIT_CODE, UNKNOWN_EXIT_CODE = 128, 255
# seconds for which an image's names are believed: a status is asked for often, a tag moves rarely
_NAMES_KEPT = 10.0


class Names:
    """The names of images as a status shows them: a tag, and the name by digest."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: dict[str, tuple[float, str, str]] = {}

    async def refresh(self, member: Member) -> None:
        """Ask for the names of a container's image again, where that was some time ago."""
        identity = member.facts.image_id
        now = time.monotonic()
        if identity in self._known and now < self._known[identity][0]:
            return
        _, tag, digest = self._known.get(identity, (0.0, "", ""))
        try:
            image = await self._node.images.resolve(identity)
        except NotFound:
            pass  # removed; what was known of it stays
        else:
            tag = next(iter(image.repo_tags), "")
            digest = next(iter(image.repo_digests), "")
        self._known[identity] = now + _NAMES_KEPT, tag, digest

    def of(self, member: Member) -> tuple[str, str]:
        """What `image.image` and `image_ref` are."""
        facts = member.facts
        _, tag, digest = self._known.get(facts.image_id, (0.0, "", ""))
        return tag or member.config.image.image, digest or facts.image_ref

    def forget(self, known: set[str]) -> None:
        """Keep nothing of images that no container has."""
        self._known = {identity: names for identity, names in self._known.items() if identity in known}


def status(member: Member, names: Names) -> cri.ContainerStatus:
    """The status of a container as it is known now."""
    return plain(member, names.of(member))


def plain(member: Member, shown: tuple[str, str] = ("", "")) -> cri.ContainerStatus:
    """The same; `shown` are the image's names, where they aren't those that the kubelet gave."""
    facts, config = member.facts, member.config
    image, reference = shown[0] or config.image.image, shown[1] or facts.image_ref
    reason = facts.reason
    if member.state == cri.CONTAINER_EXITED and not reason:
        reason = ERROR if facts.exit_code else COMPLETED
    found = cri.ContainerStatus(
        id=member.id,
        metadata=config.metadata,
        state=member.state,
        created_at=facts.created_at,
        started_at=facts.started_at,
        finished_at=facts.finished_at,
        exit_code=facts.exit_code,
        image=cri.ImageSpec(image=image, user_specified_image=config.image.user_specified_image),
        image_ref=reference,
        image_id=facts.image_id,
        reason=reason,
        message=facts.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=facts.log_path,
        stop_signal=cast("cri.Signal", signal_of(facts.stop_signal)),
    )
    found.resources.linux.CopyFrom(config.linux.resources)
    if user := facts.more.get("user"):
        found.user.linux.uid, found.user.linux.gid = user[0], user[1]
        found.user.linux.supplemental_groups.extend(user[2])
    return found


def signal_of(name: str) -> int:
    """The CRI's number of a signal's name; RUNTIME_DEFAULT for one that it has none for."""
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    try:
        return cri.Signal.Value(full.replace("+", "PLUS").replace("-", "MINUS"))
    except ValueError:
        return cri.RUNTIME_DEFAULT


def listed(member: Member) -> cri.Container:
    """A container's line in a list."""
    facts, config = member.facts, member.config
    return cri.Container(
        id=member.id,
        pod_sandbox_id=facts.pod,
        metadata=config.metadata,
        image=config.image,
        image_ref=facts.image_ref,
        image_id=facts.image_id,
        state=member.state,
        created_at=facts.created_at,
        labels=config.labels,
        annotations=config.annotations,
    )


def info(member: Member, record: Container | None) -> dict[str, str]:
    """The verbose part: JSON as containerd's, under `info`."""
    from google.protobuf.json_format import MessageToDict

    facts = member.facts
    shown: dict[str, Any] = {
        "sandboxID": facts.pod,
        "pid": facts.pid,
        "removing": facts.removing,
        "snapshotKey": facts.snapshot,
        "snapshotter": facts.snapshotter,
        "runtimeType": record.runtime if record else "",
        "runtimeOptions": None,
        "config": MessageToDict(member.config, preserving_proto_field_name=True),
        "runtimeSpec": record.spec if record else None,
    }
    return {"info": json.dumps(shown)}
