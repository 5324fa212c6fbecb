"""What set-up tells uv about pip's settings, and that the locks hold what pyproject.toml asks for."""

from __future__ import annotations

from pathlib import Path

import lock
import pip_settings
import pytest


def test_pip_settings_become_uv_variables() -> None:
    listing = (
        ":env:.find-links='/opt/wheels'\n"
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'\n"
        "global.trusted-host='mirror.example'\n"
        "global.cert='/etc/ssl/certs/company.pem'\n"
    )
    assert pip_settings.translate(pip_settings.parse(listing)) == {
        "UV_FIND_LINKS": "/opt/wheels",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INSECURE_HOST": "mirror.example",
        "SSL_CERT_FILE": "/etc/ssl/certs/company.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_the_environment_wins_over_a_pip_conf_and_an_install_section_over_the_global_one() -> None:
    listing = ":env:.index-url='https://env'\nglobal.index-url='https://global'\ninstall.index-url='https://install'\n"
    assert pip_settings.parse(listing)["index-url"] == ["https://env"]
    assert pip_settings.parse(listing.split("\n", 1)[1])["index-url"] == ["https://install"]


def test_options_of_other_pip_commands_are_left_alone() -> None:
    assert pip_settings.parse("download.index-url='https://x'\n") == {}


@pytest.mark.parametrize("engine", lock.ENGINES)
def test_every_lock_holds_what_pyproject_asks_for(engine: str) -> None:
    assert lock.check(lock.ENGINES[engine], lock.pins(lock.LOCKS / f"{engine}.txt")) == []


def test_a_lock_without_a_package_or_with_another_version_is_told() -> None:
    pins = [line for line in lock.pins(lock.LOCKS / "cpu.txt") if not line.startswith(("minio==", "grpcio=="))]
    misfits = lock.check(lock.ENGINES["cpu"], [*pins, "grpcio==1.0"])
    assert misfits == ["grpcio>=1.80 is pinned to 1.0", "minio<8,>=7.2.20 is missing"]


def test_the_cpu_lock_brings_no_cuda() -> None:
    lines = lock.pins(lock.LOCKS / "cpu.txt")
    assert "torch==2.13.0+cpu" in lines
    assert [line for line in lines if line.startswith(("nvidia", "cuda", "triton", "torchvision", "torchaudio"))] == []


def test_the_locks_are_installed_as_they_stand_so_each_line_is_a_pin() -> None:
    for path in sorted(Path(lock.LOCKS).glob("*.txt")):
        assert [line for line in lock.pins(path) if "==" not in line] == [], path
