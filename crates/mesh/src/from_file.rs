//! Settings that stand in a file which may change while we run: a ConfigMap, or what an operator edits.

use std::{
    fmt, fs,
    io::{ErrorKind, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nsm_identity::FileWatch;
use tokio::sync::watch;

/// Far above any such file; what is larger is not read into memory.
const MAX_BYTES: u64 = 1 << 20;
/// How often the file is looked at although nobody tells that it changed: its directory may have been replaced.
const LOOK: Duration = Duration::from_secs(30);

/// A value that is read from a file now, and again whenever the file changes. While the file is not what it should be
/// the value stays as it was, and the log says why. Clones share it.
pub struct FromFile<T>(watch::Receiver<Arc<T>>);

/// A file that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct BadFile {
    /// The file.
    pub path: PathBuf,
    /// What about it cannot be used, and what was expected.
    pub problem: String,
}

impl<T> Clone for FromFile<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: fmt::Debug> fmt::Debug for FromFile<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FromFile").field(&self.0.borrow()).finish()
    }
}

impl<T: Send + Sync + 'static> FromFile<T> {
    /// Reads the file, and follows it until the last clone is gone. `parse` is given the text, or `None` where there
    /// is no such file. Needs a runtime.
    ///
    /// # Errors
    /// The file cannot be read, or is not what `parse` expects.
    pub fn open(
        path: impl Into<PathBuf>,
        parse: impl Fn(Option<&str>) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, BadFile> {
        let path = path.into();
        // The watch comes first: what is written after it is told, what was written before is read here.
        let watch = FileWatch::new(&path);
        let text = read(&path)?;
        let bad = |problem| BadFile { path: path.clone(), problem };
        let (tell, value) = watch::channel(Arc::new(parse(text.as_deref()).map_err(bad)?));
        tokio::spawn(async move {
            let (mut watch, mut seen) = (watch, Ok(text));
            loop {
                tokio::select! {
                    looked = tokio::time::timeout(LOOK, watch.maybe_changed()) => {
                        if looked.is_err() {
                            watch = FileWatch::new(&path);
                        }
                    }
                    () = tell.closed() => return,
                }
                let now = read(&path);
                if now == seen {
                    continue;
                }
                let parsed = now.as_ref().map_err(ToString::to_string).and_then(|text| {
                    parse(text.as_deref()).map_err(|problem| format!("{}: {problem}", path.display()))
                });
                match parsed {
                    Ok(new) => {
                        tracing::info!(file = %path.display(), "read again");
                        tell.send_replace(Arc::new(new));
                    }
                    Err(problem) => tracing::warn!(problem, "not read again; what it said before holds"),
                }
                seen = now;
            }
        });
        Ok(Self(value))
    }

    /// A value that does not change.
    pub fn fixed(value: T) -> Self {
        Self(watch::channel(Arc::new(value)).1)
    }

    /// Returns when the file says something else than it did at the last call of this. Where it does not change: never.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What the file says now.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.borrow())
    }
}

impl<T: Default + Send + Sync + 'static> Default for FromFile<T> {
    fn default() -> Self {
        Self::fixed(T::default())
    }
}

/// `None`: there is no such file.
fn read(path: &Path) -> Result<Option<String>, BadFile> {
    let bad = |problem: String| BadFile { path: path.to_owned(), problem };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(bad(e.to_string())),
    };
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| bad(e.to_string()))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(bad(format!("it is larger than {MAX_BYTES} bytes")));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn settles(file: &FromFile<u32>, on: u32) {
        while *file.get() != on {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    #[tokio::test]
    async fn a_value_follows_its_file_and_outlives_mistakes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("setting");
        let parse = |text: Option<&str>| match text {
            None => Ok(0),
            Some(text) => text.trim().parse::<u32>().map_err(|e| format!("{text:?} is no number: {e}")),
        };
        let file = FromFile::open(&path, parse).unwrap();
        assert_eq!(*file.get(), 0, "there is none");
        let mut told = file.clone();
        fs::write(&path, "1").unwrap();
        told.changed().await;
        assert_eq!(*told.get(), 1);
        settles(&file, 1).await;
        // As Kubernetes does it: a link is moved into place.
        fs::write(directory.path().join("v2"), "2").unwrap();
        std::os::unix::fs::symlink("v2", directory.path().join("new")).unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        settles(&file, 2).await;
        fs::remove_file(&path).unwrap();
        settles(&file, 0).await;
        fs::write(&path, "3").unwrap();
        settles(&file, 3).await;
        // A mistake, and then its correction: the value in between is the old one.
        fs::write(&path, "three").unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(*file.get(), 3);
        fs::write(&path, "4").unwrap();
        settles(&file, 4).await;
    }

    #[tokio::test]
    async fn a_file_that_is_wrong_from_the_start_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("setting");
        let parse = |text: Option<&str>| match text {
            Some("good") => Ok(()),
            other => Err(format!("{other:?}; expected good")),
        };
        fs::write(&path, "bad").unwrap();
        let error = FromFile::open(&path, parse).unwrap_err().to_string();
        assert!(error.contains("setting: ") && error.contains("expected good"), "{error}");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(FromFile::open(&path, parse).unwrap_err().to_string().contains("UTF-8"));
        fs::File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(FromFile::open(&path, parse).unwrap_err().to_string().contains("larger"));
        assert!(FromFile::open(directory.path(), parse).is_err(), "a directory");
    }
}
