"""`fabrictune artifacts push ARTIFACT hf://…`: an artifact goes to a model hub, with its card."""

from __future__ import annotations

from collections.abc import Sequence

from fabrictune import local, publishing
from fabrictune.cli.context import console, errors, print_json, say, settings
from fabrictune.cli.progress import new_progress


def publish_artifact(
    name: str,
    address: publishing.HubAddress,
    public: bool,
    license_id: str,
    reports: Sequence[str],
    leave_out: Sequence[str],
    dry_run: bool,
) -> None:
    """Publish, or with dry_run print what would be published. Raises ApiError, and errors of the services' tree."""
    with settings().connect() as client:
        planned = publishing.plan(client, name, address, license_id, reports, leave_out)
        if dry_run:
            _show(planned)
            return
        local.check_publishing(address.hub)
        with new_progress(errors) as display:
            task = display.add_task(f"pull {name}", total=planned.artifact.size_bytes, figures="bytes")
            folder = publishing.lay_out(client, planned, lambda n: display.advance(task, n))
    done = local.publish_folder(
        address.hub,
        address.name,
        planned.artifact.kind,
        folder,
        public=public,
        license_id=license_id,
        message=f"{name} sha256:{planned.artifact.digest[:12]}",
    )
    publishing.clear(planned)
    seen = "private" if done.private else "public"
    say({"address": done.address, "private": done.private}, f"{name} is at {done.address} ({seen})")


def _show(planned: publishing.Publication) -> None:
    if settings().json:
        print_json({"card": planned.card, "files": planned.files})
        return
    text = "\n".join([planned.card, "Files:", *(f"  {path}" for path in planned.files)])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
