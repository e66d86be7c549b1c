//! The small HTTP server that a pod's `serve: [80, 8080]` asks for: it says who it is and who asked.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use nsm_kernel::netns::Namespace;
use rustix::net::Shutdown;

use crate::Error;

/// Listeners in one namespace; they close when this is dropped.
#[derive(Debug)]
pub struct HttpServer {
    listeners: Vec<TcpListener>,
}

// === impl HttpServer ===

impl HttpServer {
    /// Listens on all addresses of both families in `namespace` and answers `200` with one line that begins with
    /// `name`.
    ///
    /// # Errors
    ///
    /// A port that is taken, a namespace that cannot be entered.
    pub fn start(namespace: &Namespace, name: &str, ports: &[u16]) -> Result<Self, Error> {
        let bound = namespace.run(|| ports.iter().map(|&port| listen(port)).collect::<io::Result<Vec<_>>>());
        let listeners = bound
            .map_err(Error::kernel(format!("enter the namespace of {name}")))?
            .map_err(|source| Error::system(format!("listen on {ports:?} in {name}"), source))?;
        for listener in &listeners {
            let listener = listener.try_clone().map_err(|e| Error::system("copy a socket", e))?;
            let name = name.to_owned();
            let accepting = move || {
                // Ends when the listener is shut down.
                while let Ok((stream, _)) = listener.accept() {
                    let name = name.clone();
                    // One thread each: a silent peer keeps nobody else waiting.
                    let _ = thread::Builder::new().name("http".into()).spawn(move || answer(&stream, &name));
                }
            };
            thread::Builder::new()
                .name("http".into())
                .spawn(accepting)
                .map_err(|e| Error::system("start a thread", e))?;
        }
        Ok(Self { listeners })
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        for listener in &self.listeners {
            // Wakes the accepting thread, which holds the other descriptor of the socket.
            let _ = rustix::net::shutdown(listener, Shutdown::Both);
        }
    }
}

// === private helpers ===

fn listen(port: u16) -> io::Result<TcpListener> {
    // `[::]` takes IPv4 too unless net.ipv6.bindv6only is set; a kernel without IPv6 has only the other.
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
}

fn answer(stream: &TcpStream, name: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut request = String::new();
    for line in BufReader::new(stream.take(8192)).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if request.is_empty() {
            request = line;
        }
    }
    let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
    let (peer, local) = (peer.ip().to_canonical(), (local.ip().to_canonical(), local.port()));
    let (status, body) = match request.split(' ').next() {
        Some("GET") => ("200 OK", format!("{name} at {} port {}, hello {peer}\n", local.0, local.1)),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head =
        format!("HTTP/1.0 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut stream = stream;
    stream.write_all((head + &body).as_bytes())
}
