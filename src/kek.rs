//! The key-encryption key of a node's store, from where its configuration says.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use qkd_kma::vault::KekSource;
use zeroize::Zeroizing;

use crate::config::{KekConfig, PassPhraseFrom};

/// The longest pass-phrase.
const PHRASE_MAX_BYTES: usize = 1024;

/// Why a key-encryption key cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KekSourceError {
    /// systemd's `$CREDENTIALS_DIRECTORY` is not set.
    #[error(
        "credential {name} is configured, but $CREDENTIALS_DIRECTORY is not set: start under systemd with LoadCredentialEncrypted={name}:..."
    )]
    NoCredentials {
        /// The credential.
        name: String,
    },
    /// The file of a pass-phrase cannot be read.
    #[error("pass-phrase in {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others may read the file of a pass-phrase.
    #[error("{} may be read by others (mode {mode:04o}): chmod 600 {}", path.display(), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The variable is not set.
    #[error("pass-phrase: the variable {name} is not set")]
    NoVariable {
        /// The variable.
        name: String,
    },
    /// There is nobody to ask.
    #[error("pass-phrase: there is no terminal to ask on; give it as file:PATH or credential:NAME")]
    NoTerminal(#[source] io::Error),
    /// It was not typed the same way twice.
    #[error("the two pass-phrases differ")]
    Differ,
}

/// The source that a configuration names. `new`: the key is to be a new one, which is asked for twice,
/// and whose file is made.
///
/// # Errors
///
/// See [`KekSourceError`].
pub fn kek_source(kek: &KekConfig, new: bool) -> Result<KekSource, KekSourceError> {
    Ok(match kek {
        KekConfig::File(path) => KekSource::File {
            path: path.clone(),
            create: new,
        },
        KekConfig::Credential(name) => KekSource::Credential {
            directory: credentials(name)?,
            name: name.clone(),
        },
        KekConfig::Passphrase(from) => KekSource::PassPhrase(match from {
            PassPhraseFrom::Prompt => prompt(new)?,
            PassPhraseFrom::File(path) => from_file(path)?,
            PassPhraseFrom::Credential(name) => from_file(&credentials(name)?.join(name))?,
            PassPhraseFrom::Environment(name) => from_environment(name)?,
        }),
    })
}

fn credentials(name: &str) -> Result<PathBuf, KekSourceError> {
    let directory = std::env::var_os("CREDENTIALS_DIRECTORY");
    let missing = || KekSourceError::NoCredentials { name: name.into() };
    directory.map(PathBuf::from).ok_or_else(missing)
}

fn from_environment(name: &str) -> Result<Zeroizing<Vec<u8>>, KekSourceError> {
    use std::os::unix::ffi::OsStringExt;
    let value = std::env::var_os(name);
    let missing = || KekSourceError::NoVariable { name: name.into() };
    Ok(Zeroizing::new(value.ok_or_else(missing)?.into_vec()))
}

fn from_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, KekSourceError> {
    let failed = |source| KekSourceError::File {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 {
        let path = path.into();
        return Err(KekSourceError::Mode { path, mode });
    }
    let mut phrase = Zeroizing::new(Vec::with_capacity(PHRASE_MAX_BYTES));
    let limit = PHRASE_MAX_BYTES as u64;
    file.take(limit).read_to_end(&mut phrase).map_err(failed)?;
    trim_newline(&mut phrase);
    Ok(phrase)
}

fn trim_newline(phrase: &mut Vec<u8>) {
    while matches!(phrase.last(), Some(b'\n' | b'\r')) {
        phrase.pop();
    }
}

fn prompt(new: bool) -> Result<Zeroizing<Vec<u8>>, KekSourceError> {
    if !new {
        return ask("Pass-phrase of the key store: ");
    }
    let phrase = ask("New pass-phrase of the key store: ")?;
    let again = ask("Again: ")?;
    if *phrase != *again {
        return Err(KekSourceError::Differ);
    }
    Ok(phrase)
}

/// Asks on the terminal, which does not show what is typed.
fn ask(question: &str) -> Result<Zeroizing<Vec<u8>>, KekSourceError> {
    let asked = (|| {
        let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
        let before = tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent.local_flags &= !LocalFlags::ECHO;
        silent.local_flags |= LocalFlags::ECHONL | LocalFlags::ICANON;
        terminal.write_all(question.as_bytes())?;
        tcsetattr(&terminal, SetArg::TCSAFLUSH, &silent)?;
        let mut phrase = Zeroizing::new(vec![0; PHRASE_MAX_BYTES]);
        let read = terminal.read(&mut phrase);
        tcsetattr(&terminal, SetArg::TCSAFLUSH, &before)?;
        phrase.truncate(read?);
        trim_newline(&mut phrase);
        Ok(phrase)
    })();
    asked.map_err(KekSourceError::NoTerminal)
}

/// Whether a store's data keys are there, so that its key-encryption key is not a new one.
pub(crate) fn has_data_keys(store: &Path) -> bool {
    fs::exists(store.join("slots")).unwrap_or(true)
}
