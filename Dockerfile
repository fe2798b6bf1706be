# One image for every role: head, worker, verifier.
#
#   docker build -t trueweight .                                             CPU and, with `docker run --gpus all`, CUDA
#   docker build -t trueweight --build-arg TORCH_INDEX=<index> .             another build of the same torch release
#
# PyPI's Linux wheels of torch carry CUDA and its libraries (several GB) and run on machines without a GPU as well. TORCH_INDEX takes one
# of the indexes that PyTorch's installation page lists: .../whl/cpu for the small CPU-only image, .../whl/cuXYZ for one CUDA release.
# Exact results do not depend on the choice.

ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /trueweight
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY storage storage
COPY ledger ledger
COPY runtime runtime
COPY verification verification
COPY trueweight trueweight
COPY benchmarks benchmarks
COPY recipes recipes
RUN pip install -c constraints.txt -e .

RUN useradd --create-home trueweight && chown trueweight /trueweight
USER trueweight
ENTRYPOINT ["python", "-m", "trueweight"]
CMD ["--help"]
