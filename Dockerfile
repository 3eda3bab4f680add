# longspec on a CPU, serving OpenAI's endpoints on port 8000. The key is wanted of every client:
#
#   docker build -t longspec .
#   docker run -e LONGSPEC_API_KEY=... -p 8000:8000 -v longspec:/home/user/.cache longspec
#   docker run --rm -v longspec:/home/user/.cache longspec pull qwen3-4b
#
# TORCH_INDEX is an index of torch's builds for the CPU; without it pip takes gigabytes of CUDA packages on x86-64.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The C kernels are compiled where they run, for the processor that is there; by whichever gcc the base image's Debian has.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY . /tmp/longspec
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "/tmp/longspec[serve]" && rm -rf /tmp/longspec

RUN useradd --create-home --uid 1000 user && install --directory --owner user /home/user/.cache
USER 1000
WORKDIR /home/user
VOLUME /home/user/.cache
EXPOSE 8000
ENTRYPOINT ["longspec"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
