"""Figures for Prometheus, read by Prometheus' own parser, and traces, sent to a collector of OpenTelemetry's."""

from __future__ import annotations

import gzip
import http.server
import queue
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.wherryd import BUSYBOX, Wherryd


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def measured() -> Iterator[tuple[Wherryd, str]]:
    """A daemon with figures, and where they are."""
    port = free_port()
    daemon = Wherryd(config=f'version = 2\n[metrics]\naddress = "127.0.0.1:{port}"\ngrpc_histogram = true\n')
    try:
        daemon.start()
        yield daemon, f"http://127.0.0.1:{port}/v1/metrics"
    finally:
        daemon.close()


def figures(url: str) -> dict[str, Metric]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def test_figures_of_calls_containers_and_the_daemon(measured: tuple[Wherryd, str]) -> None:
    daemon, url = measured
    daemon.import_busybox()
    daemon.ctr("run", "-d", "--memory-limit", "67108864", BUSYBOX, "one", "sleep", "100")
    daemon.ctr("tasks", "kill", "nobody", check=False)
    found = figures(url)
    memory = next(family for name, family in found.items() if name.endswith("usage_limit_bytes"))
    labels = {"container_id": "one", "namespace": "default", "runtime": "io.containerd.runc.v2"}
    assert [(sample.labels, sample.value) for sample in memory.samples] == [(labels, 67108864.0)]
    assert found["wherry_tasks"].samples[0].labels == {"namespace": "default", "status": "running"}
    creates = [sample for sample in found["grpc_server_handled"].samples if sample.labels["grpc_method"] == "Create"]
    services = {sample.labels["grpc_service"]: sample for sample in creates}
    created = services["containerd.services.tasks.v1.Tasks"]
    assert (created.labels["grpc_code"], created.labels["grpc_type"], created.value) == ("OK", "unary", 1.0)
    assert "NotFound" in {sample.labels["grpc_code"] for sample in found["grpc_server_handled"].samples}
    counts = [sample for sample in found["grpc_server_handling_seconds"].samples if sample.name.endswith("_count")]
    assert sum(sample.value for sample in counts) >= len(creates)
    assert found["process_resident_memory_bytes"].samples[0].value > 1 << 20
    daemon.ctr("tasks", "rm", "-f", "one")
    assert "wherry_tasks" not in figures(url)


def test_off_by_default_and_a_wrong_address_is_refused(tmp_path: object) -> None:
    daemon = Wherryd(config='version = 2\n[metrics]\naddress = "nowhere"\n')
    try:
        with pytest.raises(RuntimeError, match="metrics address 'nowhere': expected HOST:PORT"):
            daemon.start()
    finally:
        daemon.close()


def test_an_address_that_is_taken(measured: tuple[Wherryd, str]) -> None:
    _, url = measured
    address = url.split("/")[2]
    other = Wherryd(config=f'version = 2\n[metrics]\naddress = "{address}"\n')
    try:
        with pytest.raises(RuntimeError, match=f"metrics address {address}"):
            other.start()
    finally:
        other.close()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url.replace("/v1/metrics", "/elsewhere"), timeout=10)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces as OTLP over HTTP."""

    spans: queue.Queue[Span]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        pass


def test_a_span_for_each_call() -> None:
    Collector.spans = queue.Queue()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    daemon = Wherryd(env=env)
    try:
        daemon.start()
        daemon.ctr("containers", "info", "nobody", check=False)
        while (span := Collector.spans.get(timeout=60)).name != "containerd.services.containers.v1.Containers/Get":
            pass
    finally:
        daemon.close()
        server.shutdown()
        server.server_close()
    attributes = {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}
    assert attributes["rpc.method"] == "Get"
    assert attributes["wherry.namespace"] == "default"
    assert attributes["rpc.grpc.status_code"] == 5
    assert span.status.message == "NotFound"
