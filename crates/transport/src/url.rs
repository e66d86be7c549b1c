//! Where to listen and whom to dial (`control-plane.md` 14.4).

use std::{
    fmt,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use nsm_identity::FileId;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, the last is zero (`unix(7)`).
const MAX_UNIX_PATH: usize = 107;

/// Where to listen: `unix:///path`, `unix:path`, `tcp://host:port`, `host:port`; an empty host means all addresses,
/// port 0 any free one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ListenUrl {
    /// A socket file.
    Unix(PathBuf),
    /// Host and port as written, the host possibly empty.
    Tcp(String),
}

/// Whom to dial: `unix:///path`, `unix:path`, `tcp://host:port`, `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DialUrl {
    /// A socket file; `/proc/PID/fd/N` of a descriptor of one works too.
    Unix(PathBuf),
    /// Host and port as written.
    Tcp(String),
}

/// Whom to dial, by name or by a descriptor of its socket file.
#[derive(Debug, Clone)]
pub enum DialTarget {
    /// By name.
    Url(DialUrl),
    /// An `O_PATH` descriptor of a Unix socket's file, as it is received over a connection.
    Socket(Arc<OwnedFd>),
}

/// Why a text is no URL for listening or dialling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} {reason}; expected unix:///path/to/socket or tcp://host:port")]
pub struct UrlError {
    url: String,
    reason: &'static str,
}

enum Parsed {
    Unix(PathBuf),
    Tcp { host_port: String, has_host: bool, port: u16 },
}

impl FromStr for ListenUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        match parse(url)? {
            Parsed::Unix(path) => Ok(Self::Unix(path)),
            Parsed::Tcp { host_port, .. } => Ok(Self::Tcp(host_port)),
        }
    }
}

impl FromStr for DialUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        let wrong = |reason| UrlError { url: url.chars().take(200).collect(), reason };
        match parse(url)? {
            Parsed::Unix(path) => Ok(Self::Unix(path)),
            Parsed::Tcp { has_host: false, .. } => Err(wrong("names no host to dial")),
            Parsed::Tcp { port: 0, .. } => Err(wrong("names port 0, which nobody can dial")),
            Parsed::Tcp { host_port, .. } => Ok(Self::Tcp(host_port)),
        }
    }
}

impl DialUrl {
    /// The socket file, if it is one.
    pub fn unix_path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}

impl DialTarget {
    /// Is it on this machine for certain, so that descriptors can be handed over?
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Socket(_) | Self::Url(DialUrl::Unix(_)))
    }
}

impl From<DialUrl> for DialTarget {
    fn from(url: DialUrl) -> Self {
        Self::Url(url)
    }
}

impl From<&DialUrl> for DialTarget {
    fn from(url: &DialUrl) -> Self {
        Self::Url(url.clone())
    }
}

impl From<Arc<OwnedFd>> for DialTarget {
    fn from(socket: Arc<OwnedFd>) -> Self {
        Self::Socket(socket)
    }
}

impl From<OwnedFd> for DialTarget {
    fn from(socket: OwnedFd) -> Self {
        Self::Socket(Arc::new(socket))
    }
}

impl fmt::Display for ListenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(host_port) => write!(f, "tcp://{host_port}"),
        }
    }
}

impl fmt::Display for DialUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(host_port) => write!(f, "tcp://{host_port}"),
        }
    }
}

impl fmt::Display for DialTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            // Known by what it is: names below /proc/PID/fd are reused.
            Self::Socket(fd) => match FileId::of(fd) {
                Ok(id) => write!(f, "inode://{}/{}", id.dev, id.ino),
                Err(_) => f.write_str("a socket that cannot be examined"),
            },
        }
    }
}

fn parse(url: &str) -> Result<Parsed, UrlError> {
    let wrong = |reason| UrlError { url: url.chars().take(200).collect(), reason };
    if let Some(path) = url.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return match path.len() {
            0 => Err(wrong("names no path")),
            1..=MAX_UNIX_PATH if path.contains('\0') => Err(wrong("has a zero byte in its path")),
            1..=MAX_UNIX_PATH => Ok(Parsed::Unix(path.into())),
            _ => Err(wrong("has a path of more than 107 bytes, the kernel's limit for sockets")),
        };
    }
    let host_port = match url.split_once("://") {
        Some(("tcp", rest)) => rest,
        Some(("inode", _)) => return Err(wrong("is a descriptor that did not come along")),
        Some(_) => return Err(wrong("has an unknown scheme")),
        None => url,
    };
    let host_port = host_port.strip_suffix('/').unwrap_or(host_port);
    let (host, port) = host_port.rsplit_once(':').ok_or_else(|| wrong("names no port"))?;
    let port: u16 = port.parse().map_err(|_| wrong("has no port number after its last colon"))?;
    let name = match host.strip_prefix('[') {
        Some(rest) => {
            let address = rest.strip_suffix(']').ok_or_else(|| wrong("has an unbalanced bracket"))?;
            let plain = address.split('%').next().unwrap_or_default();
            plain.parse::<std::net::Ipv6Addr>().map_err(|_| wrong("has no IPv6 address in its brackets"))?;
            address
        }
        None if host.contains(':') => return Err(wrong("needs brackets around an IPv6 address")),
        None => host,
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if !name.chars().all(allowed) {
        return Err(wrong("has a character that no host name has"));
    }
    Ok(Parsed::Tcp { host_port: host_port.into(), has_host: !name.is_empty(), port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        let unix = |path: &str| DialUrl::Unix(path.into());
        let tcp = |host_port: &str| DialUrl::Tcp(host_port.into());
        for (text, url, shown) in [
            ("unix:///var/lib/nsm.io.sock", unix("/var/lib/nsm.io.sock"), "unix:///var/lib/nsm.io.sock"),
            ("unix:listen.sock", unix("listen.sock"), "unix://listen.sock"),
            ("unix:///proc/12/fd/3", unix("/proc/12/fd/3"), "unix:///proc/12/fd/3"),
            ("tcp://10.0.0.1:5001", tcp("10.0.0.1:5001"), "tcp://10.0.0.1:5001"),
            ("tcp://[fd00::1]:5001", tcp("[fd00::1]:5001"), "tcp://[fd00::1]:5001"),
            ("registry.nsm-system:5002", tcp("registry.nsm-system:5002"), "tcp://registry.nsm-system:5002"),
        ] {
            assert_eq!(text.parse(), Ok(url.clone()), "{text}");
            assert_eq!(url.to_string(), shown);
            assert_eq!(shown.parse(), Ok(url));
        }
        assert_eq!("tcp://:0".parse(), Ok(ListenUrl::Tcp(":0".into())));
        assert_eq!(":5001".parse(), Ok(ListenUrl::Tcp(":5001".into())));
    }

    #[test]
    fn mistakes_are_explained() {
        let long = format!("unix:///{}", "x".repeat(107));
        for (text, reason) in [
            ("unix:", "names no path"),
            ("unix://", "names no path"),
            (&long, "107 bytes"),
            ("http://a:1", "unknown scheme"),
            ("inode://4/5", "did not come along"),
            ("registry", "names no port"),
            ("tcp://registry", "names no port"),
            ("tcp://registry:http", "no port number"),
            ("tcp://registry:70000", "no port number"),
            ("tcp://fd00::1:5001", "needs brackets"),
            ("tcp://[fd00::1:5001", "unbalanced"),
            ("tcp://[registry]:5001", "no IPv6 address"),
            ("tcp://a b:1", "no host name"),
            ("tcp://:5001", "no host to dial"),
            ("tcp://a:0", "port 0"),
        ] {
            let error = text.parse::<DialUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_is_shown_parses_again(
            text in "(unix:|unix://|tcp://|inode://)?[a-z0-9:/.%é\\[\\]-]{0,30}",
        ) {
            if let Ok(url) = text.parse::<DialUrl>() {
                prop_assert_eq!(url.to_string().parse(), Ok(url));
            }
            let _ = text.parse::<ListenUrl>();
        }
    }
}
