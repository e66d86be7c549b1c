//! What a connection's context says, read.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::pb::connection::Connection;

/// The addresses of the client's end, and those of the endpoint's. What has no mask is skipped, as upstream does.
#[must_use]
pub fn addresses(conn: &Connection) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let read = |nets: &[String]| {
        nets.iter().filter_map(|net| net.parse::<IpNet>().ok()).map(|net| net.addr()).collect()
    };
    let ip = conn.context.as_ref().and_then(|context| context.ip_context.as_ref());
    ip.map_or_else(Default::default, |ip| (read(&ip.src_ip_addrs), read(&ip.dst_ip_addrs)))
}
