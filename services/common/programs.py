"""The environment that programs of torch get from us: ms-swift, vLLM, transformers."""

from __future__ import annotations

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""No hub is asked: what they read is in the artifact store."""

SHARED_CORES = {"GOMP_SPINCOUNT": "4000"}
"""For cores that others use too: a rollout's old engine, a pod's neighbours.

A thread of GNU OpenMP that waits for the others of its program spins, for milliseconds unless it is told not to, on the
core that those need: two programs side by side take 3 to 6 times as long as one. After 4000 turns it sleeps. With 1000 a
training that has the cores for itself takes a tenth longer, for it is put to sleep and woken too often (docs/training.md).
"""

TORCH_PROGRAM = OFFLINE | SHARED_CORES
MS_SWIFT = {"USE_HF": "1"}
"""Besides: it would ask ModelScope's hub, which knows no offline mode."""
