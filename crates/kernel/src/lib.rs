//! Linux: namespaces, netlink, nftables, sysctls; plans as data, apply and snapshot apart.
