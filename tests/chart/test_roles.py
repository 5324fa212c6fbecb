"""What a server asks of the API server and what its Role lets it: the same, verb by verb. A small API server writes it down."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from lightkube import AsyncClient
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import Cluster, Context, User

from services.common.clusters import Workload
from services.common.clusters.kubernetes import KubernetesCluster, Place
from tests.chart.objects import Objects, Render

LONG_AGO = "2020-01-01T00:00:00Z"
LOST = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
HPA = {"mode": "hpa", "hpa": {"metrics": [{"type": "Resource"}]}}
KEDA = {"mode": "keda", "keda": {"triggers": [{"type": "cron"}]}}


def there(resource: str) -> list[dict[str, Any]]:
    """What is there already: work that has waited for too long, and its pod on a node that went silent."""
    metadata: dict[str, Any] = {"name": "x", "uid": "x", "creationTimestamp": LONG_AGO, "labels": {}}
    if resource == "pods":
        metadata |= {"labels": {"fabrictune.dev/name": "x"}, "deletionTimestamp": LONG_AGO}
        metadata["ownerReferences"] = [{"uid": "x"}]
        spec: dict[str, Any] = {"containers": [{"name": "a"}]}
        return [{"metadata": metadata, "spec": spec, "status": {"phase": "Running", "conditions": [LOST]}}]
    if resource == "events":
        return []
    metadata["annotations"] = {"fabrictune.dev/resources": json.dumps({"queue_timeout": 1})}
    template = {"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 8000}]}]}}
    return [{"metadata": metadata, "spec": {"template": template}, "status": {}}]


def refusal(code: int, reason: str) -> web.Response:
    told = json.dumps({"code": code, "reason": reason}).encode()
    return web.Response(body=told, status=code, content_type="application/json")  # with a charset lightkube reads none


class ApiServer:
    """Answers as far as a server needs it; each object that is to be made is there already."""

    def __init__(self) -> None:
        self.asked: dict[str, set[str]] = defaultdict(set)
        self._posted: dict[str, Any] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        resource, *names = request.path.partition("/namespaces/ns/")[2].split("/")
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get" if names else "list"}[
            request.method
        ]
        verb = "watch" if "watch" in request.query else verb
        self.asked["/".join([resource, *names[1:]])].add(verb)
        if verb == "watch":
            await (response := web.StreamResponse()).prepare(request)
            await asyncio.sleep(60)
            return response
        if verb == "list":
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": there(resource)})
        if verb == "create":
            made = await request.json()
            made["metadata"]["uid"] = "u"
            self._posted[resource] = made
            return refusal(409, "AlreadyExists")
        if verb == "delete":
            return refusal(404, "NotFound")
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "o", "uid": "o"}}
        return web.json_response(there(resource)[0] if verb == "patch" else self._posted.get(resource, owner))


@contextlib.asynccontextmanager
async def serving(api: ApiServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def act(objects: Objects, kind: str, folder: Path) -> dict[str, set[str]]:
    """Everything that a server does with a cluster; returns resource → verbs."""
    [data] = [m["data"] for m in objects if m["metadata"]["name"] == "fabrictune-templates"]
    (folder / f"{kind}.yaml").write_text(data[f"{kind}.yaml"])
    api = ApiServer()
    async with serving(api) as url:
        contexts, users = {"c": Context(cluster="c", user="u", namespace="ns")}, {"u": User(token="t")}
        config = KubeConfig(clusters={"c": Cluster(server=url)}, contexts=contexts, users=users, current_context="c")
        client = AsyncClient(config=config, namespace="ns")
        owner = "o" if kind == "engine" else ""
        cluster = KubernetesCluster(Place("ns", "fabrictune", folder, owner), [kind], client)
        await cluster.start()
        await cluster.read_log("x")
        work = Workload(kind, f"{kind}-a", ("python",), nodes=2 if kind == "training" else 1)
        await cluster.create(work)
        await cluster.delete(work.name)
        async with asyncio.timeout(10):
            while "delete" not in api.asked["pods"]:  # what is lost is given up, after a second
                await asyncio.sleep(0.05)
        await cluster.close()
    return api.asked


@pytest.mark.parametrize(
    ("server", "kind", "autoscaling"),
    [
        ("merging", "merging", {}),
        ("training", "training", {}),
        ("inference", "engine", {}),
        ("inference", "engine", HPA),
        ("inference", "engine", KEDA),
    ],
)
async def test_a_role_lets_a_server_do_what_it_does_and_nothing_else(
    render: Render, tmp_path: Path, server: str, kind: str, autoscaling: dict[str, Any]
) -> None:
    objects = render(engine={"autoscaling": autoscaling})
    rules = objects.get("Role", f"fabrictune-{server}")["rules"]
    assert {r: set(rule["verbs"]) for rule in rules for r in rule["resources"]} == await act(objects, kind, tmp_path)
