//! The forwarder: turns connections into wires.
