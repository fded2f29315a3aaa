# The reference environment for NVIDIA GPUs as a container. From the repository's root:
#
#   docker build -f tools/cuda.Dockerfile -t spin-megatron .
#   docker run --gpus all --ipc host -v /data:/data spin-megatron spin-megatron doctor
#
# The image has nvcc for Transformer Engine's part for torch; the driver of the machine it runs on must know CUDA 13.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG CUDA_ARCHS=90
ARG MAX_JOBS=4
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends git make python3.12-dev python3.12-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/spin_megatron
COPY . .
RUN CUDA_ARCHS="$CUDA_ARCHS" MAX_JOBS="$MAX_JOBS" tools/cuda_environment.sh /opt/cuda_environment
ENTRYPOINT ["/bin/bash", "-c", ". /opt/cuda_environment/activate && exec \"$@\"", "spin-megatron"]
CMD ["spin-megatron", "--help"]
