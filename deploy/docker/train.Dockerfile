# syntax=docker/dockerfile:1.7
# Training, Ray and JupyterLab. From the project's root:
#   docker build -f deploy/docker/train.Dockerfile --target cuda -t cxr-pred-train .
#   docker build -f deploy/docker/train.Dockerfile --target rocm --build-arg TORCH_INDEX=... -t cxr-pred-train-rocm .   (by hand only: the pipeline does not build it)
ARG PYTHON=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS tools
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# nvtop shows NVIDIA's and AMD's GPUs; Debian keeps it in contrib. make and git: the notebooks and DVC use them
# hadolint ignore=DL3008
RUN sed -i 's/^Components: main$/Components: main contrib/' /etc/apt/sources.list.d/debian.sources \
    && apt-get update \
    && apt-get install --yes --no-install-recommends nvtop git make g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 cxr && useradd --uid 10001 --gid cxr --create-home --shell /bin/bash cxr
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true \
    DVC_NO_ANALYTICS=1 GRADIO_ANALYTICS_ENABLED=False
COPY deploy/docker/entrypoint.sh /opt/entrypoint.sh
# JupyterLab 8888, Ray 6379, its dashboard 8265
EXPOSE 8888 6379 8265
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/entrypoint.sh"]
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser"]

FROM tools AS build
RUN python -m venv /opt/venv
COPY deploy/docker/requirements/train-common.lock deploy/docker/requirements/build.lock /tmp/
RUN /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/build.lock \
    && /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --no-build-isolation --no-deps -r /tmp/train-common.lock

FROM build AS install-cuda
COPY deploy/docker/requirements/train-cuda.lock /tmp/
RUN /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/train-cuda.lock

FROM build AS install-rocm
# AMD's torch is on an index of its own, one for each ROCm: name the one that the driver of the machines has
ARG TORCH_INDEX
ARG TORCH=2.15.0
ARG TORCHVISION=0.29.2
RUN test -n "${TORCH_INDEX}" || { echo "Give --build-arg TORCH_INDEX=, the index of torch ${TORCH} for the machines' ROCm." >&2; exit 1; }
RUN /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --index-url "${TORCH_INDEX}" "torch==${TORCH}" "torchvision==${TORCHVISION}"

FROM tools AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=install-cuda /opt/venv /opt/venv
COPY . /opt/cxr_pred
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/cxr_pred
USER 10001:10001
WORKDIR /srv/cxr
HEALTHCHECK NONE

FROM tools AS rocm
COPY --from=install-rocm /opt/venv /opt/venv
COPY . /opt/cxr_pred
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/cxr_pred
USER 10001:10001
WORKDIR /srv/cxr
HEALTHCHECK NONE
