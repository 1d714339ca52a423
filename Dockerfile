# syntax=docker/dockerfile:1
# The service in one container: API, embedded workers, SQLite and files under /data.

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/onnx-qat
ENV PATH=/opt/onnx-qat/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml README.md ./
COPY rewriter rewriter
COPY service service
# The project itself; pyproject.toml pins what must be pinned.
# hadolint ignore=DL3013
RUN pip install '.[cpu]'

FROM python:3.11-slim
COPY --from=build /opt/onnx-qat /opt/onnx-qat
ENV PATH=/opt/onnx-qat/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ONNX_QAT_DATA_DIR=/data \
    ONNX_QAT_LOG_FORMAT=json
# A named volume takes over owner and mode of the directory that it is first mounted on.
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin onnx-qat \
    && install -d -o onnx-qat -g onnx-qat -m 0750 /data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
CMD ["onnx-qat", "serve", "--host", "0.0.0.0", "--port", "8000"]
