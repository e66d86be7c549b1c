package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// apiRing runs etcd and an API server on loopback for one owner, and returns the flags of the latter.
//
// The owner holds the other end of standard input. When that closes, which it also does when the owner is killed, the
// directory is removed and the process ends. Killed itself and started again with the same directory and port, it goes
// on with the data that it had. "ready" on standard output says that requests are served.
func apiRing(dir, port string) []string {
	pki, url := filepath.Join(dir, "pki"), "https://127.0.0.1:"+port
	in := func(name string) string { return filepath.Join(pki, name) }
	if _, err := os.Stat(in("admin.conf")); os.IsNotExist(err) {
		writePKI(pki, url, []string{"127.0.0.1", "10.96.0.1"}, nil)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		// What is still being written into it is removed by the next attempt.
		for i := 0; i < 100 && os.RemoveAll(dir) != nil; i++ {
			time.Sleep(10 * time.Millisecond)
		}
		os.Exit(0)
	}()
	etcd := startEtcd(filepath.Join(dir, "etcd"))
	go func() {
		config, err := clientcmd.BuildConfigFromFlags("", in("admin.conf"))
		must(err)
		client, err := kubernetes.NewForConfig(config)
		must(err)
		for {
			_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background())
			if err == nil {
				fmt.Println("ready")
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	return []string{
		"--etcd-servers=" + etcd, "--etcd-compaction-interval=0",
		"--bind-address=127.0.0.1", "--secure-port=" + port,
		"--permit-port-sharing=true",      // the owner has bound the port, so that it is free, and stays ours
		"--endpoint-reconciler-type=none", // endpoints must not be loopback addresses
		"--service-cluster-ip-range=10.96.0.0/16",
		"--tls-cert-file=" + in("apiserver.crt"), "--tls-private-key-file=" + in("apiserver.key"),
		"--client-ca-file=" + in("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + in("sa.pub"), "--service-account-signing-key-file=" + in("sa.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--profiling=false",
	}
}
