package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/clientinfo"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/heal"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/null"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/upstreamrefresh"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
)

func newClient(ctx context.Context, o *options, s *security) networkservice.NetworkServiceClient {
	healing := null.NewClient()
	if o.heal {
		healing = heal.NewClient(ctx)
	}
	return client.NewClient(ctx, client.WithClientURL(urls(o.connectTo)[0]), client.WithName(o.name), client.WithDialOptions(s.dial...),
		client.WithDialTimeout(5*time.Second), client.WithAuthorizeClient(authorize.NewClient()), client.WithHealClient(healing),
		client.WithAdditionalFunctionality(clientinfo.NewClient(), upstreamrefresh.NewClient(ctx),
			mechanisms.NewClient(map[string]networkservice.NetworkServiceClient{
				kernelmech.MECHANISM: kernel.NewClient(),
				unknown.GetType():    null.NewClient(),
			}), sendfd.NewClient()))
}

// unknown is a mechanism that no hop implements.
var unknown = &networkservice.Mechanism{Cls: cls.LOCAL, Type: "CARRIER_PIGEON", Parameters: map[string]string{"colour": "grey"}}

// request asks for what a URL says: kernel://SERVICE/INTERFACE?LABEL=VALUE.
func request(o *options, index int, wanted *url.URL) *networkservice.NetworkServiceRequest {
	labels := pairs(o.labels)
	for key := range wanted.Query() {
		labels[key] = wanted.Query().Get(key)
	}
	r := &networkservice.NetworkServiceRequest{
		Connection: &networkservice.Connection{
			Id: fmt.Sprintf("%s-%d", o.name, index), NetworkService: wanted.Host, Labels: labels, Context: &networkservice.ConnectionContext{},
		},
		MechanismPreferences: []*networkservice.Mechanism{{Cls: cls.LOCAL, Type: kernelmech.MECHANISM, Parameters: map[string]string{
			kernelmech.InterfaceNameKey: strings.TrimPrefix(wanted.Path, "/"), kernelmech.NetNSURL: "file:///proc/thread-self/ns/net",
		}}},
	}
	if o.unknownMechanism {
		r.MechanismPreferences = append([]*networkservice.Mechanism{unknown}, r.MechanismPreferences...)
		r.Connection.Context.ExtraContext = map[string]string{"future": "bright"}
		r.Connection = newer(r.Connection).(*networkservice.Connection)
	}
	return r
}

func runClient(ctx context.Context, o *options) {
	s := secure(ctx, o)
	// The signal ends the waiting; wires are closed after it.
	c := newClient(context.WithoutCancel(ctx), o, s)
	wanted := urls(o.networkServices)
	if o.count > 0 {
		measure(ctx, o, c, wanted[0])
		return
	}
	var wires []*networkservice.Connection
	for index, u := range wanted {
		for {
			attempt, cancel := context.WithTimeout(ctx, o.timeout)
			wire, err := c.Request(attempt, request(o, index, u))
			cancel()
			if err == nil {
				say("wire", "up", connection(wire))
				wires = append(wires, wire)
				break
			}
			say("wire", "failed", err)
			if o.once {
				os.Exit(1)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	ready()
	<-ctx.Done()
	for _, wire := range wires {
		last, cancel := context.WithTimeout(context.Background(), o.timeout)
		if _, err := c.Close(last, wire); err != nil {
			say("wire", "not-closed", err)
		}
		cancel()
	}
}

// measure makes wires one after the other, then closes them, and prints how long each Request took, in nanoseconds.
func measure(ctx context.Context, o *options, c networkservice.NetworkServiceClient, u *url.URL) {
	var wires []*networkservice.Connection
	took := struct{ Request, Close []int64 }{}
	for index := 0; index < o.count; index++ {
		one := *u
		one.Path = fmt.Sprintf("/w%d", index)
		attempt, cancel := context.WithTimeout(ctx, o.timeout)
		began := time.Now()
		wire, err := c.Request(attempt, request(o, index, &one))
		took.Request = append(took.Request, time.Since(began).Nanoseconds())
		cancel()
		wires = append(wires, must(wire, err))
	}
	for _, wire := range wires {
		attempt, cancel := context.WithTimeout(ctx, o.timeout)
		began := time.Now()
		must(c.Close(attempt, wire))
		took.Close = append(took.Close, time.Since(began).Nanoseconds())
		cancel()
	}
	say("measured", "result", string(must(json.Marshal(took))))
}

func dialled(ctx context.Context, o *options) grpc.ClientConnInterface {
	s := secure(ctx, o)
	return must(grpc.NewClient(grpcutils.URLToTarget(urls(o.connectTo)[0]), s.dial...))
}

// monitor follows the connections of a hop; the interceptors write what comes.
func monitor(ctx context.Context, o *options) {
	c := networkservice.NewMonitorConnectionClient(dialled(ctx, o))
	stream := must(c.MonitorConnections(ctx, &networkservice.MonitorScopeSelector{}))
	ready()
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
	}
}

// find follows the endpoints of a service; the interceptors write what comes.
func find(ctx context.Context, o *options) {
	c := registryapi.NewNetworkServiceEndpointRegistryClient(dialled(ctx, o))
	stream := must(c.Find(ctx, &registryapi.NetworkServiceEndpointQuery{
		NetworkServiceEndpoint: &registryapi.NetworkServiceEndpoint{NetworkServiceNames: []string{o.serviceName}}, Watch: true,
	}))
	ready()
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
	}
}
