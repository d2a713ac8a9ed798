//! Where the key-encryption key comes from.
//!
//! It wraps one key, that of the epoch ([`super::slots`]), which wraps the data keys. So a change of
//! the key-encryption key and a change of the epoch are the same thing: every live data key is
//! wrapped anew, and what wrapped it before is destroyed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use zeroize::Zeroizing;

use super::VaultError;
use super::disk::sync_directory;
use super::seal::{Cipher, KEY_BYTES, random};

/// Where the key that wraps all others comes from; best kept off the store's disk.
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
    /// A pass-phrase, as bytes. The key is made of it by Argon2id (RFC 9106), with parameters and salt
    /// that the store keeps.
    PassPhrase(Zeroizing<Vec<u8>>),
    /// The key itself.
    Raw(Zeroizing<[u8; KEY_BYTES]>),
}

/// What a key-encryption key is made of, as the store remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KekKind {
    /// 32 bytes that come from outside.
    Key,
    /// A pass-phrase.
    PassPhrase(Kdf),
}

/// How a pass-phrase becomes a key: Argon2id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kdf {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
    /// Drawn at random with the store, and whenever its key is changed.
    pub salt: [u8; 16],
}

/// More memory than this is no setting of ours: the header that asks for it is not taken.
const KDF_MEMORY_MAX_KIB: u32 = 4 << 20;

impl Kdf {
    /// The second recommended setting of RFC 9106, section 4: 64 MiB, 3 passes, 4 lanes.
    pub(super) fn fresh() -> Result<Self, VaultError> {
        let mut salt = [0; 16];
        random(&mut salt)?;
        Ok(Self {
            memory_kib: 64 << 10,
            passes: 3,
            lanes: 4,
            salt,
        })
    }

    /// Whether the parameters can be ones that [`Kdf::fresh`] made, now or in a later version.
    pub(super) const fn is_sane(&self) -> bool {
        self.memory_kib <= KDF_MEMORY_MAX_KIB && self.passes <= 64 && self.lanes <= 64
    }

    fn key(&self, phrase: &[u8]) -> Result<Zeroizing<[u8; KEY_BYTES]>, VaultError> {
        let failed = |_| VaultError::Generator;
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(KEY_BYTES));
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.map_err(failed)?);
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let made = argon2.hash_password_into(phrase, &self.salt, &mut *key);
        made.map_err(failed)?;
        Ok(key)
    }
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
            Self::PassPhrase(_) => f.write_str("PassPhrase"),
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
    /// A pass-phrase of no bytes is none.
    #[error("the pass-phrase is empty")]
    Empty,
    /// The store was made with a pass-phrase, and another kind of key is given, or the other way.
    #[error("the store's key-encryption key is {}, and {} is given", kind_name(*.pass_phrase), kind_name(!*.pass_phrase))]
    Kind {
        /// Whether the store wants a pass-phrase.
        pass_phrase: bool,
    },
    /// The name of a credential is a single file name.
    #[error("credential name {name:?} is not a file name")]
    Name {
        /// The name.
        name: String,
    },
}

const fn kind_name(pass_phrase: bool) -> &'static str {
    if pass_phrase {
        "a pass-phrase"
    } else {
        "a key"
    }
}

impl KekSource {
    /// What a new store, or one that gets this key, is to remember.
    pub(super) fn fresh_kind(&self) -> Result<KekKind, VaultError> {
        Ok(match self {
            Self::PassPhrase(_) => KekKind::PassPhrase(Kdf::fresh()?),
            _ => KekKind::Key,
        })
    }

    /// Loads the key. `new_key`: nothing is wrapped under it yet, so it may be made.
    pub(super) fn load(&self, new_key: bool, kind: &KekKind) -> Result<Cipher, VaultError> {
        let (wants, given) = (
            matches!(kind, KekKind::PassPhrase(_)),
            matches!(self, Self::PassPhrase(_)),
        );
        if wants != given {
            return Err(KekError::Kind { pass_phrase: wants }.into());
        }
        match self {
            Self::File { path, create } => {
                if *create && new_key && !path.exists() {
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
            Self::PassPhrase(phrase) if phrase.is_empty() => Err(KekError::Empty.into()),
            Self::PassPhrase(phrase) => match kind {
                KekKind::PassPhrase(kdf) => Cipher::new(&*kdf.key(phrase)?),
                KekKind::Key => unreachable!("the kinds were compared"),
            },
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
