//! What of a program stays in memory. Most pages of a daemon's code are needed to start it and never again; the kernel
//! keeps them mapped, and counts them, until somebody lets go of them.

use std::fs;
use std::ops::Range;

use crate::sys;

/// Lets go of the pages of this program's own code. Those that are needed come back as they are called, a few at a time,
/// out of the page cache: nothing is read from a disk.
///
/// Returns how many bytes of code there are; `None` if nothing could be done, which does no harm.
pub fn let_go_of_code() -> Option<usize> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let code = code_around(&maps, let_go_of_code as *const () as usize)?;
    let length = code.len();
    sys::let_go(code).ok().map(|()| length)
}

/// The mapping (man 5 proc_pid_maps) around an address, if it is code out of a file that nobody can have changed.
fn code_around(maps: &str, address: usize) -> Option<Range<usize>> {
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text| usize::from_str_radix(text, 16).ok();
        let range = hex(start)?..hex(end)?;
        let private_code = words.next()? == "r-xp";
        let file = words.nth(2)? != "0";
        (private_code && file && range.contains(&address)).then_some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_out_of_a_file_is_let_go() {
        let maps = "\
55d0c0000000-55d0c0100000 r--p 00000000 fe:00 1016 /usr/bin/nsm
55d0c0100000-55d0c1500000 r-xp 00100000 fe:00 1016 /usr/bin/nsm
55d0c1500000-55d0c1600000 r--p 01500000 fe:00 1016 /usr/bin/nsm
55d0c1600000-55d0c1700000 rw-p 01600000 fe:00 1016 /usr/bin/nsm
7f0000000000-7f0000001000 r-xp 00000000 00:00 0 [vdso]
";
        assert_eq!(code_around(maps, 0x55d0_c020_0000), Some(0x55d0_c010_0000..0x55d0_c150_0000));
        for elsewhere in [0x55d0_c000_0000, 0x55d0_c150_0000, 0x55d0_c160_0000, 0x7f00_0000_0000, 0] {
            assert_eq!(code_around(maps, elsewhere), None, "{elsewhere:x}");
        }
        assert_eq!(code_around("nonsense", 0), None);
    }

    #[test]
    fn a_program_lives_on_without_its_code_in_memory() {
        let length = let_go_of_code().expect("this program is mapped from a file");
        assert!(length > 0);
        // Everything that is called from here on has to come back.
        assert_eq!(
            format!("{:?}", fs::read_to_string("/proc/self/comm").map(|text| !text.is_empty())),
            "Ok(true)"
        );
    }
}
