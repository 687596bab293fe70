"""Options for runtimes, as their shims read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherry.proto import runc_options_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message


def runc_options(
    *, binary: str = "", root: str = "", systemd_cgroup: bool = False, no_pivot: bool = False
) -> runc_options_pb2.Options:
    """For shims that run an OCI runtime: which one (`binary`, "" is the shim's own choice), its state folder, …"""
    return runc_options_pb2.Options(
        binary_name=binary, root=root, systemd_cgroup=systemd_cgroup, no_pivot_root=no_pivot
    )


def owned(options: Message | None, uid: int, gid: int) -> Message | None:
    """The same options, with a process' streams belonging to somebody; those of other shims are left alone."""
    if options is not None and not isinstance(options, runc_options_pb2.Options):
        return options
    changed = runc_options_pb2.Options(io_uid=uid, io_gid=gid)
    if options is not None:
        changed.MergeFrom(options)
    return changed


def config_options(path: str) -> Message:
    """For shims that are configured by a file (gVisor, Kata)."""
    from wherry.proto import runtimeoptions_pb2

    return runtimeoptions_pb2.Options(config_path=path)


def checkpoint_options(*, leave: bool, images: str = "", work: str = "") -> runc_options_pb2.CheckpointOptions:
    """For a checkpoint: whether the container runs on (`leave`), and criu's folders."""
    return runc_options_pb2.CheckpointOptions(exit=not leave, image_path=images, work_path=work)
