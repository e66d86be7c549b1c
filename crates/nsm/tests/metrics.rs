//! A role serves its metrics where it is told to, from its first moment on.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Ended with the test, however that ends.
struct Role(Child);

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn a_manager_that_still_waits_for_its_identity_serves_metrics() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nowhere = tempfile::tempdir().unwrap();
    let _role = Role(
        Command::new(env!("CARGO_BIN_EXE_nsm"))
            .args(["manager", "--prometheus-listen-on", &format!("127.0.0.1:{port}")])
            .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", nowhere.path().join("absent.sock").display()))
            .env("NSM_INTROSPECT_DIR", "")
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let answer = (0..200)
        .find_map(|_| {
            get(port).or_else(|| {
                std::thread::sleep(Duration::from_millis(50));
                None
            })
        })
        .expect("metrics within ten seconds");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("nsm_panics_total 0"), "{answer}");
}
