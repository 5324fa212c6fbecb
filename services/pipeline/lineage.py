"""What a run leaves beside a deployment: how a revision came there. The deployment itself is the inference service's."""

from __future__ import annotations


def lineage_key(revision: str) -> str:
    """Where in the store {run, forced, report {name, digest}, error} of "deployments/{id}/revisions/{id}" is.

    forced: the report's gate was not met (error says how); absent when it was.
    """
    deployment, _, revision_id = revision.partition("/revisions/")
    return f"{deployment}/lineage/{revision_id}.json"
