//! Namespaces live no longer for having wires, and their end is heard of.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;

use std::time::{Duration, Instant};

use common::{Pod, node, nsids, output, with_private_run};
use nsm_kernel::netns::Namespace;
use nsm_kernel::watch::{Event, Watch};

/// Collects events until the one that is waited for, for at most five seconds.
fn until(watch: &mut Watch, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
    let (mut events, start) = (Vec::new(), Instant::now());
    while !events.iter().any(&wanted) && start.elapsed() < Duration::from_secs(5) {
        events.extend(watch.wait(Some(Duration::from_millis(100))).unwrap());
    }
    assert!(events.iter().any(&wanted), "{events:?}");
    events
}

#[test]
fn a_pod_that_dies_takes_its_wires_along_and_is_reported() {
    let Some(node) = node("a_pod_that_dies_takes_its_wires_along_and_is_reported") else { return };
    let mut watch = Watch::open(&node.ns).unwrap();
    let (client, endpoint) = (Pod::start(&node.client), Pod::start(&node.endpoint));
    let plan = node.veth("wire-1", "nsm0");
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    node.kernel.snapshot(&plan, &node.known()).unwrap();
    let (near, far) = (made.near.unwrap(), made.far.unwrap());

    // From here on nothing but the two processes holds the pods.
    drop((node.client, node.endpoint));
    let kernel = node.kernel;
    // With the numbers alone, without a descriptor:
    let (seen, _) = kernel.facts(&plan.id, nsids(&made)).unwrap();
    assert_eq!(seen.unwrap().ifindex, near.ifindex);
    assert_eq!(kernel.owned(far.nsid).unwrap()[0].id, "wire-1");
    // The namespaces are found by what they are.
    assert_eq!(kernel.apply(&plan, &[]).unwrap().writes, 0);

    drop(client);
    let events =
        until(&mut watch, |event| matches!(event, Event::LinkGone { nsid, .. } if *nsid == far.nsid));
    assert!(events.contains(&Event::NamespaceGone { nsid: near.nsid }), "{events:?}");
    assert!(Namespace::find(plan.near.as_ref().unwrap().ns).unwrap().is_none());
    assert_eq!(kernel.facts(&plan.id, nsids(&made)).unwrap(), (None, None));
    kernel.remove(&plan, nsids(&made), &[]).unwrap();
    drop(endpoint);
    until(&mut watch, |event| *event == Event::NamespaceGone { nsid: far.nsid });
}

#[test]
fn a_named_namespace_is_made_listed_found_and_deleted() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED a_named_namespace_is_made_listed_found_and_deleted: network namespaces need root");
        return;
    }
    with_private_run(|| {
        let made = Namespace::create_named("lab.client").unwrap();
        let id = made.id();
        assert!(Namespace::create_named("lab.client").is_err());
        assert_eq!(Namespace::named("lab.client").unwrap().id(), id);
        drop(made);
        Namespace::create_named("lab.node1").unwrap();
        assert_eq!(Namespace::list_named().unwrap(), ["lab.client", "lab.node1"]);
        // Only the mount holds it.
        let found = Namespace::find(id).unwrap().unwrap();
        assert!(output(&found, "ip -br link").starts_with("lo"));
        drop(found);
        assert!(Namespace::delete_named("lab.client").unwrap());
        assert!(!Namespace::delete_named("lab.client").unwrap());
        assert!(Namespace::find(id).unwrap().is_none());
        for hostile in ["", ".", "..", "a/b", "../../tmp/x", "nul\0"] {
            assert!(Namespace::create_named(hostile).is_err(), "{hostile:?}");
            assert!(Namespace::delete_named(hostile).is_err(), "{hostile:?}");
        }
        // What a creator left that was killed before the mount: a plain file.
        std::fs::write("/run/netns/half", "").unwrap();
        assert!(Namespace::named("half").is_err());
        assert!(Namespace::delete_named("half").unwrap());
        assert_eq!(Namespace::list_named().unwrap(), ["lab.node1"]);
    });
}

#[test]
fn a_descriptor_of_something_else_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(Namespace::from_fd(file.into()).is_err());
    assert!(Namespace::open("/proc/self/ns/mnt").is_err());
    assert!(Namespace::open("/proc/self/status").is_err());
}

/// Upstream's programs open `O_PATH` what they send, and such a descriptor answers no questions.
#[test]
fn a_namespace_that_came_by_name_only_is_one() {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let named = |path: &str| Namespace::from_fd(open(path, flags, Mode::empty()).unwrap());
    let namespace = named("/proc/self/ns/net").unwrap();
    assert_eq!(namespace.id(), Namespace::current().unwrap().id());
    // It is as good as any other: its descriptor can be asked again.
    let copy = std::os::fd::AsFd::as_fd(&namespace).try_clone_to_owned().unwrap();
    assert_eq!(Namespace::from_fd(copy).unwrap().id(), namespace.id());
    for path in ["/proc/self/ns/mnt", "/proc/self/exe", "/dev/null", "/proc"] {
        assert!(matches!(named(path), Err(nsm_kernel::Error::NotANamespace(_))), "{path}");
    }
}
