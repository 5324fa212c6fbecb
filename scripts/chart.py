"""The chart's guards, in the order of `make chart`: lint, render, validate, golden files, kustomize, value walk.

--check asks only whether what is made from the chart (golden files, deploy/k8s) is fresh; --update makes it anew.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from chart_plain import FOLDER, plain, plain_files
from chart_render import CASES, CHART, NAMESPACE, RELEASE, ROOT, ChartError, helm, parse, render, with_templates
from chart_schemas import VERSIONS, findings
from chart_walk import walk
from kube_tools import tool

GOLDEN = ROOT / "tests" / "chart" / "golden"
RENDER_SECONDS = 2.0


class Wrong(Exception):
    """A finding: what is wrong and what to do."""


def main() -> int:
    """Exit status 0: all is well; 1: findings, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="only: are golden files and deploy/k8s fresh?")
    choice.add_argument("--update", action="store_true", help="make golden files and deploy/k8s anew")
    chosen = parser.parse_args()
    if chosen.update:
        return update()
    steps: dict[str, Callable[[], str]] = {"golden files": check_golden, "deploy/k8s": check_plain}
    if not chosen.check:
        first = {"lint": lint, "render": check_render, "validate": validate}
        last = {"kustomize": check_kustomize, "value walk": check_walk}
        steps = first | steps | last
    good = [run_step(name, step) for name, step in steps.items()]
    return 0 if all(good) else 1


def run_step(name: str, step: Callable[[], str]) -> bool:
    """Run it and print a line: its name, its time, and what it found."""
    begin = time.monotonic()
    try:
        told, good = step(), True
    except (Wrong, ChartError, FileNotFoundError) as error:
        told, good = f"FAILED\n{error}", False
    print(f"chart: {name:<12} {time.monotonic() - begin:5.1f} s  {told}", flush=True)
    return good


def lint() -> str:
    """`helm lint --strict` for each case."""
    for path in CASES.values():
        helm("lint", "--strict", str(CHART), "--values", str(path))
    return f"{len(CASES)} values files"


def check_render() -> str:
    """Each case twice: the same bytes, in time."""
    slowest = 0.0
    for case, path in CASES.items():
        begin = time.monotonic()
        first = render([path])
        slowest = max(slowest, time.monotonic() - begin)
        if render([path]) != first:
            raise Wrong(f"{case}: two renders differ")
    if slowest > RENDER_SECONDS:
        raise Wrong(f"a render took {slowest:.2f} s; {RENDER_SECONDS:.0f} s are allowed")
    return f"{len(CASES)} cases, each twice the same, slowest {slowest:.2f} s"


def validate() -> str:
    """Every object of every case, those in the ConfigMap of templates and deploy/k8s/examples too, in every version."""
    sets = {case: list(with_templates(parse(render([path])))) for case, path in CASES.items()}
    for path in sorted(FOLDER.glob("*/*.yaml")):
        if path.parent.name in ("examples", "kueue"):
            sets[str(path.relative_to(ROOT))] = parse(path.read_text())
    wrong, without, checked = [], Counter[str](), 0
    for name, manifests in sets.items():
        for manifest in manifests:
            found = {version: findings(manifest, version) for version in VERSIONS}
            title = f"{name}: {manifest['kind']} {manifest['metadata']['name']}"
            wrong += [f"{title}: {v}: {text}" for v, texts in found.items() for text in texts or ()]
            if any(texts is None for texts in found.values()):
                without[manifest["apiVersion"] + " " + manifest["kind"]] += 1
            else:
                checked += 1
    if wrong:
        raise Wrong("\n".join(wrong))
    unknown = ", ".join(f"{count} {kind}" for kind, count in sorted(without.items()))
    return f"{checked} objects in Kubernetes {VERSIONS[0]}–{VERSIONS[-1]}; no schema here for {unknown or 'none'}"


def check_golden() -> str:
    """The golden files are what the chart renders."""
    return _compare(golden_files(), GOLDEN.glob("*.yaml"))


def check_plain() -> str:
    """deploy/k8s is what the chart renders."""
    return _compare(plain_files(render()), (FOLDER / "manifests").glob("*.yaml"))


def check_kustomize() -> str:
    """`kubectl kustomize deploy/k8s` is the chart with its default values, object by object."""
    ended = subprocess.run([tool("kubectl"), "kustomize", str(FOLDER)], capture_output=True, text=True)
    if ended.returncode:
        raise Wrong(ended.stderr.strip())
    there = {(m["kind"], m["metadata"]["name"]): m for m in parse(ended.stdout)}
    there.pop(("Namespace", NAMESPACE))
    wanted = {(m["kind"], m["metadata"]["name"]): m for m in plain(parse(render()))}
    differ = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
    if differ:
        raise Wrong(f"kustomize and the chart differ in {differ}: run `python scripts/chart.py --update`")
    return f"{len(wanted)} objects are those of `helm template {RELEASE}`"


def check_walk() -> str:
    """Each value of the schema, changed alone, changes a render."""
    count, idle = walk()
    if idle:
        raise Wrong("these values change nothing in any case of helm/fabrictune/ci:\n  " + "\n  ".join(idle))
    return f"{count} values, each changes a render"


def golden_files() -> dict[Path, str]:
    """Path → text of each case's golden file."""
    return {GOLDEN / f"{case}.yaml": render([path]) for case, path in CASES.items()}


def update() -> int:
    """Write golden files and deploy/k8s, and remove what has no source any more."""
    files = golden_files() | plain_files(render())
    for stale in {*GOLDEN.glob("*.yaml"), *(FOLDER / "manifests").glob("*.yaml")} - files.keys():
        stale.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"chart: wrote {len(files)} files")
    return 0


def _compare(wanted: dict[Path, str], present: Iterable[Path]) -> str:
    stale = [f"{path.relative_to(ROOT)}: nothing renders it" for path in present if path not in wanted]
    for path, text in wanted.items():
        old = path.read_text() if path.exists() else ""
        changed = list(difflib.unified_diff(old.splitlines(), text.splitlines(), "kept", "rendered", n=2, lineterm=""))
        if changed:
            stale.append("\n".join([f"{path.relative_to(ROOT)}: stale", *changed[:30]]))
    if stale:
        raise Wrong("\n".join([*stale, "If that is meant: python scripts/chart.py --update, and commit"]))
    return f"{len(wanted)} files are fresh"


if __name__ == "__main__":
    sys.exit(main())
