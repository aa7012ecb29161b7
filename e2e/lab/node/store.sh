#!/bin/bash
# Works on a node's image store (/var/lib/containerd) while no node uses it: forgets what an earlier cluster ran, and imports the
# image archive on standard input. store.sh prune | store.sh import
set -euo pipefail
printf 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n' > /tmp/containerd.toml
containerd --config /tmp/containerd.toml > /tmp/containerd.log 2>&1 &
for _ in $(seq 200); do
    ctr version > /dev/null 2>&1 && break
    sleep 0.1
done
case "$1" in
prune)
    ctr --namespace k8s.io containers ls --quiet | xargs --no-run-if-empty ctr --namespace k8s.io containers rm
    ;;
import)
    ctr --namespace k8s.io images import --all-platforms -
    ;;
esac
kill %1
wait %1 || true
rm -rf /var/lib/containerd/io.containerd.grpc.v1.cri /var/lib/containerd/io.containerd.runtime.v2.task
