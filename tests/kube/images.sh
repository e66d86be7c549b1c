#!/bin/sh
# images.sh make NAME ROOTFS_DIR [ENTRYPOINT...]  packs a directory into $STATE/images/<name>.tar (docker archive)
# images.sh load FILE.tar...                      imports archives on every running node
# images.sh base                                  makes the pause image and a busybox image (busybox-static, from Debian)
# With SLOT, STATE, BIN and NODES of a cluster. Use the names with imagePullPolicy: Never or IfNotPresent: nothing is pulled.
set -eu
. "$(dirname "$0")/env.sh"
mkdir -p "$STATE/images"

make() {
	name=$1 root=$2; shift 2
	out=$STATE/images/$(echo "$name" | tr '/:' '__').tar
	t=$(mktemp -d)
	tar -C "$root" --owner=0 --group=0 --numeric-owner --mtime=@0 --sort=name -cf "$t/layer.tar" .
	d=$(sha256sum "$t/layer.tar" | cut -d' ' -f1)
	ep=; for a in "$@"; do ep="$ep${ep:+,}\"$a\""; done
	printf '{"architecture":"amd64","os":"linux","config":{"Entrypoint":[%s],"Env":["PATH=/bin:/sbin:/usr/bin:/usr/sbin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]},"history":[{"created_by":"images.sh"}]}' "$ep" "$d" >"$t/config.json"
	printf '[{"Config":"config.json","RepoTags":["%s"],"Layers":["layer.tar"]}]' "$name" >"$t/manifest.json"
	tar -C "$t" -cf "$out" manifest.json config.json layer.tar
	rm -r "$t"
	echo "$out"
}

load() {
	for i in $(seq "$NODES"); do
		for f in "$@"; do innode "$i" ctr -n k8s.io images import "$f" >/dev/null; done
	done
}

base() {
	r=$(mktemp -d)
	cp "$BIN/pause" "$r/pause"
	make testbed.local/pause:1 "$r" /pause
	rm "$r/pause"
	mkdir -p "$r/bin" "$r/tmp" "$r/etc" "$r/proc" "$r/sys" "$r/dev"
	cp "$(command -v busybox)" "$r/bin/busybox"
	for a in $("$r/bin/busybox" --list); do [ "$a" = busybox ] || ln -s busybox "$r/bin/$a"; done
	make testbed.local/busybox:1 "$r" /bin/sh
	rm -r "$r"
}

c=$1; shift; "$c" "$@"
