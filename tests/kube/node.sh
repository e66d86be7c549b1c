#!/bin/sh
# A node's first process, started by node-up.sh in its own mount, network, PID, UTS and IPC namespaces: node.sh N.
# When it dies, the kernel ends everything in its PID namespace: containerd, kubelet, shims, containers.
set -eu
. "$(dirname "$0")/env.sh"
N=$1 D=$STATE/node$1 IP=$NET.1$1
hostname "node$N"
# sysfs of our own network namespace, with the host's cgroup mounts carried over
mkdir -p "$D/cg"
mount --rbind /sys/fs/cgroup "$D/cg"
mount -t sysfs sysfs /sys
mount --rbind "$D/cg" /sys/fs/cgroup
umount -R "$D/cg"
mount -t tmpfs -o mode=755 tmpfs /run
for d in $NODE_DIRS; do
	mkdir -p "$d" "$D$d"
	mount --bind "$D$d" "$d"
done
# kubelet sets these sysctls for the whole machine unless they already are so: show it that they are
while read -r f v; do
	echo "$v" >"/run/sysctl-$(basename "$f")"
	mount --bind "/run/sysctl-$(basename "$f")" "/proc/sys/$f"
done <<X
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
X
mount --make-rshared /   # kubelet's Bidirectional mounts need it; only now, or the umount above would reach the copy too
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$IP/24" dev eth0
ip link set eth0 up
ip route add default via "$NET.1"
for i in $(seq "$NODES"); do [ "$i" = "$N" ] || ip route add "$PODS.$i.0/24" via "$NET.1$i"; done
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true  # services between pods of one node

mkdir -p /opt/cni/bin /etc/cni/net.d
cp "$CNI_PLUGINS"/* /opt/cni/bin/
cat >/etc/cni/net.d/10-testbed.conflist <<X
{"cniVersion":"0.4.0","name":"testbed","plugins":[
 {"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
  "ipam":{"type":"host-local","ranges":[[{"subnet":"$PODS.$N.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}
X
cat >/run/containerd.toml <<X
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "testbed.local/pause:1"
  restrict_oom_score_adj = true             # no CAP_SYS_RESOURCE: scores cannot be lowered
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
X
containerd --config /run/containerd.toml >/var/log/containerd.log 2>&1 &
until ctr version >/dev/null 2>&1; do sleep 0.1; done
for f in "$STATE"/images/*.tar; do ctr -n k8s.io images import "$f" >/dev/null; done

cat >/run/kubelet.yaml <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false                         # default true since 1.35
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP/node$N
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $STATE/pki/ca.crt}}
authorization: {mode: Webhook}
clusterDNS: [$NET.1]
clusterDomain: cluster.local
resolvConf: ""
failSwapOn: false
oomScoreAdj: 0
featureGates: {KubeletInUserNamespace: true}
evictionHard: {memory.available: 0%, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%}
imageGCHighThresholdPercent: 100
X
kube-testbed kubelet --config=/run/kubelet.yaml --kubeconfig="$STATE/pki/node$N.conf" --hostname-override="node$N" \
	--node-ip="$IP" >/var/log/kubelet.log 2>&1 &
cat >/run/kube-proxy.yaml <<X
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: node$N
clusterCIDR: $PODS.0.0/16
clientConnection: {kubeconfig: $STATE/pki/kube-proxy.conf}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}  # read-only outside the first namespace
oomScoreAdj: 0
X
kube-testbed kube-proxy --config=/run/kube-proxy.yaml >/var/log/kube-proxy.log 2>&1 &
wait
