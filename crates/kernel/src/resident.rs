//! What of a program stays in memory. Most pages of a daemon's program are needed to start it and never again; the
//! kernel keeps them mapped, and counts them, until somebody lets go of them.

use std::fs;
use std::ops::Range;

use crate::sys;

/// This program and its libraries: what is mapped when it begins, and for as long as it lives.
#[derive(Debug)]
pub struct Program(Vec<Range<usize>>);

impl Program {
    /// To be called at the start of `main`: what other threads map and unmap later is not the program.
    #[must_use]
    pub fn at_start() -> Self {
        Self(mappings())
    }

    /// Lets go of its pages that are as their files have them. Those that are needed come back as they are touched, a
    /// few at a time, out of the page cache: nothing is read from a disk.
    ///
    /// Returns how many bytes are mapped so; 0 if nothing could be done, which does no harm.
    pub fn let_go(&self) -> usize {
        let ours = mappings().into_iter().filter(|range| self.0.contains(range));
        ours.filter(|range| sys::let_go(range.clone()).is_ok()).map(|range| range.len()).sum()
    }
}

fn mappings() -> Vec<Range<usize>> {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    unchanged(&maps).collect()
}

/// The mappings of files (man 5 proc_pid_smaps) that cannot be written to and of which no page is a copy of our own,
/// as relocations make them.
fn unchanged(maps: &str) -> impl Iterator<Item = Range<usize>> {
    let mut mapping = None;
    let mut own = None;
    maps.lines().filter_map(move |line| {
        let mut words = line.split_whitespace();
        match (words.next()?, words.next()?) {
            ("Anonymous:", size) => own = Some(size != "0"),
            // Swap comes after it, and only pages of our own are swapped.
            ("Swap:", size) => {
                let range = mapping.take()?;
                return (own.take() == Some(false) && size == "0").then_some(range);
            }
            (addresses, flags) if !addresses.ends_with(':') => {
                let (start, end) = addresses.split_once('-')?;
                let hex = |text| usize::from_str_radix(text, 16).ok();
                let inode = words.nth(2)?;
                let of_a_file = matches!(flags, "r--p" | "r-xp") && inode != "0";
                mapping = of_a_file.then_some(hex(start)?..hex(end)?);
                own = None;
            }
            _ => {}
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_pages_of_files_are_let_go() {
        let mapping = |head: &str, anonymous: u32, swap: u32| {
            format!(
                "{head}\nSize: 4 kB\nRss: 4 kB\nAnonymous: {anonymous:8} kB\nSwap: {swap:8} kB\nVmFlags: rd mr\n"
            )
        };
        let file =
            |range: &str, flags: &str| format!("{range} {flags} 00000000 fe:00 1016      /usr/bin/nsm");
        let maps = [
            mapping(&file("1000-2000", "r--p"), 0, 0),
            mapping(&file("2000-5000", "r-xp"), 0, 0),
            mapping(&file("5000-6000", "r--p"), 4, 0), // relocated
            mapping(&file("6000-7000", "r--p"), 0, 4), // relocated, and swapped out
            mapping(&file("7000-8000", "rw-p"), 0, 0),
            mapping(&file("8000-9000", "r--s"), 0, 0),
            mapping("9000-a000 r-xp 00000000 00:00 0                [vdso]", 0, 0),
            mapping("a000-b000 rw-p 00000000 00:00 0", 4, 0),
            "b000-c000 r-xp 00000000 fe:00 1016 /usr/bin/cut off".into(),
        ];
        assert_eq!(unchanged(&maps.concat()).collect::<Vec<_>>(), [0x1000..0x2000, 0x2000..0x5000]);
        assert_eq!(unchanged("nonsense\n-\n: :\nSwap: 0\nAnonymous: 0\nSwap: 0\n").count(), 0);
    }

    #[test]
    fn a_program_lives_on_without_its_pages_in_memory() {
        assert!(Program::at_start().let_go() > 0, "this program is mapped from a file");
        assert_eq!(Program(Vec::new()).let_go(), 0, "what was not there at the start is not its own");
        // Everything that is called and read from here on has to come back.
        assert_eq!(
            format!("{:?}", fs::read_to_string("/proc/self/comm").map(|text| !text.is_empty())),
            "Ok(true)"
        );
    }
}
