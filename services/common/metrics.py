"""Prometheus metrics of a server, on a port of their own: calls, their time, and the states of jobs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

REGISTRY = CollectorRegistry()

calls = Counter("fabrictune_rpc_calls_total", "RPCs ended", ["method", "code"], registry=REGISTRY)
call_seconds = Histogram(
    "fabrictune_rpc_seconds",
    "Time of unary RPCs",
    ["method"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
jobs_started = Counter("fabrictune_jobs_started_total", "Jobs accepted", ["kind"], registry=REGISTRY)
jobs_ended = Counter("fabrictune_jobs_ended_total", "Jobs ended", ["kind", "state"], registry=REGISTRY)
streams_open = Gauge("fabrictune_watch_streams", "Watch streams that are open", registry=REGISTRY)


def serve(host: str, port: int) -> int:
    """Answer GET /metrics on host:port (0 takes a free one) from a daemon thread; returns the port."""
    server, _ = start_http_server(port, addr=host, registry=REGISTRY)
    return int(server.server_port)
