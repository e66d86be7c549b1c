//! The disks of the nodes: where each forwarder keeps its plans is a small file system of its own, which can be full.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::Error;
use crate::plan::{Paths, Plan};

/// Room for the plans of some ten thousand wires, a page each.
const SIZE: &std::ffi::CStr = c"size=48m,mode=0755";
/// What takes all the room that is left.
const FILLER: &str = "filler";

/// Gives each node its disk. They are in memory, as `/run` is.
pub(crate) fn make(plan: &Plan) -> Result<(), Error> {
    for node in plan.nodes() {
        let path = plan.paths().disk(node);
        fs::create_dir_all(&path).map_err(Error::files("make directory", &path))?;
        mount("nsm-lab", &path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, SIZE)
            .map_err(|error| Error::system(format!("mount the disk of {node}"), error))?;
    }
    Ok(())
}

/// Takes away the disks of a lab, whoever made it.
pub(crate) fn remove(paths: &Paths) -> Result<(), Error> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo");
    let table = table.map_err(Error::files("read", "/proc/thread-self/mountinfo"))?;
    // Labs have names without anything that is escaped here (proc_pid_mountinfo(5)).
    let places = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for place in places.filter(|place| place.starts_with(&paths.root)) {
        // Whatever still has a file open there keeps it alone.
        unmount(place, UnmountFlags::DETACH)
            .map_err(|error| Error::system(format!("unmount {}", place.display()), error))?;
    }
    Ok(())
}

/// A disk that is full until this goes.
#[derive(Debug)]
pub(crate) struct Full(PathBuf);

impl Full {
    pub(crate) fn make(disk: &Path) -> Result<Self, Error> {
        let path = disk.join(FILLER);
        let failed = Error::files("fill", &path);
        let full = Self(path.clone());
        let written = File::create(&path).and_then(|mut file| {
            let endless = &mut io::repeat(0);
            io::copy(endless, &mut file)
        });
        match written {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(full),
            Err(error) => Err(failed(error)),
            Ok(_) => Err(failed(io::Error::other("it takes everything"))),
        }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // It goes with the disk at the latest.
        let _ = fs::remove_file(&self.0);
    }
}
