#!/bin/bash
# Turns a Debian with kind's files into a kind node; runs in the node image's build. prepare.sh KUBERNETES_VERSION
set -euo pipefail

# Modes do not travel with the module's files.
find /etc/containerd /etc/cni /etc/default /etc/sysctl.d /etc/systemd /kind /LICENSES -type d -exec chmod 755 {} +
find /etc/containerd /etc/cni /etc/crictl.yaml /etc/default/kubelet /etc/sysctl.d /etc/systemd/system /kind -type f -exec chmod 644 {} +
chmod 755 /kind/bin/* /usr/local/bin/*

# In a container systemd starts containerd and the kubelet, no devices and no login.
rm -f /lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* /etc/systemd/system/*.wants/* \
    /lib/systemd/system/sockets.target.wants/*{udev,initctl}* \
    /lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service
echo 'ReadKMsg=no' >> /etc/systemd/journald.conf
ln -sf /usr/lib/systemd/systemd /sbin/init
systemctl enable kubelet.service containerd.service undo-mount-hacks.service
systemctl mask systemd-binfmt.service

# Without CAP_SYS_RESOURCE no process may lower its own OOM score.
sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' /etc/containerd/config.toml
grep -q 'restrict_oom_score_adj = true' /etc/containerd/config.toml

# On a cgroup v1 machine systemd would mount every controller that the machine left unmounted, as new hierarchies of the machine:
# show it only those in use, as kind itself does for `misc`.
hide='awk '\''NR == 1 || $2 != 0'\'' /proc/cgroups > /kind/fake-cgroups; mount --bind /kind/fake-cgroups /proc/cgroups'
sed -i "/^remove_misc_controller()/,/^}/ s#^    return 0\$#    $hide\n    return 0#" /usr/local/bin/entrypoint
grep -q 'NR == 1' /usr/local/bin/entrypoint

mkdir -p /etc/kubernetes/manifests /opt/cni
ln -s /usr/lib/cni /opt/cni/bin
for name in containerd containerd-shim-runc-v2; do ln -s "/usr/bin/$name" "/usr/local/bin/$name"; done
for name in kubeadm kubelet kubectl crictl; do ln -s weightsync-kube "/usr/bin/$name"; done
echo -n "$1" > /kind/version
/usr/bin/ctr oci spec \
    | jq '.hooks.createContainer[.hooks.createContainer | length] |= . + {"path": "/kind/bin/mount-product-files.sh"}' \
    | jq 'del(.process.rlimits)' > /etc/containerd/cri-base.json
