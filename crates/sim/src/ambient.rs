//! What a process asks the system for without saying so: the time of day, and randomness.
//!
//! The C library's functions for both are taken over for the whole program (std, `rand`, `uuid`, the hash maps' keys and
//! tokio's choices all end there), so the code under simulation needs no seam and is the same to the last line. On a
//! thread that no simulation runs on they do what they did before.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    ffi::{c_int, c_uint, c_void},
    time::Duration,
};

use tokio::time::Instant;

/// The wall clock of every simulation begins here: 2026-01-01.
const DAWN: Duration = Duration::from_secs(1_767_225_600);

thread_local! {
    static RANDOM: Cell<Option<u64>> = const { Cell::new(None) };
    static START: Cell<Option<Instant>> = const { Cell::new(None) };
    /// By how much the wall clock is off what has passed, nanoseconds.
    static JUMPED: Cell<i64> = const { Cell::new(0) };
}

/// From now on randomness on this thread follows from the seed.
pub(crate) fn seed(seed: u64) {
    RANDOM.set(Some(seed));
}

/// From now on the wall clock of this thread follows the runtime's, which has to be paused.
pub(crate) fn start_clock() {
    START.set(Some(Instant::now()));
}

/// The wall clock jumps; what only passes goes on.
pub(crate) fn jump(seconds: i64) {
    JUMPED.set(JUMPED.get() + seconds * 1_000_000_000);
}

/// What has passed since the start.
pub(crate) fn elapsed() -> Duration {
    START.get().map(|start| start.elapsed()).unwrap_or_default()
}

/// One step of `SplitMix64`.
pub(crate) fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Takes the place of `getrandom(2)` of the C library.
///
/// # Safety
/// As there: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    let Some(mut state) = RANDOM.get() else {
        // SAFETY: the arguments are those of the call, whose promise is the caller's.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as isize;
    };
    if length > 0 {
        // SAFETY: the caller promises that many writable bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&next(&mut state).to_le_bytes()[..chunk.len()]);
        }
    }
    RANDOM.set(Some(state));
    length as isize
}

/// Takes the place of `clock_gettime(2)` of the C library.
///
/// # Safety
/// As there: `time` is valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if clock == libc::CLOCK_REALTIME
        && let Some(start) = START.get()
    {
        // The runtime's clock is paused: it asks no other.
        let passed = (DAWN + start.elapsed()).as_nanos() as i64 + JUMPED.get();
        let now = libc::timespec { tv_sec: passed / 1_000_000_000, tv_nsec: passed % 1_000_000_000 };
        // SAFETY: the caller promises that it may be written.
        unsafe { time.write(now) };
        return 0;
    }
    // SAFETY: the arguments are those of the call, whose promise is the caller's.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int }
}
