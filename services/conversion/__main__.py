"""`python -m services.conversion`: this service alone, as in its container. Settings: services/common/config.py."""

from __future__ import annotations

from fabrictune.v1 import conversion_pb2, conversion_pb2_grpc
from services.common.main import serve_jobs
from services.conversion.service import ConversionService
from services.conversion.worker import STAGE

if __name__ == "__main__":
    serve_jobs(
        STAGE,
        conversion_pb2.ConversionJob,
        ConversionService,
        conversion_pb2_grpc.add_ConversionServiceServicer_to_server,
    )
