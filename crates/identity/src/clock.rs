//! The wall clock, as everything here reads it that asks whether something has expired: certificates, tokens, leases.
//!
//! It is the system's. A test that wants to know what becomes of a mesh whose clocks jump names a file in
//! [`OFFSET_FILE`]; what stands in it, in seconds, is added. So the clocks of some programs jump, never the machine's.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// For tests only: environment variable with the path of a file that says how many seconds this program's clock is
/// ahead (`7200`) or behind (`-7200`). It is read each time anew; without it, or with something else in it, it is 0.
pub const OFFSET_FILE: &str = "NSM_TEST_CLOCK_OFFSET_FILE";

static FILE: LazyLock<Option<PathBuf>> = LazyLock::new(|| env::var_os(OFFSET_FILE).map(PathBuf::from));

/// What time it is.
#[must_use]
pub fn now() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let now = SystemTime::now();
    FILE.as_deref().map_or(now, |file| shifted(now, offset(file)))
}

/// What time it is, for TLS.
#[derive(Debug)]
pub(crate) struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        now().duration_since(UNIX_EPOCH).ok().map(UnixTime::since_unix_epoch)
    }
}

fn offset(file: &Path) -> i64 {
    fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

fn shifted(now: SystemTime, seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    let shifted = if seconds < 0 { now.checked_sub(by) } else { now.checked_add(by) };
    shifted.unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_file_says_is_added_and_nothing_else_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("offset");
        assert_eq!(offset(&file), 0, "there is none");
        for (text, seconds) in [("7200", 7200), ("-7200\n", -7200), ("", 0), ("2h", 0)] {
            fs::write(&file, text).expect("write");
            assert_eq!(offset(&file), seconds, "{text:?}");
        }
        let noon = UNIX_EPOCH + Duration::from_secs(12 * 3600);
        assert_eq!(shifted(noon, 7200), noon + Duration::from_secs(7200));
        assert_eq!(shifted(noon, -7200), noon - Duration::from_secs(7200));
        assert_eq!(
            shifted(UNIX_EPOCH - Duration::from_secs(1 << 62), i64::MIN),
            UNIX_EPOCH - Duration::from_secs(1 << 62)
        );
    }
}
