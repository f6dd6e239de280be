# syntax=docker/dockerfile:1
#
#   docker build -t wsiseg .                                                              CUDA: torch of PyPI for linux/amd64
#   docker build -t wsiseg:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   CPU only, much smaller
#   docker run --rm --gpus all -u "$(id -u):$(id -g)" -v "$PWD:/data" wsiseg run slide.svs --seeds seeds.json
#
# The CUDA build of torch brings CUDA's libraries as wheels: the host needs the NVIDIA driver and its container toolkit only.
# The model is inside the wheel of wsiseg; nothing is downloaded at run time.

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY wsiseg ./wsiseg
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt /tmp/constraints.txt
# torch first, alone: it is the large layer, and the only package that may come from another index
RUN pip install --no-cache-dir -c /tmp/constraints.txt --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt /tmp/wheels/*.whl && rm -rf /tmp/wheels /tmp/constraints.txt
RUN useradd --create-home --uid 1000 wsiseg
USER 1000
WORKDIR /data
ENTRYPOINT ["wsiseg"]
CMD ["--help"]
