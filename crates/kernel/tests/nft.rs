//! nftables in a real kernel: what we write is what `nft` would have written, is found equal, and is all or nothing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::io::Write as _;
use std::process::{Command, Stdio};

use nsm_kernel::netlink::Socket;
use nsm_kernel::netns::Namespace;
use nsm_kernel::nft::{
    self, Base, Chain, Change, Family, Hook, Netfilter, Policy, Rule, Table, Term, Verdict, Version, ct,
};

/// Every kind of term, of verdict and of chain.
fn tables() -> Vec<Table> {
    let rule = |terms: &[Term], verdict| Rule::new(terms.to_vec(), verdict);
    let base = |hook, priority, policy| Base { hook, priority, policy };
    let guard = Table {
        family: Family::Bridge,
        name: "test".into(),
        chains: vec![
            Chain::base(
                "prerouting",
                base(Hook::Prerouting, -300, Policy::Accept),
                vec![
                    rule(
                        &[Term::InIf("nsm0".into()), Term::EtherType(0x0800), Term::SetMark(1)],
                        Verdict::Accept,
                    ),
                    rule(&[Term::InIf("nsm0".into()), Term::Count], Verdict::Drop).comment("unknown frames"),
                ],
            ),
            Chain::base(
                "output",
                base(Hook::Output, 0, Policy::Accept),
                vec![rule(&[Term::OutIf("a-name-15-bytes".into())], Verdict::Drop)],
            ),
        ],
    };
    let tcp = Term::Protocol(6);
    let filter = Table {
        family: Family::Inet,
        name: "test".into(),
        chains: vec![
            Chain::base(
                "zones",
                base(Hook::Prerouting, -300, Policy::Accept),
                vec![rule(&[Term::InIf("nsm0".into()), Term::SetCtZone(7)], Verdict::Continue)],
            ),
            Chain::base(
                "forward",
                base(Hook::Forward, 0, Policy::Drop),
                vec![rule(
                    &[Term::InIf("br0".into()), Term::OutIf("br0".into()), Term::Mark(1)],
                    Verdict::Jump("rules".into()),
                )],
            ),
            Chain::new(
                "rules",
                vec![
                    rule(
                        &[Term::CtMark(0xfeed), Term::CtState(ct::ESTABLISHED | ct::RELATED), Term::Count],
                        Verdict::Accept,
                    ),
                    rule(
                        &[
                            Term::CtState(ct::NEW | ct::ESTABLISHED | ct::RELATED),
                            Term::Source("10.1.2.3/20".parse().unwrap()),
                            Term::Destination("192.0.2.1/32".parse().unwrap()),
                            tcp.clone(),
                            Term::SourcePort(1024..=65535),
                            Term::DestinationPort(80..=80),
                            Term::TcpFlags { mask: 0x12, value: 0x02 },
                            Term::SetCtMark(0xfeed),
                            Term::Count,
                        ],
                        Verdict::Accept,
                    )
                    .comment("a \"quoted\" comment that is far too long: ".to_owned() + &"ä".repeat(100)),
                    rule(
                        &[
                            Term::Source("2001:db8::/45".parse().unwrap()),
                            Term::Destination("::/0".parse().unwrap()),
                            Term::Protocol(58),
                            Term::IcmpType(Version::V6, 128..=129),
                            Term::IcmpCode(Version::V6, 0..=0),
                        ],
                        Verdict::Accept,
                    ),
                    rule(
                        &[Term::Version(Version::V4), Term::Protocol(1), Term::IcmpType(Version::V4, 8..=8)],
                        Verdict::Accept,
                    ),
                    rule(
                        &[
                            Term::Version(Version::V6),
                            Term::Protocol(58),
                            Term::IcmpType(Version::V6, 135..=136),
                            Term::HopLimit(255),
                        ],
                        Verdict::Accept,
                    ),
                    rule(&[tcp, Term::DestinationPort(22..=80)], Verdict::Drop),
                ],
            ),
        ],
    };
    vec![guard, filter]
}

/// A namespace of the test's own, or `None` with a word why it cannot run.
fn namespace(test: &str) -> Option<Namespace> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED {test}: network namespaces need root");
        return None;
    }
    Some(Namespace::unnamed().unwrap())
}

fn has_nft(test: &str) -> bool {
    let found = Command::new("nft").arg("--version").output().is_ok();
    if !found {
        println!("SKIPPED {test}: the program nft is not installed (package nftables)");
    }
    found
}

/// What the program `nft` says in that namespace, told `input`.
fn program(ns: &Namespace, arguments: &[&str], input: &str) -> String {
    let run = || {
        let mut nft = Command::new("nft")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        nft.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        nft.wait_with_output().unwrap()
    };
    let output = ns.run(run).unwrap();
    assert!(output.status.success(), "{}\n{input}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_we_write_is_what_nft_makes_of_what_we_print() {
    let test = "what_we_write_is_what_nft_makes_of_what_we_print";
    let (Some(ours), Some(theirs)) = (namespace(test), namespace(test)) else { return };
    if !has_nft(test) {
        return;
    }
    let tables = tables();
    let mut socket = Socket::<Netfilter>::open_in(&ours).unwrap();
    nft::apply(&mut socket, &tables).unwrap();
    let printed: String = tables.iter().map(Table::to_string).collect();
    program(&theirs, &["-f", "-"], &printed);
    let listed = |ns| {
        let text = program(ns, &["-s", "list", "ruleset"], "");
        let mut tables: Vec<_> = text.split("\n}\n").map(sorted_chains).collect();
        tables.sort();
        tables
    };
    assert_eq!(listed(&ours), listed(&theirs));
}

/// The chains of a table in the order of their names: we and the printed form make them in different orders.
fn sorted_chains(table: &str) -> Vec<String> {
    let mut chains: Vec<_> = table.split("\n\t}").map(|chain| chain.trim().to_owned()).collect();
    if let Some((head, chain)) = chains[0].clone().split_once('\n') {
        chains[0] = chain.trim().into();
        chains.push(head.into());
    }
    chains.retain(|chain| !chain.is_empty());
    chains.sort();
    chains
}

#[test]
fn equal_tables_are_not_written_again_and_only_a_changed_chain_is() {
    let Some(ns) = namespace("equal_tables_are_not_written_again_and_only_a_changed_chain_is") else {
        return;
    };
    let mut wanted = tables();
    let mut socket = Socket::<Netfilter>::open_in(&ns).unwrap();
    assert_eq!(nft::apply(&mut socket, &wanted).unwrap().len(), 2);

    // A restart: another socket, the same rules.
    let mut socket = Socket::<Netfilter>::open_in(&ns).unwrap();
    assert_eq!(nft::apply(&mut socket, &wanted).unwrap(), []);
    assert_eq!(socket.writes(), 0);

    wanted[1].chains[1].rules.push(Rule::new([Term::Count], Verdict::Drop));
    let changes = nft::apply(&mut socket, &wanted).unwrap();
    assert!(matches!(&changes[..], [Change::Rewrite(Family::Inet, _, chain)] if chain.name == "forward"));
    assert_eq!(nft::plan(&mut socket, &wanted).unwrap(), []);

    wanted[0].chains[1].base = Some(Base { hook: Hook::Input, priority: 0, policy: Policy::Accept });
    let changes = nft::apply(&mut socket, &wanted).unwrap();
    assert!(matches!(&changes[..], [Change::Replace(table)] if table.family == Family::Bridge));
    assert_eq!(nft::plan(&mut socket, &wanted).unwrap(), []);

    assert!(nft::remove(&mut socket, Family::Bridge, "test").unwrap());
    assert!(!nft::remove(&mut socket, Family::Bridge, "test").unwrap());
    assert!(matches!(&nft::plan(&mut socket, &wanted).unwrap()[..], [Change::Create(_)]));
}

#[test]
fn a_refused_rule_changes_nothing_and_is_named() {
    let Some(ns) = namespace("a_refused_rule_changes_nothing_and_is_named") else { return };
    let mut socket = Socket::<Netfilter>::open_in(&ns).unwrap();
    let mut wanted = tables();
    nft::apply(&mut socket, &wanted).unwrap();
    let before = wanted.clone();
    wanted[0].chains[0].rules.clear();
    wanted[1].chains[1].rules.push(Rule::new([Term::Count], Verdict::Jump("nowhere".into())));
    let error = nft::apply(&mut socket, &wanted).unwrap_err().to_string();
    assert!(
        error.contains(r#"the rule "counter jump nowhere" into chain forward of table inet test"#),
        "{error}"
    );
    assert_eq!(nft::plan(&mut socket, &before).unwrap(), []);
}

#[test]
fn a_thousand_rules_are_one_transaction() {
    let Some(ns) = namespace("a_thousand_rules_are_one_transaction") else { return };
    let mut socket = Socket::<Netfilter>::open_in(&ns).unwrap();
    let rules = (1..=1000).map(|port| {
        Rule::new([Term::Protocol(6), Term::DestinationPort(port..=port)], Verdict::Accept)
            .comment(format!("port {port} {}", "x".repeat(110)))
    });
    let base = Base { hook: Hook::Forward, priority: 0, policy: Policy::Drop };
    let chain = Chain::base("forward", base, rules.collect());
    let table = Table { family: Family::Inet, name: "test".into(), chains: vec![chain] };
    nft::apply(&mut socket, std::slice::from_ref(&table)).unwrap();
    assert_eq!(nft::plan(&mut socket, &[table]).unwrap(), []);
}
