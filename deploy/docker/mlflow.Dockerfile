# syntax=docker/dockerfile:1.7
# The tracking server. From the project's root: docker build -f deploy/docker/mlflow.Dockerfile -t cxr-pred-mlflow .
ARG PYTHON=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS install
RUN python -m venv --without-pip /opt/venv
COPY deploy/docker/requirements/mlflow.lock /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /tmp/mlflow.lock \
    && /opt/venv/bin/python -m compileall -q /opt/venv/lib

FROM ${PYTHON}
LABEL org.opencontainers.image.title="cxr-pred-mlflow" org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 cxr && useradd --uid 10001 --gid cxr --no-create-home --shell /usr/sbin/nologin cxr
COPY --from=install /opt/venv /opt/venv
COPY deploy/docker/entrypoint.sh /opt/entrypoint.sh
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["/opt/entrypoint.sh"]
# the database and the bucket come from MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--serve-artifacts"]
