//! The entries about the store: where keys are kept, under which key, and for how long.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use qkd_kma::{store::Retention, vault::HistoryLimit};
use serde::Deserialize;

/// Where keys are kept.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StoreConfig {
    /// Sealed, in LMDB.
    Lmdb {
        /// The key-encryption key.
        #[serde(default)]
        kek: KekConfig,
        /// Most bytes of the database, in GiB.
        #[serde(default = "default_max_gib")]
        max_gib: usize,
        /// Every so many hours all data keys are wrapped anew; 0: never.
        #[serde(default = "default_epoch_hours")]
        epoch_hours: u64,
    },
    /// In key memory only; a restart begins with an empty stock.
    Memory,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self::Lmdb {
            kek: KekConfig::default(),
            max_gib: default_max_gib(),
            epoch_hours: default_epoch_hours(),
        }
    }
}

impl StoreConfig {
    /// How often data keys are wrapped anew.
    #[must_use]
    pub fn epoch_period(&self) -> Option<Duration> {
        match self {
            Self::Lmdb { epoch_hours, .. } if *epoch_hours > 0 => {
                Some(Duration::from_secs(epoch_hours.saturating_mul(3600)))
            }
            _ => None,
        }
    }

    pub(super) fn resolve(&mut self, base: &Path, data: &Path) {
        if let Self::Lmdb { kek, .. } = self {
            kek.resolve(base, data);
        }
    }
}

/// Where the key-encryption key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum KekConfig {
    /// A file of 32 random bytes, mode 0400 or 0600. Made with a new store if it is not there.
    File(PathBuf),
    /// A credential that systemd hands over (`LoadCredentialEncrypted=`).
    Credential(String),
    /// A pass-phrase: `prompt`, `file:PATH`, `credential:NAME` or `env:NAME`.
    Passphrase(PassPhraseFrom),
}

impl Default for KekConfig {
    /// `kek` in the data directory: keep it elsewhere where the disk may be taken away.
    fn default() -> Self {
        Self::File(PathBuf::from("kek"))
    }
}

impl KekConfig {
    fn resolve(&mut self, base: &Path, data: &Path) {
        match self {
            Self::File(path) => {
                // The default lies beside the store, any other path is taken as all paths are.
                let default = path.as_path() == Path::new("kek");
                *path = if default { data } else { base }.join(&*path);
            }
            Self::Passphrase(PassPhraseFrom::File(path)) => *path = base.join(&*path),
            _ => {}
        }
    }
}

impl FromStr for KekConfig {
    type Err = String;

    /// `file:PATH`, `credential:NAME` or `passphrase:` and where it comes from.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("credential", name)) => Ok(Self::Credential(name.to_owned())),
            Some(("passphrase", from)) => from.parse().map(Self::Passphrase),
            _ => Err("not file:PATH, credential:NAME or passphrase:SOURCE".to_owned()),
        }
    }
}

/// Where a pass-phrase comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum PassPhraseFrom {
    /// The terminal.
    Prompt,
    /// A file that only its owner may read; the newline at its end does not count.
    File(PathBuf),
    /// A credential that systemd hands over.
    Credential(String),
    /// A variable of the environment, which every process of the same user can read.
    Environment(String),
}

impl FromStr for PassPhraseFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "prompt" => Ok(Self::Prompt),
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("credential", name)) => Ok(Self::Credential(name.to_owned())),
            Some(("env", name)) => Ok(Self::Environment(name.to_owned())),
            _ => Err("not prompt, file:PATH, credential:NAME or env:NAME".to_owned()),
        }
    }
}

impl TryFrom<String> for PassPhraseFrom {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How long keys and their history are kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Key in stock that is older than so many days is burned by the end that owns it, and the other
    /// end follows; 0: never.
    pub expire_days: u64,
    /// Segments that are used up are kept for so many days, sealed and out of use, before they are
    /// erased; 0: erased at once.
    pub preserve_days: u64,
    /// History that is older than so many days is dropped.
    pub history_days: u64,
    /// The oldest history beyond so many MiB is dropped.
    pub history_mib: u64,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            expire_days: 0,
            preserve_days: 0,
            history_days: 400,
            history_mib: 1024,
        }
    }
}

impl RetentionConfig {
    /// As the store takes it.
    #[must_use]
    pub fn policy(&self) -> Retention {
        let days = |days: u64| Duration::from_secs(days.saturating_mul(24 * 3600));
        let some = |number: u64| (number > 0).then(|| days(number));
        Retention {
            expire_after: some(self.expire_days),
            preserve_for: some(self.preserve_days),
            history: HistoryLimit {
                bytes: self.history_mib << 20,
                age: days(self.history_days),
            },
        }
    }
}

fn default_max_gib() -> usize {
    16
}

fn default_epoch_hours() -> u64 {
    24
}
