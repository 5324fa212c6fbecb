# What the engine and the training worker stand on for GPUs: NVIDIA's runtime on Red Hat's base, which has packages of
# Python 3.11, the version of the locks. gcc and headers stay in it, since Triton compiles the launcher of a kernel when it
# first runs. `make images VARIANT=cuda` builds it first.
ARG BASE=nvidia/cuda:13.0.2-runtime-ubi9
FROM ${BASE}
# No versions: whatever Red Hat has fixed by now.
# hadolint ignore=DL3041
RUN dnf install -y --nodocs python3.11 python3.11-pip python3.11-devel gcc && dnf clean all
