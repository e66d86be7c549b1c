package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/golang-jwt/jwt/v4"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/networkservicemesh/sdk/pkg/tools/spiffejwt"
	"github.com/networkservicemesh/sdk/pkg/tools/token"
)

// The log is what tests believe. A line is a verb, a method and facts, as
// `served NetworkService/Request peer=spiffe://… code=OK asked=(conn=c-0 …) answered=(…)`:
//
//	served, called     a call that came, that went, with the answer's code
//	serving, calling   a stream that was opened
//	sent, got          a message of a stream

var saying sync.Mutex

func say(verb string, facts ...any) {
	line := verb
	for i := 0; i+1 < len(facts); i += 2 {
		line += fmt.Sprintf(" %v=%v", facts[i], facts[i+1])
	}
	tell(line)
}

func tell(line string) {
	saying.Lock()
	defer saying.Unlock()
	_, _ = fmt.Fprintln(os.Stdout, time.Now().Format("15:04:05.000000"), strings.ReplaceAll(line, "\n", " "))
}

// describe tells what of a message tests look for.
func describe(message any) string {
	switch m := message.(type) {
	case *networkservice.NetworkServiceRequest:
		offered := ""
		for _, preference := range m.GetMechanismPreferences() {
			offered += preference.GetCls() + "/" + preference.GetType() + ";"
		}
		return connection(m.GetConnection()) + " offered=" + offered
	case *networkservice.Connection:
		return connection(m)
	case *networkservice.ConnectionEvent:
		text := "type=" + m.GetType().String()
		for _, one := range m.GetConnections() {
			text += " [" + connection(one) + "]"
		}
		return text
	case *registryapi.NetworkServiceEndpoint:
		return fmt.Sprintf("nse=%s services=%s url=%s future=%v", m.GetName(), strings.Join(m.GetNetworkServiceNames(), ","), m.GetUrl(), future(m))
	case *registryapi.NetworkServiceEndpointQuery:
		return fmt.Sprintf("watch=%v %s", m.GetWatch(), describe(m.GetNetworkServiceEndpoint()))
	case *registryapi.NetworkServiceEndpointResponse:
		return fmt.Sprintf("deleted=%v %s", m.GetDeleted(), describe(m.GetNetworkServiceEndpoint()))
	case *registryapi.NetworkService:
		return fmt.Sprintf("ns=%s payload=%s matches=%d", m.GetName(), m.GetPayload(), len(m.GetMatches()))
	case *registryapi.NetworkServiceQuery:
		return fmt.Sprintf("watch=%v %s", m.GetWatch(), describe(m.GetNetworkService()))
	case *registryapi.NetworkServiceResponse:
		return fmt.Sprintf("deleted=%v %s", m.GetDeleted(), describe(m.GetNetworkService()))
	default:
		return ""
	}
}

// connection tells what tests look for; every field ends with a blank.
func connection(c *networkservice.Connection) string {
	client := ""
	if segments := c.GetPath().GetPathSegments(); len(segments) > 0 {
		client = segments[0].GetId()
	}
	mechanism := c.GetMechanism()
	parameters := ""
	// In the order in which a person reads them; tokens never.
	for _, key := range []string{"inodeURL", "name", "src_ip", "src_port", "dst_ip", "dst_port", "vni", "mtu"} {
		if value, ok := mechanism.GetParameters()[key]; ok {
			parameters += key + ":" + value + ";"
		}
	}
	return fmt.Sprintf("conn=%s service=%s nse=%s state=%s hops=%d mechanism=%s/%s parameters=%s src=%s dst=%s excluded=%s extra=%v future=%v labels=%v ",
		client, c.GetNetworkService(), c.GetNetworkServiceEndpointName(), c.GetState(), len(c.GetPath().GetPathSegments()),
		mechanism.GetCls(), mechanism.GetType(), parameters,
		strings.Join(c.GetContext().GetIpContext().GetSrcIpAddrs(), ","), strings.Join(c.GetContext().GetIpContext().GetDstIpAddrs(), ","),
		strings.Join(c.GetContext().GetIpContext().GetExcludedPrefixes(), ","), c.GetContext().GetExtraContext(), future(c), c.GetLabels())
}

func method(full string) string {
	return full[strings.LastIndexByte(full, '.')+1:]
}

func who(info credentials.AuthInfo) string {
	if secure, ok := info.(credentials.TLSInfo); ok && len(secure.State.PeerCertificates) > 0 {
		if uris := secure.State.PeerCertificates[0].URIs; len(uris) > 0 {
			return uris[0].String()
		}
	}
	return "unknown"
}

func caller(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return who(p.AuthInfo)
	}
	return "unknown"
}

// newer makes a message one of a later version of the protocol: it has a field that nobody knows yet.
func newer(message any) any {
	original, ok := message.(proto.Message)
	if !ok || future(original) {
		return message
	}
	changed := proto.Clone(original)
	field := protowire.AppendTag(nil, 77, protowire.BytesType)
	field = protowire.AppendString(field, "a field of the future")
	reflected := changed.ProtoReflect()
	reflected.SetUnknown(append(reflected.GetUnknown(), field...))
	return changed
}

// future tells whether a message has that field.
func future(message proto.Message) bool {
	return bytes.Contains(message.ProtoReflect().GetUnknown(), []byte("a field of the future"))
}

func code(err error) string {
	if err == nil {
		return "OK"
	}
	return fmt.Sprintf("%s why=%q", status.Code(err), err.Error())
}

func serveUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	answer, err := handle(ctx, request)
	say("served "+method(info.FullMethod), "peer", caller(ctx), "code", code(err), "asked", "("+describe(request)+")", "answered", "("+describe(answer)+")")
	if err != nil {
		return answer, err
	}
	return newer(answer), nil
}

type servedStream struct {
	grpc.ServerStream
	method string
}

func (s *servedStream) RecvMsg(message any) error {
	err := s.ServerStream.RecvMsg(message)
	if err == nil {
		say("serving "+s.method, "peer", caller(s.Context()), "query", "("+describe(message)+")")
	}
	return err
}

func (s *servedStream) SendMsg(message any) error {
	err := s.ServerStream.SendMsg(newer(message))
	say("sent "+s.method, "peer", caller(s.Context()), "code", code(err), "message", "("+describe(message)+")")
	return err
}

func serveStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	err := handle(server, &servedStream{stream, method(info.FullMethod)})
	say("served "+method(info.FullMethod), "peer", caller(stream.Context()), "code", code(err))
	return err
}

func callUnary(ctx context.Context, full string, request, answer any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	var p peer.Peer
	err := invoke(ctx, full, newer(request), answer, conn, append(opts, grpc.Peer(&p))...)
	say("called "+method(full), "peer", who(p.AuthInfo), "code", code(err), "asked", "("+describe(request)+")", "answered", "("+describe(answer)+")")
	return err
}

type calledStream struct {
	grpc.ClientStream
	method string
}

func (s *calledStream) SendMsg(message any) error {
	return s.ClientStream.SendMsg(newer(message))
}

func (s *calledStream) RecvMsg(message any) error {
	err := s.ClientStream.RecvMsg(message)
	if err == nil {
		say("got "+s.method, "peer", caller(s.Context()), "message", "("+describe(message)+")")
	} else {
		say("called "+s.method, "peer", caller(s.Context()), "code", code(err))
	}
	return err
}

func callStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, full string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, conn, full, opts...)
	if err != nil {
		return nil, err
	}
	return &calledStream{stream, method(full)}, nil
}

// security is mutual TLS with SVIDs from the Workload API, descriptors below it, and tokens above it.
type security struct {
	server []grpc.ServerOption
	dial   []grpc.DialOption
	tokens token.GeneratorFunc
}

func secure(ctx context.Context, o *options) *security {
	source := must(workloadapi.NewX509Source(ctx))
	say("identity", "id", must(source.GetX509SVID()).ID)
	client := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeAny())
	server := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny())
	client.MinVersion, server.MinVersion = tls.VersionTLS12, tls.VersionTLS12
	s := &security{tokens: tokens(source, o)}
	s.server = []grpc.ServerOption{
		grpc.Creds(grpcfd.TransportCredentials(credentials.NewTLS(server))),
		grpc.ChainUnaryInterceptor(serveUnary), grpc.ChainStreamInterceptor(serveStream),
	}
	s.dial = []grpc.DialOption{
		// As upstream's own programs have it: only so their time for connecting bounds anything.
		grpc.WithBlock(),
		grpc.WithTransportCredentials(grpcfd.TransportCredentials(credentials.NewTLS(client))),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.PerRPCCredentials(token.NewPerRPCCredentials(s.tokens))),
		grpc.WithChainUnaryInterceptor(callUnary, func(ctx context.Context, m string, request, answer any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(ctx, m, request, answer, conn, append(opts, grpc.PerRPCCredentials(pause(o.fdPause)))...)
		}),
		grpc.WithChainStreamInterceptor(callStream),
		grpcfd.WithChainStreamInterceptor(), grpcfd.WithChainUnaryInterceptor(),
	}
	return s
}

// pause lets queued descriptors go out before the call. Upstream hands them to the connection in a task of their own
// that races with the call's own write; those that lose travel with the next write, which may be long in coming.
type pause time.Duration

func (p pause) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	time.Sleep(time.Duration(p))
	return nil, nil
}

func (pause) RequireTransportSecurity() bool { return false }

// tokens are upstream's, or such as nobody may accept.
func tokens(source *workloadapi.X509Source, o *options) token.GeneratorFunc {
	honest := spiffejwt.TokenGeneratorFunc(source, o.tokenLifetime)
	if o.token == "honest" {
		return honest
	}
	return func(info credentials.AuthInfo) (string, time.Time, error) {
		svid, err := source.GetX509SVID()
		if err != nil {
			return "", time.Time{}, err
		}
		key, expires, audience := crypto.Signer(svid.PrivateKey), time.Now().Add(o.tokenLifetime), who(info)
		switch o.token {
		case "forged":
			key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		case "expired":
			expires = time.Now().Add(-time.Minute)
		case "misdirected":
			audience = svid.ID.String() + "/somebody-else"
		default:
			fail("there are no tokens " + o.token)
		}
		return signed(svid, key, audience, expires)
	}
}

func signed(svid *x509svid.SVID, key crypto.Signer, audience string, expires time.Time) (string, time.Time, error) {
	claims := jwt.RegisteredClaims{
		Subject: svid.ID.String(), Audience: jwt.ClaimStrings{audience}, ExpiresAt: jwt.NewNumericDate(expires),
	}
	text, err := jwt.NewWithClaims(jwt.SigningMethodES256, claims).SignedString(key)
	return text, expires, err
}

// serve listens on all URLs of the role.
func serve(ctx context.Context, o *options, s *security, register func(*grpc.Server)) {
	server := grpc.NewServer(s.server...)
	register(server)
	for _, u := range urls(o.listenOn) {
		if u.Scheme == "unix" {
			_ = os.Remove(u.Path)
		}
		failures := grpcutils.ListenAndServe(ctx, u, server)
		go func() {
			if err := <-failures; err != nil && ctx.Err() == nil {
				fail(err.Error())
			}
		}()
	}
}
