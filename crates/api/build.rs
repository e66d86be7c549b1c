//! Generates the protobuf types from `proto/` in pure Rust: no `protoc` on a user's machine.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// What hops pass on: package, message, and its name in Rust. They keep fields that nobody here knows.
const PASSED_ON: [(&str, &str, &str); 20] = [
    ("networkservice", "NetworkServiceRequest", "NetworkServiceRequest"),
    ("connection", "Connection", "Connection"),
    ("connection", "Mechanism", "Mechanism"),
    ("connection", "Path", "Path"),
    ("connection", "PathSegment", "PathSegment"),
    ("connectioncontext", "ConnectionContext", "ConnectionContext"),
    ("connectioncontext", "IPContext", "IpContext"),
    ("connectioncontext", "IpNeighbor", "IpNeighbor"),
    ("connectioncontext", "Route", "Route"),
    ("connectioncontext", "ExtraPrefixRequest", "ExtraPrefixRequest"),
    ("connectioncontext", "PolicyRoute", "PolicyRoute"),
    ("connectioncontext", "DNSContext", "DnsContext"),
    ("connectioncontext", "DNSConfig", "DnsConfig"),
    ("connectioncontext", "EthernetContext", "EthernetContext"),
    ("registry", "NetworkService", "NetworkService"),
    ("registry", "Match", "Match"),
    ("registry", "Destination", "Destination"),
    ("registry", "Metadata", "Metadata"),
    ("registry", "NetworkServiceEndpoint", "NetworkServiceEndpoint"),
    ("registry", "NetworkServiceLabels", "NetworkServiceLabels"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=proto");
    let files = ["networkservice.proto", "registry.proto", "ipam.proto", "introspect.proto"];
    let set = protox::compile(files, ["proto"])?;
    // Reflection serves the same descriptors that the types came from.
    fs::write(out.join("descriptors.bin"), prost_bytes(&set))?;
    let passed_on =
        PASSED_ON.map(|(package, message, name)| (package, name, free_numbers(&set, package, message)));
    tonic_prost_build::configure()
        // Ordered maps: equal messages have equal bytes, which tests and caches rely on.
        .btree_map(".")
        // The generated Debug would show tokens: `path` has one that does not.
        .skip_debug(["connection.PathSegment"])
        // What a process tells of itself is shown as JSON and YAML.
        .type_attribute(".nsm.introspect.v1", "#[derive(serde::Serialize, serde::Deserialize)]")
        .type_attribute(".nsm.introspect.v1", "#[serde(rename_all = \"camelCase\")]")
        // … and read again by another version of the program.
        .message_attribute(".nsm.introspect.v1", "#[serde(default)]")
        .compile_fds(set)?;
    for (package, name, free) in passed_on {
        keep_unknown(&out.join(format!("{package}.rs")), name, &free)?;
    }
    Ok(())
}

/// The numbers that a key of two bytes can hold and that a message has no field for.
fn free_numbers(set: &prost_types::FileDescriptorSet, package: &str, message: &str) -> String {
    let mut messages =
        set.file.iter().filter(|file| file.package() == package).flat_map(|file| &file.message_type);
    let message = messages.find(|m| m.name() == message).expect("a message of that name");
    let free = (1..=2047).filter(|number| message.field.iter().all(|field| field.number() != *number));
    free.map(|number| number.to_string()).collect::<Vec<_>>().join(", ")
}

/// Gives a generated type a place for fields that it does not know: see `unknown`. prost has none of its own, but what
/// it does with a `oneof` is what is needed.
fn keep_unknown(file: &Path, name: &str, free: &str) -> Result<(), Box<dyn std::error::Error>> {
    let head = format!("pub struct {name} {{\n");
    let code = fs::read_to_string(file)?;
    let (before, after) =
        code.split_once(&head).ok_or_else(|| format!("{} has no {name}", file.display()))?;
    let field = format!(
        "#[prost(oneof = \"crate::unknown::Unknown\", tags = \"{free}\")]\n\
         pub unknown: ::core::option::Option<crate::unknown::Unknown>,\n"
    );
    // What is kept has no fixed size.
    let (before, derives) = before.rsplit_once("#[derive(").ok_or("a type without derives")?;
    let derives = derives.replacen("Copy, ", "", 1);
    Ok(fs::write(file, [before, "#[derive(", &derives, &head, &field, after].concat())?)
}

fn prost_bytes(set: &impl prost::Message) -> Vec<u8> {
    set.encode_to_vec()
}
