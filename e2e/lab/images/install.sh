#!/bin/sh
# The installing steps of the Dockerfile's build stages. A CA bundle in the context is trusted here and nowhere else.
#   install.sh bootstrap UV_VERSION HATCHLING_VERSION   uv and the project's build backend into /opt/uv
#   install.sh dependencies REQUIREMENTS                 /opt/weightsync, an environment with the pinned requirements, compiled
#   install.sh project SOURCE LAYER                      the files that installing SOURCE without dependencies adds, below LAYER
set -eu
if [ -f /context/ca-bundle.crt ]; then
    export SSL_CERT_FILE=/context/ca-bundle.crt PIP_CERT=/context/ca-bundle.crt
fi
uv=/opt/uv/bin/uv

new_environment() {
    "$uv" venv --quiet --system-site-packages --python "$(command -v python3)" "$1"
}

case "$1" in
bootstrap)
    python3 -m venv /opt/uv
    /opt/uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check "uv==$2" "hatchling==$3"
    ;;
dependencies)
    new_environment /opt/weightsync
    "$uv" pip install --quiet --no-cache --system-certs --compile-bytecode --python /opt/weightsync/bin/python \
        --requirements "$2" --constraints /context/constraints.txt --overrides /context/overrides.txt
    ;;
project)
    cd "$2"
    PATH=/opt/uv/bin:$PATH "$uv" build --quiet --wheel --no-build-isolation --python /opt/uv/bin/python --out-dir /tmp/wheel
    new_environment /opt/weightsync
    find /opt/weightsync -type f -o -type l | sort > /tmp/before
    "$uv" pip install --quiet --offline --no-cache --no-deps --compile-bytecode --python /opt/weightsync/bin/python /tmp/wheel/*.whl
    find /opt/weightsync -type f -o -type l | sort | comm -13 /tmp/before - > /tmp/added
    mkdir -p "$3"
    tar -cf - --files-from /tmp/added --absolute-names | tar -xf - -C "$3" --strip-components=0 --transform 's,^/,,'
    ;;
*)
    echo "install.sh: no step '$1'" >&2
    exit 2
    ;;
esac
