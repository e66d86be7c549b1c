// kube-testbed: every Kubernetes component a test needs, in one static program, built from Go modules.
//
//	kube-testbed api-ring <dir> <port> <more flags>      etcd and an API server for a test (see ring.go)
//	kube-testbed etcd-apiserver <kube-apiserver flags>   embedded etcd (unix socket) + kube-apiserver, one process
//	kube-testbed kube-apiserver|kube-controller-manager|kube-scheduler|kube-proxy|kubelet <flags>
//	kube-testbed kubectl <args>
//	kube-testbed pki <dir> <apiserver IP> <first service IP> <node>...   CA, certificates, kubeconfigs (see pki.go)
//
// One component per process: feature gates and the version registry are process-wide globals.
// With KUBE_TESTBED_ETCD_DIR set, `etcd-apiserver` keeps etcd's data there (fsync off: throw-away data).
package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"
	_ "time/tzdata"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("usage: kube-testbed <component> [flags]"))
	}
	name := os.Args[1]
	os.Args = append([]string{name}, os.Args[2:]...) // the components read os.Args themselves
	var c *cobra.Command
	switch name {
	case "api-ring":
		if len(os.Args) < 3 {
			fail(fmt.Errorf("usage: kube-testbed api-ring <dir> <port> [kube-apiserver flags]"))
		}
		os.Args = append([]string{name}, append(apiRing(os.Args[1], os.Args[2]), os.Args[3:]...)...)
		c = apiserver.NewAPIServerCommand()
	case "etcd-apiserver":
		endpoint := startEtcd(os.Getenv("KUBE_TESTBED_ETCD_DIR"))
		os.Args = append(os.Args, "--etcd-servers="+endpoint)
		c = apiserver.NewAPIServerCommand()
	case "kube-apiserver":
		c = apiserver.NewAPIServerCommand()
	case "kube-controller-manager":
		c = kcm.NewControllerManagerCommand()
	case "kube-scheduler":
		c = scheduler.NewSchedulerCommand()
	case "kube-proxy":
		c = proxy.NewProxyCommand()
	case "kubelet":
		c = kubelet.NewKubeletCommand(context.Background())
	case "pki":
		if len(os.Args) < 4 {
			fail(fmt.Errorf("usage: kube-testbed pki <dir> <apiserver IP> <first service IP> <node>..."))
		}
		dir, ip, service := os.Args[1], os.Args[2], os.Args[3]
		writePKI(dir, "https://"+ip+":6443", []string{"127.0.0.1", ip, service}, os.Args[4:])
		return
	case "kubectl":
		c = kubectl.NewDefaultKubectlCommand()
	default:
		fail(fmt.Errorf("unknown component %q", name))
	}
	os.Exit(cli.Run(c))
}

// startEtcd runs a one-member etcd in this process and returns its client endpoint (a unix socket).
func startEtcd(dir string) string {
	if dir == "" {
		d, err := os.MkdirTemp("", "kube-testbed-etcd-")
		if err != nil {
			fail(err)
		}
		dir = d
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		fail(err)
	}
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "client.sock")}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"} // nobody connects; what is advertised cannot be unix
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(dir, "data")
	cfg.LogLevel = "error"
	cfg.UnsafeNoFsync = true
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{peer}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		fail(err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(60 * time.Second):
		fail(fmt.Errorf("etcd not ready after 60 s"))
	}
	return client.String()
}

func fail(err error) { fmt.Fprintln(os.Stderr, "kube-testbed:", err); os.Exit(1) }
