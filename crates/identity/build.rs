//! Generates the Workload API's types and stubs in pure Rust.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let set = protox::compile(["workload.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        // The generated Debug would print private keys.
        .skip_debug(["X509SVID", "X509SVIDResponse"])
        .compile_fds(set)?;
    Ok(())
}
