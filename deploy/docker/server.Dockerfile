# The cache server.  From the repository's root:
#   docker build -f deploy/docker/server.Dockerfile -t lmconnector/cache-server:0.1.0 .
#   install -d -o 10001 -m 0700 /dev/shm/cache-server
#   docker run -v /dev/shm/cache-server:/dev/shm/cache-server -p 127.0.0.1:9470:9470 lmconnector/cache-server:0.1.0
# Engines mount the same directory, and run as the same user.
FROM python:3.11-slim

COPY pyproject.toml README.md LICENSE /src/
COPY cache_server /src/cache_server
COPY lmconnector /src/lmconnector
# pip compiles what it installs: nothing has to be written at the start, and the start is quick.
RUN pip install --no-cache-dir /src && rm -rf /src

# The uid is also the engines': what lies in the runtime dir is its own.
USER 10001:10001
# In a container of its own loopback is nobody's: who may reach the port is what `-p` and the network say.
ENV PYTHONUNBUFFERED=1 CACHE_SERVER_HTTP=0.0.0.0:9470
EXPOSE 9470
# It has signal handlers of its own, so it may be process 1.
ENTRYPOINT ["cache-server"]
CMD ["run"]
