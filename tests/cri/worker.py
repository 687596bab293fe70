"""A pod as a kubelet's worker keeps it: it looks at what is there, computes what is missing, and asks for that.

After kubelet's own (`syncPod`, `computePodActions`, `killPod`, its garbage collection), without its timers: a test
calls `sync` as often as it likes. Nothing is remembered between rounds but the specification, as after a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests import busybox
from tests.cri.kubelet import ContainerdLab, WherryLab
from wherry.proto import cri_pb2 as cri

Lab = WherryLab | ContainerdLab


def stop(lab: Lab, container: str, grace: int) -> None:
    """StopContainer; a kubelet waits for it two minutes longer than the grace period."""
    lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=grace), timeout=grace + 60)


def probe(lab: Lab, container: str, command: Sequence[str], seconds: int) -> Any:
    """ExecSync with its own time limit."""
    request = cri.ExecSyncRequest(container_id=container, cmd=command, timeout=seconds)
    return lab.kubelet.ExecSync(request, timeout=seconds + 60)


@dataclass
class Spec:
    """A container of a pod: `restart` is the pod's policy (Always, OnFailure, Never); `pre_stop` runs before a stop."""

    name: str
    command: Sequence[str]
    restart: str = "Always"
    pre_stop: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Worker:
    """One pod. `uid` tells it from another of the same name."""

    lab: Lab
    name: str
    containers: Sequence[Spec]
    init: Sequence[Spec] = ()
    uid: str = ""
    grace: int = 1
    host_network: bool = True
    source: str = "api"

    def __post_init__(self) -> None:
        self.uid = self.uid or f"uid-{self.name}"

    # -- looking

    @property
    def labels(self) -> dict[str, str]:
        """What kubelet marks pods and containers with."""
        return {
            "io.kubernetes.pod.name": self.name,
            "io.kubernetes.pod.namespace": "default",
            "io.kubernetes.pod.uid": self.uid,
        }

    @property
    def logs(self) -> Path:
        """The pod's log directory."""
        return self.lab.logs / f"default_{self.name}_{self.uid}"

    def sandboxes(self) -> list[Any]:
        """The pod's sandboxes, newest first."""
        chosen = cri.PodSandboxFilter(label_selector={"io.kubernetes.pod.uid": self.uid})
        found = self.lab.kubelet.ListPodSandbox(filter=chosen).items
        return sorted(found, key=lambda item: (-item.metadata.attempt, -item.created_at))

    def statuses(self, name: str = "") -> list[Any]:
        """The statuses of the pod's containers, newest first; of one, with a name."""
        labels = {"io.kubernetes.pod.uid": self.uid, **({"io.kubernetes.container.name": name} if name else {})}
        found = self.lab.kubelet.ListContainers(filter=cri.ContainerFilter(label_selector=labels)).containers
        statuses = [self.lab.container_status(item.id) for item in found]
        return sorted(statuses, key=lambda item: (-item.metadata.attempt, -item.created_at))

    def status(self, name: str) -> Any:
        """The newest container of a name, None where there is none."""
        return next(iter(self.statuses(name)), None)

    def config(self, attempt: int = 0) -> Any:
        """The sandbox's configuration."""
        self.logs.mkdir(parents=True, exist_ok=True)
        config = self.lab.pod_config(self.name, host_network=self.host_network, attempt=attempt, labels=self.labels)
        config.metadata.uid = self.uid
        config.log_directory = str(self.logs)
        config.annotations["kubernetes.io/config.source"] = self.source
        config.annotations["kubernetes.io/config.seen"] = "2026-11-22T00:00:00Z"
        return config

    # -- acting

    def sync(self) -> bool:
        """One round; whether nothing was left to do."""
        found = self.sandboxes()
        ready = [item for item in found if item.state == cri.SANDBOX_READY]
        if len(ready) != 1 or ready[0].id != found[0].id:
            if self._finished():
                return True
            # changed: what runs in the old ones ends first
            self.kill()
            attempt = found[0].metadata.attempt + 1 if found else 0
            pod = self.lab.run_pod(self.config(attempt))
        else:
            pod = ready[0].id
            attempt = found[0].metadata.attempt
        config = self.config(attempt)
        for spec in self.init:
            last = self._last(spec.name, pod)
            if last is None or (last.state == cri.CONTAINER_EXITED and last.exit_code):
                if last is not None and spec.restart == "Never":
                    return True
                self._start(pod, config, spec, last)
                return False
            if last.state == cri.CONTAINER_CREATED:
                self.lab.kubelet.StartContainer(container_id=last.id)
                return False
            if last.state == cri.CONTAINER_RUNNING:
                return False
        settled = True
        for spec in self.containers:
            last = self._last(spec.name, pod)
            if last is not None and (last.state == cri.CONTAINER_RUNNING or self._done(spec, last)):
                continue
            settled = False
            self._start(pod, config, spec, last)
        return settled

    def _last(self, name: str, pod: str) -> Any:
        """The newest container of a name in this sandbox."""
        own = cri.ContainerFilter(pod_sandbox_id=pod, label_selector={"io.kubernetes.container.name": name})
        ids = {item.id for item in self.lab.kubelet.ListContainers(filter=own).containers}
        return next((status for status in self.statuses(name) if status.id in ids), None)

    @staticmethod
    def _done(spec: Spec, last: Any) -> bool:
        if last.state != cri.CONTAINER_EXITED or spec.restart == "Always":
            return False
        return spec.restart == "Never" or last.exit_code == 0

    def _finished(self) -> bool:
        newest = [self.status(spec.name) for spec in self.containers]
        return bool(newest) and all(
            last is not None and self._done(spec, last) for spec, last in zip(self.containers, newest, strict=True)
        )

    def _start(self, pod: str, config: Any, spec: Spec, last: Any) -> str:
        """Attempts are counted over all sandboxes of the pod (kubelet's restart count)."""
        newest = self.status(spec.name)
        attempt = newest.metadata.attempt + 1 if newest is not None else 0
        if newest is not None and newest.state in (cri.CONTAINER_CREATED, cri.CONTAINER_UNKNOWN) and newest == last:
            # never started: killed, as kubelet does with what it can't tell
            stop(self.lab, newest.id, 0)
        made = self.lab.container_config(spec.name, list(spec.command), **spec.fields)
        made.metadata.attempt = attempt
        made.labels.update({**self.labels, "io.kubernetes.container.name": spec.name})
        made.annotations["io.kubernetes.container.restartCount"] = str(attempt)
        made.log_path = f"{spec.name}/{attempt}.log"
        (self.logs / spec.name).mkdir(exist_ok=True)
        made.image.image = busybox.NAME
        return self.lab.run(pod, made, config)

    def kill(self, grace: int | None = None) -> None:
        """As killPod: all running containers at once, hooks before, then the sandboxes."""
        errors: list[grpc.RpcError] = []

        def end(status: Any) -> None:
            try:
                hooks = [spec.pre_stop for spec in self.containers if spec.name == status.metadata.name]
                if hooks and hooks[0]:
                    probe(self.lab, status.id, hooks[0], 10)
                stop(self.lab, status.id, self.grace if grace is None else grace)
            except grpc.RpcError as error:
                errors.append(error)

        running = [item for item in self.statuses() if item.state == cri.CONTAINER_RUNNING]
        threads = [threading.Thread(target=end, args=[item]) for item in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        for item in self.sandboxes():
            self.lab.kubelet.StopPodSandbox(pod_sandbox_id=item.id)

    def collect(self, keep: int = 0) -> None:
        """As kubelet's garbage collection: dead containers but the newest of each name, then empty dead sandboxes."""
        for name in {status.metadata.name for status in self.statuses()}:
            dead = [item for item in self.statuses(name) if item.state != cri.CONTAINER_RUNNING]
            for item in dead[keep:]:
                self.lab.kubelet.RemoveContainer(container_id=item.id)
        used = {item.pod_sandbox_id for item in self.lab.kubelet.ListContainers().containers}
        for item in self.sandboxes():
            if item.state != cri.SANDBOX_READY and item.id not in used:
                self.lab.kubelet.StopPodSandbox(pod_sandbox_id=item.id)
                self.lab.kubelet.RemovePodSandbox(pod_sandbox_id=item.id)

    def delete(self) -> None:
        """The pod goes, with all that is left of it."""
        self.kill(0)
        self.collect()
        assert not self.sandboxes()
        assert not self.statuses()

    def settle(self, rounds: int = 40) -> None:
        """Rounds until nothing is left to do."""
        for _ in range(rounds):
            if self.sync():
                return
            self.wait()
        raise AssertionError(f"{self.name} doesn't settle: {self.statuses()}")

    def wait(self) -> None:
        """Until init containers that run have ended."""
        names = {spec.name for spec in self.init}
        for status in self.statuses():
            if status.metadata.name in names and status.state == cri.CONTAINER_RUNNING:
                self.lab.exited(status.id)
