"""`python -m services.evaluation`: this service alone, as in its container. Settings: services/common/config.py."""

from __future__ import annotations

from fabrictune.v1 import evaluation_pb2, evaluation_pb2_grpc
from services.common.main import serve_jobs
from services.evaluation.service import EvaluationService
from services.evaluation.worker import STAGE

if __name__ == "__main__":
    serve_jobs(
        STAGE,
        evaluation_pb2.EvaluationJob,
        EvaluationService,
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server,
    )
