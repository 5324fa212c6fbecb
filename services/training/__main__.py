"""`python -m services.training`: this service alone, as in its container. Settings: services/common/config.py."""

from __future__ import annotations

from services.common.main import serve_jobs
from services.training.service import OFFER

if __name__ == "__main__":
    serve_jobs(OFFER)
