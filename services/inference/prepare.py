"""What runs in an engine's pod before vLLM: fetch the model, and make the parity reference unless the store has it.

    python -m services.inference.prepare

The inference service says which in FABRICTUNE_MODEL, _MODEL_DIGEST, _REFERENCE_DTYPE and _TRUST_REMOTE_CODE. The reference
is computed here since this image has transformers and this pod the memory; the service itself has neither.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.common.artifacts import Artifacts
from services.common.config import load_store
from services.common.errors import FabrictuneError, InvalidSpec
from services.common.store import Store, open_store
from services.inference.reference import compute_reference, reference_from_json, reference_key, reference_to_json

MODELS = Path("/models")
MODEL_FOLDER = MODELS / "model"
"""Where the engine finds its model: a link into the cache beside it."""


def adapter_folder(digest: str) -> Path:
    """Where the engine finds an adapter."""
    return MODELS / "cache" / digest


def prepare(store: Store, models: Path, name: str, digest: str, dtype: str, trust_remote_code: bool) -> Path:
    """Returns the model's folder. Raises NotFound, DataLoss, InvalidData, and what the store raises."""
    folder = Artifacts(store, models / "cache").cached(name, digest)
    link = models / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    key = reference_key(digest, dtype)
    stored = store.get_json(key)
    if stored is None or reference_from_json(stored) is None:
        print(f"computing the parity reference of {name} in {dtype}", flush=True)
        store.put_json(key, reference_to_json(compute_reference(folder, digest, dtype, trust_remote_code)))
    return folder


def main() -> int:
    """Entry of the process; the exit status is that of the error."""
    try:
        asked = {k: os.environ.get(f"FABRICTUNE_{k}", "") for k in ("MODEL", "MODEL_DIGEST", "REFERENCE_DTYPE")}
        if missing := [f"FABRICTUNE_{k}" for k, value in asked.items() if not value]:
            raise InvalidSpec(f"{', '.join(missing)} must be set; the inference service does it")
        trusted = os.environ.get("FABRICTUNE_TRUST_REMOTE_CODE") == "true"
        name, digest, dtype = asked.values()
        folder = prepare(open_store(load_store()), MODELS, name, digest, dtype, trusted)
    except FabrictuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the model is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
