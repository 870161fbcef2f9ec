# One image for one CUDA machine: docker build -t r1forge . && docker run --gpus all -v $PWD/runs:/r1forge/runs \
#   r1forge accelerate launch -m rl recipes/grpo-qwen2.5-1.5b-math.yaml
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev make git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /r1forge
COPY . .
RUN make install
ENV PATH=/r1forge/.venv/bin:$PATH
CMD ["python", "-m", "rl", "--help"]
