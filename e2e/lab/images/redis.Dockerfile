# Redis from Debian's package: the lab's stand-in for the stock image, which a machine without a registry cannot pull.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/* /etc/redis \
 && useradd --uid 10001 --create-home weightsync
USER 10001
WORKDIR /home/weightsync
ENTRYPOINT ["/usr/bin/redis-server"]
