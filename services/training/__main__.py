"""`python -m services.training`: this service alone, as in its container. Settings: services/common/config.py."""

from __future__ import annotations

from fabrictune.v1 import training_pb2, training_pb2_grpc
from services.common.main import serve_jobs
from services.training.service import TrainingService
from services.training.worker import STAGE

if __name__ == "__main__":
    serve_jobs(
        STAGE, training_pb2.TrainingJob, TrainingService, training_pb2_grpc.add_TrainingServiceServicer_to_server
    )
