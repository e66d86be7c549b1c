//! gRPC over Unix sockets with descriptor passing below TLS, and over TCP.
