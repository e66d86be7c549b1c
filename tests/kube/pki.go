package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// writePKI fills dir with what a cluster needs: ca.crt/.key, apiserver.crt/.key (serving), kubelet-client.crt/.key,
// sa.key/.pub, and kubeconfigs admin.conf, kube-controller-manager.conf, kube-scheduler.conf, kube-proxy.conf and
// one <node>.conf for each node. The API server is reached at url; it answers for the addresses ips.
func writePKI(dir, url string, ips, nodes []string) {
	must(os.MkdirAll(dir, 0o700))
	in := func(n string) string { return filepath.Join(dir, n) }
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "kube-testbed-ca"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	caKey, caPEM, caKeyPEM := issue(ca, nil, nil)
	put(in("ca.crt"), caPEM)
	put(in("ca.key"), caKeyPEM)
	sa, _, saPEM := issue(&x509.Certificate{}, nil, nil)
	pub, err := x509.MarshalPKIXPublicKey(sa.Public())
	must(err)
	put(in("sa.key"), saPEM)
	put(in("sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))
	var addresses []net.IP
	for _, ip := range ips {
		addresses = append(addresses, net.ParseIP(ip))
	}
	_, crt, key := issue(&x509.Certificate{Subject: pkix.Name{CommonName: "kube-apiserver"},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPAddresses: addresses}, ca, caKey)
	put(in("apiserver.crt"), crt)
	put(in("apiserver.key"), key)
	client := func(file, user string, groups ...string) {
		_, crt, key := issue(&x509.Certificate{Subject: pkix.Name{CommonName: user, Organization: groups}}, ca, caKey)
		if file == "kubelet-client" {
			put(in(file+".crt"), crt)
			put(in(file+".key"), key)
			return
		}
		c := clientcmdapi.NewConfig()
		c.Clusters["testbed"] = &clientcmdapi.Cluster{Server: url, CertificateAuthorityData: caPEM}
		c.AuthInfos[user] = &clientcmdapi.AuthInfo{ClientCertificateData: crt, ClientKeyData: key}
		c.Contexts["testbed"] = &clientcmdapi.Context{Cluster: "testbed", AuthInfo: user}
		c.CurrentContext = "testbed"
		must(clientcmd.WriteToFile(*c, in(file+".conf")))
	}
	client("admin", "testbed-admin", "system:masters")
	client("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
	for _, n := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		client(n, "system:"+n)
	}
	for _, n := range nodes {
		client(n, "system:node:"+n, "system:nodes")
	}
}

// issue signs t by parent (itself when nil) with a fresh key and returns the key and both as PEM.
func issue(t, parent *x509.Certificate, parentKey crypto.Signer) (crypto.Signer, []byte, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	must(err)
	t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(365*24*time.Hour)
	if !t.IsCA {
		t.KeyUsage = x509.KeyUsageDigitalSignature
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	if parent == nil {
		parent, parentKey = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
	must(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(err)
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}

func put(path string, b []byte) { must(os.WriteFile(path, b, 0o600)) }

func must(err error) {
	if err != nil {
		fail(err)
	}
}
