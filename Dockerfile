# LLaMA-Factory with the plugin, for NVIDIA GPUs. The packages bring CUDA's libraries; the driver is the host's.
#
#   docker build -t llamafactory-adaptive .
#   docker run --rm --gpus all llamafactory-adaptive                    # llamafactory-adaptive doctor
#   docker run --rm --gpus all --shm-size 16g -v "$PWD:/work" -v "$HOME/.cache:/home/user/.cache" \
#       --user "$(id -u):$(id -g)" llamafactory-adaptive llamafactory-cli train my.yaml
#
# A server in the container must listen on 0.0.0.0 (API_HOST=0.0.0.0) to be reached; publish its port to this machine
# alone: -p 127.0.0.1:8000:8000. There is no nvcc inside, which DeepSpeed needs to offload the optimizer.
FROM python:3.11-slim-bookworm

# A compiler for Triton's kernels. Versions are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY . /opt/llamafactory-adaptive
WORKDIR /opt/llamafactory-adaptive
# A wheel, not an editable install: it places the start-up file by itself.
RUN pip install --no-cache-dir -c constraints/llamafactory-0.9.5.txt ".[llamafactory,deepspeed]" \
    && llamafactory-adaptive doctor

# HOME is open to any user, so that `docker run --user` may own what is written to /work.
RUN useradd --create-home --uid 1000 user && chmod 777 /home/user && mkdir /work && chown user /work
ENV HOME=/home/user
USER 1000
WORKDIR /work
CMD ["llamafactory-adaptive", "doctor"]
