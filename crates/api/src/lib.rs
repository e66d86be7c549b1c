//! The wire: protobuf types and typed views over them. Pure: no I/O, no runtime.

pub mod context;
pub mod matching;
pub mod resource;

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
    pub mod ipam {
        tonic::include_proto!("ipam");
    }
    /// Of our own: what a process tells of itself.
    pub mod introspect {
        tonic::include_proto!("nsm.introspect.v1");
    }
}

pub mod limits;
pub mod mechanism;
pub mod nsurl;
pub mod path;
pub mod planted;
pub mod unknown;

/// The descriptors of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Payload values (spec/control-plane.md 2.4).
pub mod payload {
    /// IPv4 and IPv6 packets.
    pub const IP: &str = "IP";
    /// Whole Ethernet frames.
    pub const ETHERNET: &str = "ETHERNET";
}
