// Command upstream runs the roles of upstream's Network Service Mesh out of its published modules, one role a process,
// so that ours are tested against the real thing. Each role takes the flags of the role of `nsm` with the same name:
// a mesh swaps one for the other by starting another program.
//
//	upstream registry | manager | forwarder | endpoint | client | identity
//	upstream monitor | find       one stream each: connections of a hop, endpoints of a registry
//
// The forwarder negotiates and makes no wire: upstream's data plane is not here. Every call is a line of the log on
// stdout, see calls.go; NOTIFY_SOCKET hears READY=1 (sd_notify(3)).
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/networkservicemesh/sdk/pkg/tools/log"
	"github.com/networkservicemesh/sdk/pkg/tools/log/logruslogger"
)

// options are the flags of all roles together, named as those of `nsm`.
type options struct {
	name, listenOn, registryURL, connectTo string
	networkServices, serviceNames, labels  string
	cidrPrefix, payload, tunnelIP, routes  string
	stateDir, config, token, serviceName   string
	once, registerService, verbose         bool
	expirePeriod, tokenLifetime, timeout   time.Duration
	dialTimeout, fdPause                   time.Duration
	count                                  int
	unknownMechanism, heal                 bool
	unused                                 string
}

func parse(role string, arguments []string) *options {
	o := &options{}
	f := flag.NewFlagSet(role, flag.ExitOnError)
	f.StringVar(&o.name, "name", role, "name in the path and in the registry")
	f.StringVar(&o.listenOn, "listen-on", "", "URLs, separated by commas")
	f.StringVar(&o.registryURL, "registry-url", "", "the cluster's registry (manager)")
	f.StringVar(&o.connectTo, "connect-to", "unix:///var/lib/networkservicemesh/nsm.io.sock", "the manager, or whom to ask")
	f.StringVar(&o.networkServices, "network-services", "", "client: kernel://SERVICE/INTERFACE?LABEL=VALUE,…; registry: a YAML file")
	f.StringVar(&o.serviceNames, "service-names", "", "services of an endpoint")
	f.StringVar(&o.serviceName, "service-name", "", "service to look for (find)")
	f.StringVar(&o.labels, "labels", "", "KEY:VALUE,…")
	f.StringVar(&o.cidrPrefix, "cidr-prefix", "169.254.0.0/16", "the endpoint's pool")
	f.StringVar(&o.payload, "payload", "ETHERNET", "payload of services that the endpoint registers")
	f.StringVar(&o.tunnelIP, "tunnel-ip", "127.0.0.1", "where remote wires of this forwarder would end")
	f.StringVar(&o.config, "config", "", "configuration of nsm identity, as JSON (identity)")
	f.StringVar(&o.token, "token", "honest", "honest, forged, expired or misdirected: what stands in nsm-client-token")
	f.BoolVar(&o.once, "once", false, "give up after the first try (client)")
	o.registerService = true
	f.Func("register-service", "true or false: register the services too (endpoint)", func(text string) (err error) {
		// Not one of Go's own flags of that kind, which take no value of their own.
		o.registerService, err = strconv.ParseBool(text)
		return err
	})
	f.BoolVar(&o.verbose, "verbose", false, "upstream's own log too")
	f.BoolVar(&o.unknownMechanism, "unknown-mechanism", false, "prefer a mechanism that nobody has heard of (client)")
	f.BoolVar(&o.heal, "heal", true, "follow the wires, and ask again for those that fall (client)")
	f.DurationVar(&o.expirePeriod, "expire-period", time.Minute, "how long registrations last (registry)")
	f.DurationVar(&o.tokenLifetime, "max-token-lifetime", 10*time.Minute, "how long tokens live")
	f.DurationVar(&o.timeout, "request-timeout", 15*time.Second, "how long one request may take")
	f.DurationVar(&o.dialTimeout, "dial-timeout", 750*time.Millisecond, "how long connecting may take")
	f.DurationVar(&o.fdPause, "fd-pause", 0, "wait between queueing descriptors and the call, see calls.go")
	f.IntVar(&o.count, "count", 0, "make and close so many wires, print how long each took, end (client)")
	for _, ignored := range []string{"state-dir", "vxlan-port", "routes", "ipam-policy", "acl-config-path"} {
		f.StringVar(&o.unused, ignored, "", "nothing: ours has it")
	}
	_ = f.Parse(arguments)
	if f.NArg() > 0 {
		fail("what is " + f.Arg(0) + "?")
	}
	return o
}

func main() {
	if len(os.Args) < 2 {
		fail("usage: upstream ROLE [FLAGS]; the roles are registry, manager, forwarder, endpoint, client, identity, monitor, find")
	}
	role := os.Args[1]
	o := parse(role, os.Args[2:])
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	// Below INFO upstream leaves out elements that trace, and with them the passing of descriptors: the level stays,
	// the text goes.
	logrus.SetLevel(logrus.InfoLevel)
	if !o.verbose {
		logrus.SetOutput(io.Discard)
	}
	log.EnableTracing(true)
	ctx = log.WithLog(ctx, logruslogger.New(ctx))
	roles := map[string]func(context.Context, *options){
		"registry": registry, "manager": manager, "forwarder": forwarder, "endpoint": endpoint, "client": runClient,
		"identity": identity, "monitor": monitor, "find": find,
	}
	run, ok := roles[role]
	if !ok {
		fail("there is no role " + role)
	}
	run(ctx, o)
}

// serveUntilEnd says that the role is ready and waits for the signal.
func serveUntilEnd(ctx context.Context) {
	ready()
	<-ctx.Done()
}

func ready() {
	say("ready", "pid", os.Getpid())
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	socket := must(net.Dial("unixgram", path))
	defer func() { _ = socket.Close() }()
	must(socket.Write([]byte("READY=1")))
}

func must[T any](value T, err error) T {
	if err != nil {
		fail(fmt.Sprintf("%v", err))
	}
	return value
}

func fail(why string) {
	say("failed", "why", why)
	os.Exit(1)
}

func urls(list string) (parsed []*url.URL) {
	for _, text := range strings.Split(list, ",") {
		parsed = append(parsed, must(url.Parse(text)))
	}
	return parsed
}

// pairs reads KEY:VALUE,….
func pairs(list string) map[string]string {
	read := map[string]string{}
	for _, pair := range strings.Split(list, ",") {
		if key, value, ok := strings.Cut(pair, ":"); ok {
			read[key] = value
		}
	}
	return read
}
