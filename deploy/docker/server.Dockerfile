# The cache server.  From the repository's root:
#   docker build -f deploy/docker/server.Dockerfile -t lmconnector/cache-server:0.1.0 .
FROM python:3.11-slim

COPY pyproject.toml README.md LICENSE /src/
COPY cache_server /src/cache_server
COPY lmconnector /src/lmconnector
# pip compiles what it installs: nothing has to be written at the start, and the start is quick.
RUN pip install --no-cache-dir /src && rm -rf /src

# The uid is also the engines': what lies in the runtime dir is its own.
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 9470
# It has signal handlers of its own, so it may be process 1.
ENTRYPOINT ["cache-server"]
CMD ["run"]
