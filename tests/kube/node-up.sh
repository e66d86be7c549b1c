#!/bin/sh
# node-up.sh N: starts node N of a running cluster; cluster.sh calls it, and so may a test after `kill -9 $(cat $STATE/nodeN/pid)`:
# the node then comes back as after a reboot (its disk stays, its /run is new).
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/env.sh"
i=$1
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then   # cgroup v2 (not tried yet)
	mkdir -p "/sys/fs/cgroup/$CGROUP/node$i"
	for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
		for d in "" "/$CGROUP" "/$CGROUP/node$i"; do echo "+$c" >"/sys/fs/cgroup$d/cgroup.subtree_control" || true; done
	done
else                                                # cgroup v1: one tree per controller
	for c in /sys/fs/cgroup/*/; do
		mkdir -p "$c$CGROUP/node$i"
		[ -e "$c/cpuset.cpus" ] || continue
		for d in "$CGROUP" "$CGROUP/node$i"; do   # a cpuset starts empty, and an empty one takes no process
			for f in cpuset.cpus cpuset.mems; do cat "$c/$f" >"$c$d/$f"; done
		done
	done
fi
mkdir -p "$STATE/node$i"
# What was there before may still be going: its link goes with its namespace, a moment after its last process.
while [ -e "$STATE/node$i/pid" ] && kill -0 "$(nodepid "$i")" 2>/dev/null; do sleep 0.02; done
ip link del "$BRIDGE-$i" 2>/dev/null || true
bg "node$i.log" unshare --mount --net --pid --uts --ipc --propagation private --mount-proc --fork --kill-child "$HERE/node.sh" "$i"
u=$!
until c=$(cat "/proc/$u/task/$u/children" 2>/dev/null) && [ -n "$c" ]; do kill -0 $u; sleep 0.02; done
echo $c >"$STATE/node$i/pid"
ip link add "$BRIDGE-$i" type veth peer name eth0 netns "$(nodepid "$i")"
ip link set "$BRIDGE-$i" master "$BRIDGE" up
ip route replace "$PODS.$i.0/24" via "$NET.1$i"     # host (apiserver, tests) to pods
