# Container images of the services. docs/images.md says how to build and run them.
#
# Targets: router, prefill, decode, cli. The stage `build` compiles. `--build-context binaries=DIR` replaces the stage
# `binaries` with a folder: then nothing is compiled, and no Rust image is pulled.

# The same number as in Cargo.toml; a test compares them.
ARG VERSION=0.1.0
ARG REVISION=unknown
# Has Rust and a C compiler.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
# Has a C compiler, and nvcc if FEATURES has cuda. With rdma, it must be Debian or Ubuntu. Its C library must not be newer than
# the one of BASE_IMAGE.
ARG BUILD_IMAGE=docker.io/library/rust:1.95-bookworm
# Has the C and C++ libraries, CA certificates and time zones, and no shell. `@sha256:...` pins it.
ARG BASE_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS rust

FROM ${BUILD_IMAGE} AS build
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup
ENV PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# An image without Rust, such as NVIDIA's, gets it from the Rust image.
RUN --mount=type=bind,from=rust,source=/usr/local,target=/rust \
    command -v cargo || cp -a /rust/cargo /rust/rustup /usr/local/
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo install --locked --root /usr/local/auditable cargo-auditable@0.7.7
WORKDIR /source
COPY . .
# Empty, cuda, rdma, or cuda,rdma.
ARG FEATURES=
RUN case ",$FEATURES," in *,rdma,*) \
        apt-get update && apt-get install -y --no-install-recommends cmake libclang-dev libibverbs1 ibverbs-providers \
        && rm -rf /var/lib/apt/lists/* ;; \
    esac
# Cache mounts are not part of the layer, so the binaries are copied out of them. /out/lib gets the libraries that the
# binaries open when they run, /out/etc the list of RDMA drivers. Binaries look for NCCL without a version.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,id=overfill-target,target=/source/target \
    set -eu; \
    export PATH="/usr/local/auditable/bin:$PATH" CARGO_TARGET_DIR="target/${FEATURES:-cpu}"; \
    set --; cuda=; rdma=; \
    for feature in $(echo "$FEATURES" | tr , ' '); do \
        case "$feature" in \
            cuda) cuda=nccl; export CUDA_HOME=/usr/local/cuda ;; \
            rdma) rdma=rdma ;; \
            *) echo "FEATURES is \"$FEATURES\"; it must be empty, cuda, rdma, or cuda,rdma" >&2; exit 1 ;; \
        esac; \
    done; \
    for feature in $cuda $rdma; do \
        for package in prefill-node decode-node cli; do set -- "$@" --features "overfill-$package/$feature"; done; \
    done; \
    cargo auditable build --locked --release --bins \
        -p overfill-router -p overfill-prefill-node -p overfill-decode-node -p overfill-cli "$@"; \
    mkdir -p /out/bin /out/lib /out/etc; \
    for name in overfill-router overfill-prefill overfill-decode overfill; do \
        cp "$CARGO_TARGET_DIR/release/$name" /out/bin/; \
    done; \
    if [ -n "$rdma" ]; then \
        libraries=/usr/lib/$(uname -m)-linux-gnu; \
        cp -L "$libraries"/libibverbs.so.1 "$libraries"/libnl-3.so.200 "$libraries"/libnl-route-3.so.200 \
            "$libraries"/libmlx5.so.1 "$libraries"/libefa.so.1 "$libraries"/libibverbs/lib*-rdmav*.so /out/lib/; \
        cp -r /etc/libibverbs.d /out/etc/; \
    fi; \
    if [ -n "$cuda" ]; then \
        cp -L /usr/local/cuda/lib64/libcublasLt.so.13 /usr/lib/*-linux-gnu/libnccl.so.2 /out/lib/; \
        ln -s libnccl.so.2 /out/lib/libnccl.so; \
    fi

# bin/ has the binaries, lib/ the libraries that the base image lacks, etc/ files for /etc.
FROM scratch AS binaries
COPY --from=build /out/ /

FROM ${BASE_IMAGE} AS base
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.vendor="Overfill" \
      org.opencontainers.image.source="https://github.com/overfill/overfill" \
      org.opencontainers.image.licenses="Apache-2.0"
# The only folder that is worth mounting something writable at. Caches of models and of the demo pair go there.
ENV HOME=/tmp
WORKDIR /
USER 65532:65532

FROM base AS router
LABEL org.opencontainers.image.title="overfill-router" \
      org.opencontainers.image.description="Routes requests through prefill and decode nodes"
COPY --from=binaries --chmod=0755 bin/overfill-router /usr/bin/overfill-router
ENV OVERFILL_HTTP=0.0.0.0:8080 OVERFILL_GRPC=0.0.0.0:50051
EXPOSE 8080 50051
ENTRYPOINT ["/usr/bin/overfill-router"]

FROM base AS node
COPY --from=binaries lib/ /usr/local/cuda/lib64/
COPY --from=binaries etc/ /etc/
ENV LD_LIBRARY_PATH=/usr/local/cuda/lib64
COPY demo/full/ /usr/share/overfill/demo/full/
COPY demo/decode/ /usr/share/overfill/demo/decode/

FROM node AS prefill
LABEL org.opencontainers.image.title="overfill-prefill" \
      org.opencontainers.image.description="Computes prompts with the full model and hands over their KV"
COPY --from=binaries --chmod=0755 bin/overfill-prefill /usr/bin/overfill-prefill
ENV OVERFILL_LISTEN=0.0.0.0:50061 OVERFILL_ADMIN=0.0.0.0:9090
EXPOSE 50061 9090
ENTRYPOINT ["/usr/bin/overfill-prefill"]

FROM node AS decode
LABEL org.opencontainers.image.title="overfill-decode" \
      org.opencontainers.image.description="Decodes requests over the full model's KV"
COPY --from=binaries --chmod=0755 bin/overfill-decode /usr/bin/overfill-decode
ENV OVERFILL_LISTEN=0.0.0.0:50071 OVERFILL_KV_LISTEN=0.0.0.0:50072 OVERFILL_ADMIN=0.0.0.0:9090
EXPOSE 50071 50072 9090
ENTRYPOINT ["/usr/bin/overfill-decode"]

FROM node AS cli
LABEL org.opencontainers.image.title="overfill-cli" \
      org.opencontainers.image.description="The command overfill: clusters on one machine, clients, tools for models"
COPY --from=binaries --chmod=0755 bin/overfill /usr/bin/overfill
ENTRYPOINT ["/usr/bin/overfill"]
