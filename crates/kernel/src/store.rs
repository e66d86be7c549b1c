//! Plans of wires in files, so that a forwarder that starts again knows what it made.
//!
//! Wires of the kernel die with a reboot, and so may these files: they belong on a tmpfs below `/run` and are never
//! synced. A file is written beside its place and renamed into it. Length and checksum in its first line tell a file
//! that was torn all the same (a full disk, a copied directory); such a file is reported, and does no harm.
//!
//! ```text
//! nsm-wire 1 1042 9a3c8e0b12f4d5a7      version, length of the rest, checksum of the rest
//! {"plan":{…},"nsids":{…},"data":{…}}
//! ```

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apply::Nsids;
use crate::error::{Error, Result};
use crate::plan::{Invalid, MAX_ID, WirePlan, decode_id, encode_id};

/// A directory of records, one file for each connection id.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// What is remembered of a wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it shall be.
    pub plan: WirePlan,
    /// Where it is, without descriptors.
    pub nsids: Nsids,
    /// What else the caller wants to know again; small.
    #[serde(default)]
    pub data: serde_json::Value,
}

/// All that is in a store.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Records by connection id, in order.
    pub records: Vec<Record>,
    /// Files that are no records.
    pub damaged: Vec<Damaged>,
}

/// A file that is not what it should be. It stays until its connection is stored or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// The file.
    pub path: PathBuf,
    /// The connection its name stands for, if any.
    pub id: Option<String>,
    /// What is wrong with it.
    pub why: String,
}

const MAGIC: &str = "nsm-wire 1";
const SUFFIX: &str = ".wire";
/// While it is written. A dot in front, which no encoded id has.
const UNFINISHED: &str = ".unfinished-";
/// Far above any record; what is larger is not read into memory.
const MAX_BYTES: u64 = 16 << 20;

impl Store {
    /// The store in that directory, which is made if need be. Half-written files of an earlier life are removed: only
    /// the one process that writes there may open it; others [`look`](Self::look).
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let store = Self { dir: dir.into() };
        let failed = |source| Error::Store { what: "open", path: store.dir.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&store.dir).map_err(failed)?;
        for entry in fs::read_dir(&store.dir).map_err(failed)?.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(store)
    }

    /// What another process keeps in that directory, which nobody but that process changes.
    pub fn look(dir: impl Into<PathBuf>) -> Result<Loaded> {
        Self { dir: dir.into() }.load()
    }

    /// Stores a record in place of an older one of the same connection. After an error the older one is unharmed.
    pub fn put(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.plan.id)?;
        let failed = |source| Error::Store { what: "write", path: path.clone(), source };
        let body = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        let mut bytes = format!("{MAGIC} {} {:016x}\n", body.len(), checksum(&body)).into_bytes();
        bytes.extend(body);
        let unfinished = self.dir.join(format!("{UNFINISHED}{}", encode_id(&record.plan.id)));
        let write = || {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&unfinished)?;
            file.write_all(&bytes)?;
            drop(file);
            fs::rename(&unfinished, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&unfinished);
            failed(source)
        })
    }

    /// Forgets a connection. Whether it was known.
    pub fn remove(&self, id: &str) -> Result<bool> {
        let path = self.path(id)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Store { what: "remove", path, source }),
        }
    }

    /// Reads everything. A damaged file is part of the answer, not an error.
    pub fn load(&self) -> Result<Loaded> {
        let failed = |source| Error::Store { what: "read", path: self.dir.clone(), source };
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()))
            {
                continue;
            }
            let id = path.file_name().and_then(|name| decode_id(name.to_str()?.strip_suffix(SUFFIX)?));
            match read(&path, id.as_deref()) {
                Ok(record) => loaded.records.push(record),
                Err(why) => {
                    tracing::warn!(path = %path.display(), why, "ignored a damaged wire record");
                    loaded.damaged.push(Damaged { path, id, why });
                }
            }
        }
        loaded.records.sort_by(|a, b| a.plan.id.cmp(&b.plan.id));
        Ok(loaded)
    }

    fn path(&self, id: &str) -> Result<PathBuf> {
        let name = encode_id(id);
        if !(1..=MAX_ID).contains(&name.len()) {
            return Err(Invalid::Id { length: name.len() }.into());
        }
        Ok(self.dir.join(name + SUFFIX))
    }
}

fn read(path: &Path, id: Option<&str>) -> Result<Record, String> {
    let Some(id) = id else { return Err("its name is not one of a record".into()) };
    let length = fs::symlink_metadata(path).map_err(|e| e.to_string())?;
    if !length.is_file() || length.len() > MAX_BYTES {
        return Err("it is not a file of a record's size".into());
    }
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    let line = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (head, body) = (&bytes[..line], &bytes[line + 1..]);
    if head != format!("{MAGIC} {} {:016x}", body.len(), checksum(body)).as_bytes() {
        return Err("it was torn: version, length or checksum do not fit".into());
    }
    let record: Record = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    record.plan.validate().map_err(|e| e.to_string())?;
    if record.plan.id != id {
        return Err("it is the record of another connection".into());
    }
    Ok(record)
}

/// FNV-1a of 64 bits: to find torn writes, not to keep anybody out.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
