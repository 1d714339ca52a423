# syntax=docker/dockerfile:1
# The service, its workers and the command line, in one image.
#   docker build -t onnx-qat .
#   docker build -t onnx-qat:cuda --build-arg ACCELERATOR=cuda .     `onnx-qat finetune --device cuda` works in it
#   --build-arg EXTRAS=scale                                         with PostgreSQL, S3 and Celery

ARG PYTHON=3.11-slim-bookworm
ARG ACCELERATOR=cpu

FROM python:${PYTHON} AS build
ARG ACCELERATOR
ARG EXTRAS=
# constraints.txt holds for what is installed and for what builds it.
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY rewriter rewriter
COPY service service
# Without pip in it: nothing is installed after this.
# hadolint ignore=DL3013
RUN extras="${ACCELERATOR}${EXTRAS:+,${EXTRAS}}" \
    && if [ "${ACCELERATOR}" = cuda ]; then extras="${extras},cuda-libraries"; fi \
    && python -m venv --without-pip /opt/onnx-qat \
    && pip --python /opt/onnx-qat/bin/python install ".[${extras}]"

FROM python:${PYTHON} AS runtime
# A named volume takes over owner and mode of the directory that it is first mounted on.
RUN groupadd --gid 10001 onnx-qat \
    && useradd --uid 10001 --gid onnx-qat --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin onnx-qat \
    && install -d -o onnx-qat -g onnx-qat -m 0750 /data \
    && python -m pip uninstall --yes pip setuptools wheel
ENV PATH=/opt/onnx-qat/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ONNX_QAT_DATA_DIR=/data \
    ONNX_QAT_LOG_FORMAT=json

FROM runtime AS runtime-cpu

FROM runtime AS runtime-cuda
# CUDA 11.8 and cuDNN 8 come as Python packages (extra `cuda-libraries`); of the host only the driver is used.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUDA_PACKAGES=/opt/onnx-qat/lib/python3.11/site-packages/nvidia
ENV LD_LIBRARY_PATH=$CUDA_PACKAGES/cublas/lib:$CUDA_PACKAGES/cuda_runtime/lib:$CUDA_PACKAGES/cudnn/lib:$CUDA_PACKAGES/cufft/lib:$CUDA_PACKAGES/curand/lib

# hadolint ignore=DL3006
FROM runtime-${ACCELERATOR}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="onnx-qat" \
      org.opencontainers.image.description="Quantization-aware training for ONNX files, as a service" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/onnx-qat /opt/onnx-qat
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
CMD ["onnx-qat", "serve", "--host", "0.0.0.0", "--port", "8000"]
