"""Traces for OpenTelemetry: a span for each call of the API, where `opentelemetry` is installed and told where to send.

It is configured by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` …), as containerd 2.x is. A caller's `traceparent` becomes the parent of the span (W3C Trace
Context). Names and attributes follow OpenTelemetry's conventions for RPC.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import structlog

from wherry.core.errors import Code
from wherry.daemon.metrics import CODES
from wherry.daemon.version import VERSION

if TYPE_CHECKING:
    from wherry.daemon.observed import Ended
    from wherry.proto.service import Context, Method

log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# of what calls carry, these are worth a look in a trace
_NAMESPACE, _LEASE = "wherry.namespace", "wherry.lease"


def wanted() -> bool:
    """Whether somebody said where traces go."""
    return any(os.environ.get(name) for name in _ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED") != "true"


class Tracer:
    """Makes the spans. An `Observer`."""

    def __init__(self, tracer: Any, provider: Any) -> None:
        self._tracer = tracer
        self._provider = provider

    @classmethod
    def open(cls) -> Tracer | None:
        """The tracer, when traces are wanted; None, with a warning, where `opentelemetry` isn't installed."""
        if not wanted():
            return None
        try:
            # they take a quarter of a second and are an extra: `pip install wherry[otel]`
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            log.warning("no traces: opentelemetry isn't installed (pip install 'wherry[otel]')", error=str(error))
            return None
        attributes = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "wherryd", "service.version": VERSION}
        provider = TracerProvider(resource=Resource.create(attributes))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        log.info("traces", endpoint=next(os.environ[name] for name in _ENDPOINTS if os.environ.get(name)))
        return cls(provider.get_tracer("wherry", VERSION), provider)

    def began(self, method: Method, context: Context) -> Ended:
        """A span for a call."""
        from opentelemetry.propagate import extract  # noqa: PLC0415 - loaded by `open` already
        from opentelemetry.trace import SpanKind, Status, StatusCode  # noqa: PLC0415

        span = self._tracer.start_span(
            f"{method.service}/{method.name}",
            context=extract(dict(context.metadata)),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": context.transport,
                "rpc.service": method.service,
                "rpc.method": method.name,
                _NAMESPACE: context.namespace or "",
                _LEASE: context.lease or "",
            },
        )

        def ended(code: int) -> None:
            span.set_attribute("rpc.grpc.status_code", code)
            if code != Code.OK:
                span.set_status(Status(StatusCode.ERROR, CODES.get(code, str(code))))
            span.end()

        return ended

    def close(self) -> None:
        """Send what is left; blocks for as long as that takes, at most some seconds."""
        self._provider.shutdown()
