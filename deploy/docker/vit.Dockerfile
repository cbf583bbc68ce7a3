# syntax=docker/dockerfile:1.7
# The service that reads films. From the project's root: docker build -f deploy/docker/vit.Dockerfile -t cxr-pred-vit .
ARG PYTHON=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS wheel
COPY deploy/docker/requirements/build.lock /tmp/
RUN python -m pip install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/build.lock
WORKDIR /src
COPY setup.py settings.ini README.md ./
COPY cxr_pred cxr_pred
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON} AS install
RUN python -m venv --without-pip /opt/venv
# vit; page: the same service with the page at /; watch: what looks for drift
ARG LOCK=vit
COPY deploy/docker/requirements/${LOCK}.lock /tmp/requirements.lock
# wheels only, and only those whose hashes the lock lists: nothing is compiled, nothing is new
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/requirements.lock
COPY --from=wheel /wheels /wheels
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index --find-links /wheels cxr_pred \
    # tools for making models, which nothing here does
    && rm -r /opt/venv/lib/python3.11/site-packages/onnxruntime/transformers /opt/venv/lib/python3.11/site-packages/onnxruntime/tools /opt/venv/lib/python3.11/site-packages/onnxruntime/datasets \
    && /opt/venv/bin/python -m compileall -q /opt/venv/lib

FROM ${PYTHON}
LABEL org.opencontainers.image.title="cxr-pred-vit" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Reads radiographs. Research software, not a medical device."
RUN groupadd --gid 10001 cxr && useradd --uid 10001 --gid cxr --no-create-home --shell /usr/sbin/nologin cxr \
    && install --directory --owner=cxr --group=cxr --mode=0700 /var/lib/cxr
COPY --from=install /opt/venv /opt/venv
COPY models/release /opt/bundle
COPY deploy/docker/entrypoint.sh /opt/entrypoint.sh
# written at build time: the root is read-only when it runs
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 CXR_BUNDLE=/opt/bundle CXR_STATE=/var/lib/cxr
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["/opt/entrypoint.sh"]
CMD ["cxr-pred", "serve", "--no-ui", "--host", "0.0.0.0", "--port", "8000"]
