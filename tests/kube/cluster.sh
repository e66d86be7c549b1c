#!/bin/sh
# The cluster ring: etcd, API server, controller-manager, scheduler and DNS on this machine, and nodes of their own.
#
#   BIN=… NODES=2 cluster.sh           says "ready <state>" when all nodes are; ends all when its standard input closes
#   BIN=… cluster.sh clean             ends what others left that were killed
#
# Its owner holds the other end of standard input: that closes also when the owner is killed.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
: "${NODES:=2}" "${BIN:?where the programs are}"
AT=/var/tmp/nsm-kube-                # on a disk: containers' layers need one

# Ends what is in $STATE, by process id, and removes what it made.
down() {
	for f in "$STATE"/node*/pid; do [ ! -e "$f" ] || kill -9 "$(cat "$f")" 2>/dev/null || true; done   # the kernel ends the rest of a node
	pids=$(cat "$STATE/pids" 2>/dev/null || true)
	for p in $pids; do kill -9 "$p" 2>/dev/null || true; done         # the data is thrown away: no grace
	for p in $pids; do wait "$p" 2>/dev/null || while kill -0 "$p" 2>/dev/null; do sleep 0.05; done; done
	for l in $(ls /sys/class/net | grep "^$BRIDGE-" || true); do ip link del "$l" 2>/dev/null || true; done
	t=0   # containers' processes may take a moment to be gone
	while [ -n "$(cgroups)" ] && [ $t -lt 200 ]; do
		cgroups | while read -r c; do find "$c" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
		t=$((t + 1)); sleep 0.05
	done
	rm -rf "$STATE"
	ip link del "$BRIDGE" 2>/dev/null || true                         # last: now the slot is free
}
cgroups() { for c in /sys/fs/cgroup/$CGROUP /sys/fs/cgroup/*/$CGROUP; do [ ! -d "$c" ] || echo "$c"; done; }

if [ "${1:-}" = clean ]; then
	for STATE in "$AT"*; do
		[ -d "$STATE" ] || continue
		! kill -0 "$(cat "$STATE/owner" 2>/dev/null || echo 0)" 2>/dev/null || continue
		SLOT=${STATE#"$AT"}
		. "$HERE/env.sh"
		down
		echo "$STATE"
	done
	exit 0
fi

SLOT=0
until ip link add "nsmk$SLOT" type bridge 2>/dev/null; do
	SLOT=$((SLOT + 1))
	[ $SLOT -lt 10 ] || { echo "no bridge nsmk0 to nsmk9 can be made: ten clusters run, or there is no right to" >&2; exit 1; }
done
STATE=$AT$SLOT
. "$HERE/env.sh"
trap down EXIT
trap 'exit 1' INT TERM HUP
rm -rf "$STATE"
mkdir -p "$STATE/log"
echo $$ >"$STATE/owner"
: >"$STATE/pids"
P=$STATE/pki
k() { kube-testbed kubectl "$@"; }
# A condition that no longer can come true, because a component has ended, is an error.
alive() { for p in $(cat "$STATE/pids"); do kill -0 "$p" 2>/dev/null || { tail -n 5 "$STATE"/log/* >&2; exit 1; }; done; }
waits() { until "$@" >/dev/null 2>&1; do alive; sleep 0.1; done; }

ip addr add "$NET.1/24" dev "$BRIDGE"
ip link set "$BRIDGE" up
kube-testbed pki "$P" "$NET.1" "$SERVICES.0.1" $(for i in $(seq "$NODES"); do echo "node$i"; done)
bg apiserver.log env KUBE_TESTBED_ETCD_DIR="$STATE/etcd" kube-testbed etcd-apiserver \
	--advertise-address="$NET.1" --bind-address="$NET.1" --secure-port=6443 --service-cluster-ip-range="$SERVICES.0.0/16" \
	--tls-cert-file="$P/apiserver.crt" --tls-private-key-file="$P/apiserver.key" --client-ca-file="$P/ca.crt" \
	--service-account-issuer=https://kubernetes.default.svc.cluster.local \
	--service-account-key-file="$P/sa.pub" --service-account-signing-key-file="$P/sa.key" \
	--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
	--enable-aggregator-routing=true `# webhooks by service: straight to the pods, no kube-proxy here` \
	--kubelet-client-certificate="$P/kubelet-client.crt" --kubelet-client-key="$P/kubelet-client.key" \
	--kubelet-preferred-address-types=InternalIP --profiling=false --etcd-compaction-interval=0
waits k get --raw /readyz
bg kcm.log kube-testbed kube-controller-manager --kubeconfig="$P/kube-controller-manager.conf" \
	--use-service-account-credentials=true --service-account-private-key-file="$P/sa.key" --root-ca-file="$P/ca.crt" \
	--cluster-signing-cert-file="$P/ca.crt" --cluster-signing-key-file="$P/ca.key" \
	--bind-address="$NET.1" --leader-elect=false --profiling=false
bg scheduler.log kube-testbed kube-scheduler --kubeconfig="$P/kube-scheduler.conf" \
	--bind-address="$NET.1" --leader-elect=false --profiling=false
cat >"$STATE/Corefile" <<X
.:53 {
	bind $NET.1
	errors
	kubernetes cluster.local in-addr.arpa {
		kubeconfig $P/admin.conf
		pods insecure
	}
}
X
bg coredns.log coredns -conf "$STATE/Corefile"   # not in a pod: no image and no Service needed
# kube-proxy's role binding is kubeadm's business, not the API server's
k create clusterrolebinding testbed-kube-proxy --clusterrole=system:node-proxier --user=system:kube-proxy >/dev/null
"$HERE/images.sh" base >/dev/null
for i in $(seq "$NODES"); do "$HERE/node-up.sh" "$i"; done
for i in $(seq "$NODES"); do
	waits k get node "node$i"
	k wait --for=condition=Ready "node/node$i" --timeout=120s >/dev/null
done
untainted() { [ -z "$(k get nodes -o jsonpath='{.items[*].spec.taints}')" ]; }
waits untainted                                  # Ready, but still tainted for a moment
echo "ready $STATE"
cat >/dev/null                                   # until the owner leaves
