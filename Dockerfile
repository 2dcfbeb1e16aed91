# One file, three images: docker build --target cpu|gpu|tpu -t trainer .
#
# Dependencies are locked with hashes in docker/ (`make lock`). The package itself is copied last, so that a change in the code
# makes a small layer in seconds. The program is process 1 and handles signals itself.

FROM python:3.11-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
COPY docker/entry.py /tmp/entry.py
RUN python3 -m venv /opt/trainer && install -m 755 /tmp/entry.py /opt/trainer/bin/trainer

# -- the package, for all targets
FROM builder AS package
COPY docker/requirements-build.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip /opt/trainer/bin/pip install --require-hashes -r /tmp/requirements.txt
COPY setup.py pyproject.toml README.md LICENSE /source/
COPY trainer /source/trainer
RUN /opt/trainer/bin/pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/package /source \
    && rm -rf /opt/package/bin

# -- dependencies, for each target
FROM builder AS dependencies-cpu
COPY docker/requirements-cpu.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip /opt/trainer/bin/pip install --require-hashes -r /tmp/requirements.txt

FROM builder AS dependencies-gpu
COPY docker/requirements-gpu.txt /tmp/requirements.txt
# XLA on GPUs calls ptxas, which comes with the CUDA wheels.
RUN --mount=type=cache,target=/root/.cache/pip /opt/trainer/bin/pip install --require-hashes -r /tmp/requirements.txt \
    && test -x /opt/trainer/lib/python3.11/site-packages/nvidia/cuda_nvcc/bin/ptxas

FROM builder AS dependencies-tpu
COPY docker/requirements-tpu.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip /opt/trainer/bin/pip install --require-hashes -r /tmp/requirements.txt

# -- what all targets share: an unprivileged user, and the places that may be written to
#
# The working folder is /, so the default --model_dir is /runs/NAME. /runs and /tmp are volumes: they can be written to under
# --read-only, by any user, and lie on disk, not in memory. HOME is /tmp, for libraries that insist on one.
FROM python:3.11-slim-bookworm AS runtime
RUN groupadd --gid 10001 trainer \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp trainer \
    && mkdir -p /runs \
    && chmod 1777 /runs
ENV PATH=/opt/trainer/bin:$PATH HOME=/tmp TMPDIR=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
VOLUME ["/runs", "/tmp"]
WORKDIR /
USER 10001:10001
LABEL org.opencontainers.image.title="pix2pix-trainer" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["trainer"]

# -- the images; version and revision come last, so that a new one leaves the layers of packages where they are

FROM runtime AS gpu
COPY --from=dependencies-gpu /opt/trainer /opt/trainer
COPY --from=package /opt/package /opt/trainer/lib/python3.11/site-packages
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/trainer/lib/python3.11/site-packages/nvidia/cuda_nvcc/bin:$PATH \
    XLA_FLAGS=--xla_gpu_cuda_data_dir=/opt/trainer/lib/python3.11/site-packages/nvidia/cuda_nvcc
ARG VERSION=0 REVISION=
ENV TRAINER_REVISION=$REVISION
LABEL org.opencontainers.image.description="Distributed training of paired image-to-image translation, for NVIDIA GPUs" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION

FROM runtime AS tpu
COPY --from=dependencies-tpu /opt/trainer /opt/trainer
COPY --from=package /opt/package /opt/trainer/lib/python3.11/site-packages
ARG VERSION=0 REVISION=
ENV TRAINER_REVISION=$REVISION
LABEL org.opencontainers.image.description="Distributed training of paired image-to-image translation, for the TPUs of one host" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION

# The last stage is what a build without --target makes.
FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/trainer /opt/trainer
COPY --from=package /opt/package /opt/trainer/lib/python3.11/site-packages
ARG VERSION=0 REVISION=
ENV TRAINER_REVISION=$REVISION
LABEL org.opencontainers.image.description="Distributed training of paired image-to-image translation, for CPUs" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION
