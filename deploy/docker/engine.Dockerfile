# vLLM with the connector.  From the repository's root:
#   docker build -f deploy/docker/engine.Dockerfile -t lmconnector/vllm:0.1.0 .
ARG VLLM=vllm/vllm-openai:v0.32.0
FROM ${VLLM}

COPY pyproject.toml README.md LICENSE /src/
COPY cache_server /src/cache_server
COPY lmconnector /src/lmconnector
RUN python3 -m pip install --no-cache-dir /src && rm -rf /src

USER 10001:10001
