//! Generates the protobuf types from `proto/` in pure Rust: no `protoc` on a user's machine.

use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=proto");
    let files = ["networkservice.proto", "registry.proto", "ipam.proto", "introspect.proto"];
    let set = protox::compile(files, ["proto"])?;
    // Reflection serves the same descriptors that the types came from.
    fs::write(out.join("descriptors.bin"), prost_bytes(&set))?;
    tonic_prost_build::configure()
        // Ordered maps: equal messages have equal bytes, which tests and caches rely on.
        .btree_map(".")
        // The generated Debug would show tokens: `path` has one that does not.
        .skip_debug(["connection.PathSegment"])
        // What a process tells of itself is shown as JSON and YAML.
        .type_attribute(".nsm.introspect.v1", "#[derive(serde::Serialize, serde::Deserialize)]")
        .type_attribute(".nsm.introspect.v1", "#[serde(rename_all = \"camelCase\")]")
        .compile_fds(set)?;
    Ok(())
}

fn prost_bytes(set: &impl prost::Message) -> Vec<u8> {
    set.encode_to_vec()
}
