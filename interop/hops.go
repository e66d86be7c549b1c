package main

import (
	"context"
	"encoding/json"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/edwarnicke/genericsync"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"sigs.k8s.io/yaml"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	vxlanmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/vxlan"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	nsendpoint "github.com/networkservicemesh/sdk/pkg/networkservice/chains/endpoint"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/connect"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/discover"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/filtermechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/recvfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/vxlan/vni"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanismtranslation"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/null"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/roundrobin"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/networkservice/ipam/point2pointipam"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/memory"
	registryauthorize "github.com/networkservicemesh/sdk/pkg/registry/common/authorize"
	registryrecvfd "github.com/networkservicemesh/sdk/pkg/registry/common/recvfd"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	authmonitor "github.com/networkservicemesh/sdk/pkg/tools/monitorconnection/authorize"
)

// policies are upstream's own, for one side of a registry call.
func policies(side string) registryauthorize.Option {
	return registryauthorize.WithPolicies("etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/"+side+"/.*.rego")
}

func hopAuthorization() (networkservice.NetworkServiceServer, networkservice.MonitorConnectionServer) {
	known := &genericsync.Map[spiffeid.ID, *genericsync.Map[string, struct{}]]{}
	return authorize.NewServer(authorize.WithSpiffeIDConnectionMap(known)),
		authmonitor.NewMonitorConnectionServer(authmonitor.WithSpiffeIDConnectionMap(known))
}

func registry(ctx context.Context, o *options) {
	s := secure(ctx, o)
	serve(ctx, o, s, memory.NewServer(ctx, s.tokens,
		memory.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(policies("server"))),
		memory.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(policies("client"))),
		memory.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(policies("server"))),
		memory.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(policies("client"))),
		memory.WithDefaultExpiration(o.expirePeriod), memory.WithProxyRegistryURL(&url.URL{}), memory.WithDialOptions(s.dial...)).Register)
	if o.networkServices != "" {
		own := serviceRegistry(ctx, s, urls(o.listenOn)[0])
		for _, service := range resources(o.networkServices) {
			must(own.Register(ctx, service))
		}
	}
	serveUntilEnd(ctx)
}

// resources reads NetworkService resources from a YAML file.
func resources(file string) (services []*registryapi.NetworkService) {
	for _, document := range strings.Split(string(must(os.ReadFile(file))), "---\n") {
		var resource struct {
			Metadata struct{ Name string }
			Spec     json.RawMessage
		}
		if err := yaml.Unmarshal([]byte(document), &resource); err != nil {
			fail(err.Error())
		}
		service := &registryapi.NetworkService{Payload: "ETHERNET"}
		if len(resource.Spec) > 0 {
			if err := json.Unmarshal(resource.Spec, service); err != nil {
				fail(err.Error())
			}
		}
		service.Name = resource.Metadata.Name
		services = append(services, service)
	}
	return services
}

func serviceRegistry(ctx context.Context, s *security, at *url.URL) registryapi.NetworkServiceRegistryClient {
	return registryclient.NewNetworkServiceRegistryClient(ctx, registryclient.WithClientURL(at), registryclient.WithDialOptions(s.dial...),
		registryclient.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(policies("client"))))
}

func manager(ctx context.Context, o *options) {
	s := secure(ctx, o)
	hop, events := hopAuthorization()
	listen := urls(o.listenOn)
	options := []nsmgr.Option{
		nsmgr.WithName(o.name), nsmgr.WithURL(listen[len(listen)-1].String()), nsmgr.WithDialTimeout(o.dialTimeout),
		nsmgr.WithAuthorizeServer(hop), nsmgr.WithAuthorizeMonitorConnectionServer(events),
		nsmgr.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(policies("server"))),
		nsmgr.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(policies("client"))),
		nsmgr.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(policies("server"))),
		nsmgr.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(policies("client"))),
		nsmgr.WithForwarderServiceName("forwarder"), nsmgr.WithDialOptions(s.dial...),
	}
	if o.registryURL != "" {
		options = append(options, nsmgr.WithRegistry(urls(o.registryURL)[0]))
	}
	serve(ctx, o, s, nsmgr.NewServer(ctx, s.tokens, options...).Register)
	serveUntilEnd(ctx)
}

// offerVXLAN proposes a tunnel to whoever comes next; the addresses are filled in behind it.
type offerVXLAN struct{}

func (offerVXLAN) Request(ctx context.Context, request *networkservice.NetworkServiceRequest, opts ...grpc.CallOption) (*networkservice.Connection, error) {
	request.MechanismPreferences = append(request.GetMechanismPreferences(),
		&networkservice.Mechanism{Cls: cls.REMOTE, Type: vxlanmech.MECHANISM, Parameters: map[string]string{}})
	return next.Client(ctx).Request(ctx, request, opts...)
}

func (offerVXLAN) Close(ctx context.Context, conn *networkservice.Connection, opts ...grpc.CallOption) (*emptypb.Empty, error) {
	return next.Client(ctx).Close(ctx, conn, opts...)
}

func forwarder(ctx context.Context, o *options) {
	s := secure(ctx, o)
	hop, events := hopAuthorization()
	at := registryclient.WithClientURL(urls(o.connectTo)[0])
	dial := registryclient.WithDialOptions(s.dial...)
	tunnel := net.ParseIP(o.tunnelIP)
	serve(ctx, o, s, nsendpoint.NewServer(ctx, s.tokens, nsendpoint.WithName(o.name),
		nsendpoint.WithAuthorizeServer(hop), nsendpoint.WithAuthorizeMonitorConnectionServer(events),
		nsendpoint.WithAdditionalFunctionality(
			recvfd.NewServer(),
			sendfd.NewServer(),
			// A manager names endpoints of its node by inode and passes their sockets as descriptors.
			discover.NewServer(registryclient.NewNetworkServiceRegistryClient(ctx, at, dial),
				registryclient.NewNetworkServiceEndpointRegistryClient(ctx, at, dial,
					registryclient.WithNSEAdditionalFunctionality(registryrecvfd.NewNetworkServiceEndpointRegistryClient()))),
			roundrobin.NewServer(),
			mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
				kernelmech.MECHANISM: null.NewServer(),
				vxlanmech.MECHANISM:  vni.NewServer(tunnel),
			}),
			connect.NewServer(client.NewClient(ctx, client.WithName(o.name), client.WithoutRefresh(), client.WithDialOptions(s.dial...),
				client.WithDialTimeout(o.dialTimeout),
				client.WithAdditionalFunctionality(mechanismtranslation.NewClient(), kernel.NewClient(), offerVXLAN{}, vni.NewClient(tunnel),
					filtermechanisms.NewClient(), recvfd.NewClient(), sendfd.NewClient()))))).Register)
	labels := pairs(o.labels)
	if len(labels) == 0 {
		labels = map[string]string{"p2p": "true"}
	}
	register(ctx, o, s, &registryapi.NetworkServiceEndpoint{
		Name: o.name, NetworkServiceNames: []string{"forwarder"}, Url: urls(o.listenOn)[0].String(),
		NetworkServiceLabels: map[string]*registryapi.NetworkServiceLabels{"forwarder": {Labels: labels}},
	})
	serveUntilEnd(ctx)
}

func endpoint(ctx context.Context, o *options) {
	s := secure(ctx, o)
	_, pool, err := net.ParseCIDR(o.cidrPrefix)
	must(pool, err)
	serve(ctx, o, s, nsendpoint.NewServer(ctx, s.tokens, nsendpoint.WithName(o.name), nsendpoint.WithAuthorizeServer(authorize.NewServer()),
		nsendpoint.WithAdditionalFunctionality(point2pointipam.NewServer(pool), recvfd.NewServer(),
			mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{kernelmech.MECHANISM: kernel.NewServer()}),
			sendfd.NewServer())).Register)
	names, labels := strings.Split(o.serviceNames, ","), map[string]*registryapi.NetworkServiceLabels{}
	for _, name := range names {
		labels[name] = &registryapi.NetworkServiceLabels{Labels: pairs(o.labels)}
		if o.registerService {
			must(serviceRegistry(ctx, s, urls(o.connectTo)[0]).Register(ctx, &registryapi.NetworkService{Name: name, Payload: o.payload}))
		}
	}
	unregister := register(ctx, o, s, &registryapi.NetworkServiceEndpoint{
		Name: o.name, NetworkServiceNames: names, NetworkServiceLabels: labels, Url: urls(o.listenOn)[0].String(),
	})
	serveUntilEnd(ctx)
	unregister()
}

// register registers by the descriptor of the own socket, and refreshes as long as the process lives.
func register(ctx context.Context, o *options, s *security, nse *registryapi.NetworkServiceEndpoint) (unregister func()) {
	// The one that unregisters outlives the signal.
	last := context.WithoutCancel(ctx)
	c := registryclient.NewNetworkServiceEndpointRegistryClient(last,
		registryclient.WithClientURL(urls(o.connectTo)[0]), registryclient.WithDialOptions(s.dial...),
		registryclient.WithNSEAdditionalFunctionality(registrysendfd.NewNetworkServiceEndpointRegistryClient()),
		registryclient.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(policies("client"))),
	)
	registered := must(c.Register(ctx, nse))
	return func() {
		soon, cancel := context.WithTimeout(last, 5*time.Second)
		defer cancel()
		_, _ = c.Unregister(soon, registered)
	}
}
