//! Where the key-encryption key comes from.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::VaultError;
use super::disk::sync_directory;
use super::seal::{Cipher, KEY_BYTES, random};

/// Where the key that wraps all data keys comes from: 32 bytes, best kept off the store's disk.
pub enum KekSource {
    /// A file of exactly 32 bytes, mode 0400 or 0600.
    File {
        /// The file.
        path: PathBuf,
        /// Make the file, of random bytes, if neither it nor the store is there.
        create: bool,
    },
    /// A credential that the service manager hands over in a directory (systemd's
    /// `$CREDENTIALS_DIRECTORY`). Not readable to everyone.
    Credential {
        /// The directory.
        directory: PathBuf,
        /// Name of the credential.
        name: String,
    },
    /// The key itself.
    Raw(Zeroizing<[u8; KEY_BYTES]>),
}

impl std::fmt::Debug for KekSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, create } => f
                .debug_struct("File")
                .field("path", path)
                .field("create", create)
                .finish(),
            Self::Credential { directory, name } => f
                .debug_struct("Credential")
                .field("directory", directory)
                .field("name", name)
                .finish(),
            Self::Raw(_) => f.write_str("Raw(32 bytes)"),
        }
    }
}

/// Why there is no key-encryption key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KekError {
    /// The file cannot be read or made.
    #[error("key-encryption key {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others may read or change the file.
    #[error("key-encryption key {} has mode {mode:04o}; allowed are {allowed}", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What they may be.
        allowed: &'static str,
    },
    /// The file is not a regular file of 32 bytes.
    #[error("key-encryption key {} is not a file of {KEY_BYTES} bytes", path.display())]
    Length {
        /// The file.
        path: PathBuf,
    },
    /// The name of a credential is a single file name.
    #[error("credential name {name:?} is not a file name")]
    Name {
        /// The name.
        name: String,
    },
}

impl KekSource {
    /// Loads the key. `new_store`: nothing is wrapped under it yet, so it may be made.
    pub(super) fn load(&self, new_store: bool) -> Result<Cipher, VaultError> {
        match self {
            Self::File { path, create } => {
                if *create && new_store && !path.exists() {
                    make(path)?;
                }
                Cipher::new(&*read(path, "0400 and 0600", |mode| {
                    matches!(mode, 0o400 | 0o600)
                })?)
            }
            Self::Credential { directory, name } => {
                let path = directory.join(name);
                if path.file_name() != Some(name.as_ref()) || path.parent() != Some(directory) {
                    return Err(KekError::Name { name: name.clone() }.into());
                }
                let key = read(&path, "those without access for others", |mode| {
                    mode & 0o007 == 0
                })?;
                Cipher::new(&key)
            }
            Self::Raw(key) => Cipher::new(key),
        }
    }
}

fn read(
    path: &Path,
    allowed: &'static str,
    fits: impl Fn(u32) -> bool,
) -> Result<Zeroizing<[u8; KEY_BYTES]>, KekError> {
    let io = |source| KekError::Io {
        path: path.into(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    let mode = about.permissions().mode() & 0o7777;
    if !fits(mode) {
        return Err(KekError::Mode {
            path: path.into(),
            mode,
            allowed,
        });
    }
    if !about.is_file() || about.len() != KEY_BYTES as u64 {
        return Err(KekError::Length { path: path.into() });
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    file.read_exact(&mut *key).map_err(io)?;
    Ok(key)
}

/// Makes the file whole or not at all. What it wraps comes later, so it is durable before.
fn make(path: &Path) -> Result<(), VaultError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    random(&mut *key)?;
    let mut passing = path.as_os_str().to_owned();
    passing.push(".new");
    let written = (|| {
        let _ = fs::remove_file(&passing);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(&passing)?;
        file.write_all(&*key)?;
        file.sync_all()?;
        fs::rename(&passing, path)?;
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
            _ => sync_directory(Path::new(".")),
        }
    })();
    written.map_err(|source| {
        VaultError::Kek(KekError::Io {
            path: path.into(),
            source,
        })
    })
}
