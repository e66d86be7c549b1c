package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// The second Workload API: it reads the configuration of `nsm identity` where that is JSON, as labs write it, and
// behaves as SPIRE's agent does where the two differ. Who is not entered yet is refused, and asks again; a stream
// hears of rotations. An entry in another trust domain gets its certificate from another CA; each knows the other's
// roots. SIGHUP begins with new CAs, and leaves the old roots in the bundles until the next one. A restart has new ones.
type workloads struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	file string

	lock    sync.Mutex
	domains map[string]*domain
	changed chan struct{} // closed at the next rotation
}

type domain struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	old  []byte // the root before this one, DER
}

type configuration struct {
	TrustDomain string
	Sockets     []struct{ Path, Node string }
	Entries     []struct {
		SpiffeID  string `json:"spiffeId"`
		Node      string
		Selectors struct {
			NetNS, Exe string
			PID        int32
		}
	}
}

func (w *workloads) read() (c configuration) {
	if err := json.Unmarshal(must(os.ReadFile(w.file)), &c); err != nil {
		fail(err.Error())
	}
	return c
}

func identity(ctx context.Context, o *options) {
	w := &workloads{file: o.config, domains: map[string]*domain{}, changed: make(chan struct{})}
	for _, socket := range w.read().Sockets {
		_ = os.MkdirAll(filepath.Dir(socket.Path), 0o755)
		_ = os.Remove(socket.Path)
		listener := must(net.Listen("unix", socket.Path))
		server := grpc.NewServer()
		workloadpb.RegisterSpiffeWorkloadAPIServer(server, w)
		go func() { _ = server.Serve(&attesting{listener, socket.Node}) }()
		go func() { <-ctx.Done(); server.Stop() }()
	}
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	go func() {
		for range hangups {
			w.rotate()
		}
	}()
	serveUntilEnd(ctx)
}

func (w *workloads) rotate() {
	w.lock.Lock()
	defer w.lock.Unlock()
	for name, before := range w.domains {
		w.domains[name] = newDomain(name)
		w.domains[name].old = before.root.Raw
	}
	close(w.changed)
	w.changed = make(chan struct{})
	say("rotated", "domains", len(w.domains))
}

func newDomain(name string) *domain {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "CA of " + name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{{Scheme: "spiffe", Host: name}},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &domain{root: must(x509.ParseCertificate(der)), key: key}
}

func (d *domain) bundle() []byte { return append(append([]byte{}, d.root.Raw...), d.old...) }

func (d *domain) sign(id *url.URL) (certificate, key []byte) {
	own := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{id}, BasicConstraintsValid: true,
	}
	return must(x509.CreateCertificate(rand.Reader, template, d.root, &own.PublicKey, d.key)), must(x509.MarshalPKCS8PrivateKey(own))
}

// svid is what a caller gets at present, and a channel that closes when it is out of date.
func (w *workloads) svid(ctx context.Context) (*workloadpb.X509SVIDResponse, chan struct{}, error) {
	if md, ok := metadata.FromIncomingContext(ctx); !ok || len(md.Get("workload.spiffe.io")) != 1 {
		return nil, nil, status.Error(codes.InvalidArgument, "security header missing from request")
	}
	p, _ := peer.FromContext(ctx)
	from, ok := p.Addr.(*attested)
	if !ok {
		return nil, nil, status.Error(codes.Internal, "not attested")
	}
	w.lock.Lock()
	defer w.lock.Unlock()
	c := w.read()
	names := map[string]bool{c.TrustDomain: true}
	var id *url.URL
	for _, entry := range c.Entries {
		entered := must(url.Parse(entry.SpiffeID))
		names[entered.Host] = true
		s := entry.Selectors
		proc := fmt.Sprintf("/proc/%d/", from.pid)
		fits := (s.PID != 0 && s.PID == from.pid) || (s.NetNS != "" && inode("/run/netns/"+s.NetNS) == inode(proc+"ns/net")) ||
			(s.Exe != "" && inode(s.Exe) == inode(proc+"exe"))
		if id == nil && fits && entry.Node == from.node {
			id = entered
		}
	}
	if id == nil {
		return nil, nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	for name := range names {
		if w.domains[name] == nil {
			w.domains[name] = newDomain(name)
		}
	}
	own := w.domains[id.Host]
	certificate, key := own.sign(id)
	answer := &workloadpb.X509SVIDResponse{
		Svids:            []*workloadpb.X509SVID{{SpiffeId: id.String(), X509Svid: certificate, X509SvidKey: key, Bundle: own.bundle()}},
		FederatedBundles: map[string][]byte{},
	}
	for name, other := range w.domains {
		if name != id.Host {
			answer.FederatedBundles["spiffe://"+name] = other.bundle()
		}
	}
	return answer, w.changed, nil
}

func (w *workloads) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	for {
		answer, changed, err := w.svid(stream.Context())
		if err != nil {
			say("refused FetchX509SVID", "why", err)
			return err
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		say("sent FetchX509SVID", "id", answer.GetSvids()[0].GetSpiffeId(), "federated", len(answer.GetFederatedBundles()))
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (w *workloads) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream workloadpb.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	for {
		answer, changed, err := w.svid(stream.Context())
		if err != nil {
			return err
		}
		own := must(url.Parse(answer.GetSvids()[0].GetSpiffeId())).Host
		bundles := answer.GetFederatedBundles()
		bundles["spiffe://"+own] = answer.GetSvids()[0].GetBundle()
		if err := stream.Send(&workloadpb.X509BundlesResponse{Bundles: bundles}); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// attesting asks the kernel who connects.
type attesting struct {
	net.Listener
	node string
}

type attested struct {
	node string
	pid  int32
}

func (*attested) Network() string  { return "unix" }
func (a *attested) String() string { return fmt.Sprintf("pid %d on %s", a.pid, a.node) }

type attestedConn struct {
	net.Conn
	from *attested
}

func (c *attestedConn) RemoteAddr() net.Addr { return c.from }

func (l *attesting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	from := &attested{node: l.node}
	if raw, err := conn.(*net.UnixConn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if credentials, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
				from.pid = credentials.Pid
			}
		})
	}
	return &attestedConn{conn, from}, nil
}

func inode(path string) string {
	stat := syscall.Stat_t{}
	if err := syscall.Stat(path, &stat); err != nil {
		return strings.Join([]string{path, err.Error()}, " ")
	}
	return fmt.Sprintf("%d/%d", stat.Dev, stat.Ino)
}
