"""Topics of events: what happened, as a path (containerd's, so that its subscribers' filters match)."""

from __future__ import annotations

from wherry.core.errors import InvalidArgument
from wherry.core.names import check_identifier, quote

TASK_CREATE = "/tasks/create"
TASK_START = "/tasks/start"
TASK_OOM = "/tasks/oom"
TASK_EXIT = "/tasks/exit"
TASK_DELETE = "/tasks/delete"
TASK_EXEC_ADDED = "/tasks/exec-added"
TASK_EXEC_STARTED = "/tasks/exec-started"
TASK_PAUSED = "/tasks/paused"
TASK_RESUMED = "/tasks/resumed"
TASK_CHECKPOINTED = "/tasks/checkpointed"

CONTAINER_CREATE = "/containers/create"
CONTAINER_UPDATE = "/containers/update"
CONTAINER_DELETE = "/containers/delete"

IMAGE_CREATE = "/images/create"
IMAGE_UPDATE = "/images/update"
IMAGE_DELETE = "/images/delete"

CONTENT_CREATE = "/content/create"
CONTENT_DELETE = "/content/delete"

NAMESPACE_CREATE = "/namespaces/create"
NAMESPACE_UPDATE = "/namespaces/update"
NAMESPACE_DELETE = "/namespaces/delete"

SNAPSHOT_PREPARE = "/snapshot/prepare"
SNAPSHOT_COMMIT = "/snapshot/commit"
SNAPSHOT_REMOVE = "/snapshot/remove"

# containerd's sandbox plugin leaves out the first slash, and so fails its own check of topics
SANDBOX_CREATE = "/sandboxes/create"
SANDBOX_START = "/sandboxes/start"
SANDBOX_EXIT = "/sandboxes/exit"


def check_topic(topic: str) -> str:
    """Return the topic when it is one: `/` and identifiers joined by `/`. Raises InvalidArgument."""
    if not topic:
        raise InvalidArgument("topic is empty: invalid argument")
    if topic[0] != "/":
        raise InvalidArgument(f"topic {quote(topic)} must start with '/': invalid argument")
    for component in topic[1:].split("/"):
        check_identifier(f"topic {quote(topic)}: component {quote(component)}", component)
    return topic
