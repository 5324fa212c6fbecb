"""Prometheus metrics of a server, on a port of their own: calls, their time, and the states of jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

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

PROGRESS: Mapping[str, Gauge] = {
    # field of a stored Progress → its gauge; labels: the stage and the job's id
    field: Gauge(f"fabrictune_job_{name}", text, ["kind", "job"], registry=REGISTRY)
    for field, name, text in (
        ("step", "step", "Steps (rows, tensors, prompts) that a running job has done"),
        ("total_steps", "total_steps", "Steps that it will do; 0 while that is unknown"),
        ("epoch", "epoch", "Epochs of training done"),
        ("loss", "loss", "Training loss of the last logged step"),
        ("eval_loss", "eval_loss", "Validation loss of the last evaluation"),
        ("token_accuracy", "token_accuracy", "Part of the trained tokens that the model would have written, 0 to 1"),
        ("learning_rate", "learning_rate", "Learning rate now"),
        ("grad_norm", "grad_norm", "Norm of the gradients before clipping"),
        ("tokens_per_second", "tokens_per_second", "Tokens trained in a second"),
        ("memory_bytes", "memory_bytes", "Peak memory of a training process"),
        ("eta_seconds", "eta_seconds", "Seconds until its end, as it seems now"),
    )
}
_shown: dict[str, set[str]] = {}


def show_progress(kind: str, running: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the gauges of all running jobs of a kind (id → stored Progress); those of others go."""
    for job in _shown.get(kind, set()) - set(running):
        for gauge in PROGRESS.values():
            with suppress(KeyError):
                gauge.remove(kind, job)
    _shown[kind] = set(running)
    for job, progress in running.items():
        for field, gauge in PROGRESS.items():
            if progress.get(field) is not None:
                gauge.labels(kind, job).set(float(progress[field]))


def serve(host: str, port: int, ready: Callable[[], bool]) -> int:
    """Answer GET /metrics, /livez and /readyz on host:port (0 takes a free one) from daemon threads; returns the port.

    Kubernetes' own gRPC probe knows no TLS and a program as a probe costs half a second of CPU each time; these ask
    `ready` instead: whether the server's event loop answers, and whether it serves (/readyz only).
    """
    figures = make_wsgi_app(REGISTRY)

    def answer(environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if path not in ("/livez", "/readyz"):
            return figures(environ, start_response)
        try:
            well = ready() or path == "/livez"
        except TimeoutError:
            well = False
        start_response("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if well else b"not ready\n"]

    server = make_server(host, port, answer, _ThreadingServer, _SilentHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A probe every few seconds is not worth a line."""
