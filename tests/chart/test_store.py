from __future__ import annotations

from tests.chart.objects import Render, container, env


def test_minio_is_one_pod_with_a_claim_and_keys_from_its_secret(render: Render) -> None:
    store = render().get("StatefulSet", "fabrictune-store")
    assert container(store)["args"] == ["server", "/data", "--console-address", ":9001"]
    assert env(store)["MINIO_ROOT_USER"] == {"secretKeyRef": {"name": "fabrictune-store", "key": "access-key"}}
    assert env(store)["MINIO_ROOT_PASSWORD"] == {"secretKeyRef": {"name": "fabrictune-store", "key": "secret-key"}}
    [claim] = store["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    assert "storageClassName" not in claim["spec"]  # the cluster's default


def test_seaweedfs_listens_for_s3_only(render: Render) -> None:
    store = container(render(objectStore={"mode": "seaweedfs"}).get("StatefulSet", "fabrictune-store"))
    assert {"-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-s3.port=9000"} <= set(store["args"])
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {e["name"] for e in store["env"]}


def test_servers_find_the_store_of_the_release(render: Render) -> None:
    for mode in ("minio", "seaweedfs"):
        objects = render(objectStore={"mode": mode})
        endpoint = env(objects.get("Deployment", "fabrictune-training"))["FABRICTUNE_S3_ENDPOINT"]
        assert endpoint == "http://fabrictune-store.fabrictune.svc:9000"
        assert objects.get("Service", "fabrictune-store")["spec"]["ports"][0]["port"] == 9000


def test_an_external_store_brings_no_object_of_its_own(render: Render) -> None:
    objects = render("external-s3")
    assert not objects.names("StatefulSet") and "fabrictune-store" not in objects.names("Service")
    found = env(objects.get("Deployment", "fabrictune-training"))
    assert found["FABRICTUNE_S3_ENDPOINT"] == "https://s3.eu-central-1.amazonaws.com"
    assert found["FABRICTUNE_S3_PATH_STYLE"] == "false"


def test_keys_of_an_existing_secret_are_used_everywhere(render: Render) -> None:
    for title, pod in render("locked-down").pods():
        for value in env(pod).values():
            if isinstance(value, dict) and value.get("secretKeyRef", {}).get("key") in ("access-key", "secret-key"):
                assert value["secretKeyRef"]["name"] == "my-store-keys", title


def test_an_authority_of_the_store_reaches_servers_workers_and_engines(render: Render) -> None:
    objects = render("external-s3", objectStore={"caSecret": "s3-ca"})
    for title, pod in objects.pods():
        for each in [*pod.get("initContainers", []), *pod["containers"]]:
            if "FABRICTUNE_S3_ENDPOINT" in {e["name"] for e in each.get("env", ())}:
                assert {"name": "FABRICTUNE_S3_CA_FILE", "value": "/etc/fabrictune/store/ca.crt"} in each["env"], title
                assert "/etc/fabrictune/store" in [m["mountPath"] for m in each["volumeMounts"]], title


def test_an_uninstall_keeps_the_data_unless_told(render: Render) -> None:
    def policy(retain: bool) -> str:
        store = render(objectStore={"persistence": {"retain": retain}}).get("StatefulSet", "fabrictune-store")
        return str(store["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"])

    assert (policy(True), policy(False)) == ("Retain", "Delete")


def test_an_existing_claim_or_none_at_all(render: Render) -> None:
    def data(**persistence: object) -> object:
        store = render(objectStore={"persistence": persistence}).get("StatefulSet", "fabrictune-store")["spec"]
        assert "volumeClaimTemplates" not in store
        return next(v for v in store["template"]["spec"]["volumes"] if v["name"] == "data")

    assert data(existingClaim="mine") == {"name": "data", "persistentVolumeClaim": {"claimName": "mine"}}
    assert data(enabled=False) == {"name": "data", "emptyDir": {}}
