//! The files under a store, as few operations as it needs, so that a test can put a disk under it
//! that fails ([`super::sim`]).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::VaultError;

/// A file of bytes. What was written is durable only after [`BlockFile::sync`].
pub trait BlockFile: Send {
    /// Fills `out` from `offset`.
    ///
    /// # Errors
    ///
    /// The system's; [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes`, past the end if need be; a gap reads as zeros.
    ///
    /// # Errors
    ///
    /// The system's. A part may have been written.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes bytes and length durable.
    ///
    /// # Errors
    ///
    /// The system's. Nothing is known then about what was written since the last sync, and trying
    /// again does not help: the system may have dropped it.
    fn sync(&mut self) -> io::Result<()>;

    /// Length of the file.
    ///
    /// # Errors
    ///
    /// The system's.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Cuts the file, or extends it by zeros.
    ///
    /// # Errors
    ///
    /// The system's.
    fn truncate(&mut self, len_bytes: u64) -> io::Result<()>;
}

/// One directory. Which names exist is durable only after [`Disk::sync_dir`].
pub trait Disk: Send {
    /// Opens a file to read and write; `None` if there is none.
    ///
    /// # Errors
    ///
    /// The system's.
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn BlockFile>>>;

    /// Makes an empty file, in the place of one of that name.
    ///
    /// # Errors
    ///
    /// The system's.
    fn create(&self, name: &str) -> io::Result<Box<dyn BlockFile>>;

    /// Renames a file, in the place of one of that name: either the old or the new one is there at
    /// any time, and after any crash.
    ///
    /// # Errors
    ///
    /// The system's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Gives a file a second name, in the place of one of that name.
    ///
    /// # Errors
    ///
    /// The system's.
    fn link(&self, name: &str, second: &str) -> io::Result<()>;

    /// Names, lengths in bytes and ages (since the last write) of all files.
    ///
    /// # Errors
    ///
    /// The system's.
    fn list(&self) -> io::Result<Vec<(String, u64, Duration)>>;

    /// Removes a file if it is there.
    ///
    /// # Errors
    ///
    /// The system's.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names durable.
    ///
    /// # Errors
    ///
    /// The system's.
    fn sync_dir(&self) -> io::Result<()>;
}

/// Makes a file whole or not at all: under a passing name, synced, then renamed.
pub(super) fn create_whole(
    disk: &dyn Disk,
    name: &'static str,
    content: &[u8],
) -> Result<Box<dyn BlockFile>, VaultError> {
    let io = |source| VaultError::Io { file: name, source };
    let passing = format!("{name}.new");
    let mut file = disk.create(&passing).map_err(io)?;
    file.write_at(content, 0).map_err(io)?;
    file.sync().map_err(io)?;
    disk.rename(&passing, name).map_err(io)?;
    disk.sync_dir().map_err(io)?;
    Ok(file)
}

/// A directory of the real file system, held by one vault at a time.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Locked exclusively; the lock goes with it, also when the process dies.
    _lock: Option<File>,
}

impl Directory {
    /// Makes the directory if need be, and locks it.
    ///
    /// # Errors
    ///
    /// [`VaultError::InUse`], [`VaultError::Io`].
    pub(super) fn lock(path: &Path) -> Result<Self, VaultError> {
        let io = |source| VaultError::Io {
            file: "directory",
            source,
        };
        make_directory(path).map_err(io)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(io)?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => VaultError::InUse { dir: path.into() },
            fs::TryLockError::Error(source) => io(source),
        })?;
        Ok(Self {
            path: path.into(),
            _lock: Some(lock),
        })
    }

    /// A directory that is only looked at.
    pub(super) fn unlocked(path: &Path) -> Self {
        Self {
            path: path.into(),
            _lock: None,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes a directory that only its owner may enter, durably; leaves one that is there as it is.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)?;
    sync_directory(path)?;
    path.parent().map_or(Ok(()), |parent| {
        let nameless = parent.as_os_str().is_empty();
        sync_directory(if nameless { Path::new(".") } else { parent })
    })
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Disk for Directory {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn BlockFile>>> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path.join(name));
        match opened {
            Ok(file) => Ok(Some(Box::new(RealFile(file)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn BlockFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.path.join(name))?;
        Ok(Box::new(RealFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn link(&self, name: &str, second: &str) -> io::Result<()> {
        self.remove(second)?;
        fs::hard_link(self.path.join(name), self.path.join(second))
    }

    fn list(&self) -> io::Result<Vec<(String, u64, Duration)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            // One that is removed meanwhile is not there.
            if let (Ok(name), Ok(about)) = (entry.file_name().into_string(), entry.metadata())
                && about.is_file()
            {
                let age = about.modified()?.elapsed().unwrap_or(Duration::ZERO);
                files.push((name, about.len(), age));
            }
        }
        Ok(files)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            answer => answer,
        }
    }

    fn sync_dir(&self) -> io::Result<()> {
        sync_directory(&self.path)
    }
}

struct RealFile(File);

impl BlockFile for RealFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn truncate(&mut self, len_bytes: u64) -> io::Result<()> {
        self.0.set_len(len_bytes)
    }
}
