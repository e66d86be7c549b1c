# What the scripts share. Sourced, not run. SLOT, STATE, BIN and NODES come from cluster.sh.
NET=172.30.$SLOT                     # underlay /24: this machine is .1, node N is .1N
PODS=10.$((200 + SLOT))              # node N's pods are $PODS.N.0/24
SERVICES=10.$((180 + SLOT))          # services are $SERVICES.0.0/16
BRIDGE=nsmk$SLOT                     # the underlay, in this machine's network namespace; whoever made it has the slot
CGROUP=nsmk$SLOT                     # below which each node has its own
CNI_PLUGINS=/usr/lib/cni             # Debian: containernetworking-plugins
# What each node has of its own besides /run: hostPath volumes, CSI and CNI land there.
NODE_DIRS="/var/lib/kubelet /var/lib/containerd /var/lib/cni /var/lib/networkservicemesh /var/log /etc/cni /opt/cni"
KUBECONFIG=$STATE/pki/admin.conf
PATH=$BIN:$PATH
export SLOT STATE BIN NODES KUBECONFIG PATH
nodepid() { cat "$STATE/node$1/pid"; }
innode() { n=$1; shift; nsenter -t "$(nodepid "$n")" --mount --net --pid --uts --ipc -- "$@"; }
bg() { log=$1; shift; setsid "$@" >>"$STATE/log/$log" 2>&1 </dev/null & echo $! >>"$STATE/pids"; }
