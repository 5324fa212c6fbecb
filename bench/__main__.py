"""`make bench` (`python -m bench [NAME …]`): speed and memory, side by side with a named baseline in one run.

These figures are ratios of medians of rounds in turn, since machines are noisy; none of them is a test.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable

NAMES = (
    "transfer",
    "merging",
    "conversion",
    "training",
    "training_memory",
    "training_switches",
    "training_attention",
    "shared_cores",
    "serving",
    "serving_vllm",
)
ON_A_CLUSTER = ("kubernetes",)
"""Run by name only: they need a release that `fabrictune connect` has reached."""


def main() -> None:
    """Run the named benchmarks, or all."""
    wanted = sys.argv[1:] or list(NAMES)
    unknown = [name for name in wanted if name not in (*NAMES, *ON_A_CLUSTER)]
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(unknown)}; there are {', '.join((*NAMES, *ON_A_CLUSTER))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `finally` ends the servers that a benchmark has started
    failed = False
    for name in wanted:
        run: Callable[[], bool] = importlib.import_module(f"bench.{name}").run
        failed |= not run()
    sys.exit(failed)


if __name__ == "__main__":
    main()
