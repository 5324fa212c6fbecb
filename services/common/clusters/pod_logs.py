"""The end of a pod's log, of the container that matters: one that still initialises, one that crashed, else the first."""

from __future__ import annotations

import httpx2
from lightkube.config import client_adapter
from lightkube.config.kubeconfig import SingleConfig

from services.common.clusters.objects import Object

LINES, CHARACTERS = 400, 20_000


class PodLogs:
    """Asks the API server. lightkube 1.0.1's `log` cannot ask for a container that crashed and was started again."""

    def __init__(self, config: SingleConfig, namespace: str) -> None:
        self._http = client_adapter.AsyncClient(config, client_adapter.ConnectionParams())
        self._namespace = namespace

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def read(self, pod: Object) -> str:
        """The end of its log; "" when it cannot be had."""
        state = pod.get("status") or {}
        waiting = [s["name"] for s in state.get("initContainerStatuses") or [] if not s.get("ready")]
        crashed = [s["name"] for s in state.get("containerStatuses") or [] if s.get("restartCount")]
        container = (waiting or crashed or [pod["spec"]["containers"][0]["name"]])[0]
        previous = str(bool(crashed and not waiting)).lower()
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod['metadata']['name']}/log"
        asked: dict[str, str | int] = {"container": container, "tailLines": LINES, "previous": previous}
        try:
            answer = await self._http.get(path, params=asked)
        except httpx2.HTTPError:
            return ""
        return answer.text[-CHARACTERS:] if answer.status_code == 200 else ""
