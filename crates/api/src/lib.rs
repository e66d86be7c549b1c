//! The wire: protobuf types and typed views over them. Pure: no I/O, no runtime.

/// The generated types, one module per protobuf package.
#[allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all)]
pub mod pb {
    pub mod connectioncontext {
        tonic::include_proto!("connectioncontext");
    }
    pub mod connection {
        tonic::include_proto!("connection");
    }
    pub mod networkservice {
        tonic::include_proto!("networkservice");
    }
    pub mod registry {
        tonic::include_proto!("registry");
    }
}
