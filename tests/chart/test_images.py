from __future__ import annotations

import pytest
from chart_render import CASES
from image_plans import IMAGES

from tests.chart.objects import Objects, Render


def images(objects: Objects) -> set[str]:
    """Every image that the release or its servers will ask for."""
    return {c["image"] for _, pod in objects.pods() for c in [*pod.get("initContainers", []), *pod["containers"]]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("registry", ["registry.internal:5000/mirror", "localhost/"])
def test_one_value_moves_every_image_those_of_jobs_engines_and_store_included(
    render: Render, case: str, registry: str
) -> None:
    found = images(render(case, image={"registry": registry}))
    assert len(found) >= 8
    assert all(image.startswith(registry.rstrip("/") + "/") for image in found)


def test_the_images_are_those_that_make_images_builds(render: Render) -> None:
    ours = {i for i in images(render()) if not i.startswith("quay.io/")}
    assert ours == {f"fabrictune-{image.name}:0.1.0" for image in IMAGES}


def test_the_store_keeps_its_own_tag_when_ours_changes(render: Render) -> None:
    found = images(render(image={"tag": "9.9.9"}))
    assert "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z" in found
    assert "fabrictune-training-worker:9.9.9" in found


def test_an_image_that_names_its_own_registry_stays_there(render: Render) -> None:
    own = {"minio": {"image": {"registry": "quay.io"}}}
    found = images(render(image={"registry": "localhost"}, objectStore=own))
    assert {i.split("/")[0] for i in found} == {"localhost", "quay.io"}


def test_a_digest_is_added_to_the_tag(render: Render) -> None:
    digest = f"sha256:{'a' * 64}"
    found = images(render(engine={"image": {"digest": digest}}))
    assert f"fabrictune-inference-engine:0.1.0@{digest}" in found


def test_pull_secrets_are_on_every_pod(render: Render) -> None:
    for title, pod in render(image={"pullSecrets": [{"name": "mine"}]}).pods():
        assert pod["imagePullSecrets"] == [{"name": "mine"}], title
