"""`python -m services.merging`: this service alone, as in its container. Settings: services/common/config.py."""

from __future__ import annotations

from fabrictune.v1 import merging_pb2, merging_pb2_grpc
from services.common.main import serve_jobs
from services.merging.service import MergingService
from services.merging.worker import STAGE

if __name__ == "__main__":
    serve_jobs(STAGE, merging_pb2.MergeJob, MergingService, merging_pb2_grpc.add_MergingServiceServicer_to_server)
