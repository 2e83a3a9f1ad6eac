# The environment of requirements.txt on Ubuntu 24.04, whose Python is 3.12. Nobody has built this image yet: this file
# was linted, and its pip commands were run in an empty environment of Python 3.12.
#
#   docker build -t effnet-study \
#     --build-arg EFFNET_COMMIT="$(git describe --always --dirty --abbrev=40 --exclude '*')" .
#
# JupyterLab, which prints its address and token; a study. Without a GPU leave --gpus out, with several add --ipc=host.
#
#   docker run --rm -it --init --gpus all -p 127.0.0.1:8888:8888 \
#     -v effnet-data:/data -v "$PWD/results:/effnet/results" effnet-study
#   docker run --rm -it --init --gpus all \
#     -v effnet-data:/data -v "$PWD/results:/effnet/results" effnet-study effnet study tiny-imagenet
#
# User 1000 must be able to write to results/; docker stop -t 60 leaves time for a checkpoint. The driver must be one
# of CUDA 13, 580 or newer. With some cards this base asks for a driver of its own minor version, which torch can do
# without: -e NVIDIA_REQUIRE_CUDA='cuda>=13.0' says so.

# torch's wheels bring the CUDA libraries that they use, so the smallest base suffices; its CUDA is theirs.
FROM nvidia/cuda:13.2.1-base-ubuntu24.04

# torch.compile needs gcc and Python's headers; git tells the commit of a checkout that is mounted over /effnet, whoever
# owns it. No versions: Ubuntu's archive keeps only the newest of each package, and a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*' \
    && install -d -o 1000 -g 1000 /effnet /data

# Ubuntu's own user "ubuntu". The environment lies in its home, which a dev container can give to another user id
USER 1000
WORKDIR /effnet
ENV PATH=/home/ubuntu/venv/bin:$PATH EFFNET_DATA=/data PYTHONUNBUFFERED=1

# Some gigabytes that change with requirements.txt alone
COPY requirements.txt .
RUN python3 -m venv /home/ubuntu/venv \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements.txt

COPY --chown=1000:1000 . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --editable .

ARG EFFNET_COMMIT
ENV EFFNET_COMMIT=$EFFNET_COMMIT
VOLUME /data
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=/effnet"]
