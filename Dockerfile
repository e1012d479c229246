# The main job on NVIDIA's PyTorch image, whose builds are used and not replaced. Built without a GPU:
#
#     docker build -t mpo_megatron .
#     docker run --rm --gpus all --ipc=host mpo_megatron python tools/doctor.py
#
# 26.06 holds Ubuntu 24.04, Python 3.12.3, torch 2.13.0a0+8145d630e8 and CUDA 13.3, which needs driver 580 or later
# (docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-26-06.html), NCCL 2.30.4, Transformer Engine 2.16.0
# and apex (github.com/Helian2s/multi-gpu-training, containers/base-image-compatibility.md: read out of the image), and
# flash-attn 2.7.4.post1 and NumPy 1.26 by other public inventories; no megatron-core, no NeMo, no transformers. It could
# not be pulled where this file was written. nvcr.io/nvidia/nemo:26.06 has the same Transformer Engine on an older torch,
# and megatron-core 0.18 in source folders that are not on Python's path: nothing in it is missing here.
# The digest is that of the tag's index of platforms (x86-64 and Arm).
FROM nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/mpo_megatron

# The image's own constraints (/etc/pip/constraint.txt, by PIP_CONSTRAINT) pin all that its makers had, newer or not than
# what is needed here. They are left out for these two steps alone; tools/image_pins.py holds what the image has.
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY tools/image_pins.py tools/
RUN export PIP_CONSTRAINT='' PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore; \
    pins() { python tools/image_pins.py "$@"; }; \
    pins built > /tmp/before.txt; \
    pins requirements > /tmp/requirements.txt; \
    pins free > /tmp/free.txt; \
    pip install --no-cache-dir --dry-run --report /tmp/report.json -c /tmp/free.txt -r /tmp/requirements.txt; \
    pins held /tmp/report.json > /tmp/held.txt; \
    pip install --no-cache-dir -c /tmp/held.txt -r /tmp/requirements.txt; \
    test -z "$(comm -23 /tmp/before.txt <(pins built) | tee /dev/stderr)"; \
    rm /tmp/before.txt /tmp/requirements.txt /tmp/free.txt /tmp/report.json /tmp/held.txt

# Not as root, so that what a job writes into mounted folders is no one else's.
RUN useradd --create-home --uid 1001 --shell /bin/bash mpo && chown 1001:1001 .
COPY --chown=1001:1001 . .
RUN PIP_CONSTRAINT='' PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir --no-deps -e .
USER 1001:1001

# Rows have another length at every step.
ENV PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# The image's entry point stays: it tells at start whether the driver fits.
CMD ["python", "tools/doctor.py"]
