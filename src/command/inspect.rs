//! `inspect`: what a hand-over file holds. Never its key bytes, nor anything to compute them from.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use qkd_handover::type7::{self, HEADER_BYTES, Header, Type7Error};
use qkd_keyfile::{
    KeyFile, KeyFileError,
    codec::{MAGIC, MAX_METADATA_BYTES},
    units::bytes_for_bits,
};
use serde::Serialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::{Failure, chain, randomness::Randomness};

/// Longest file that is read: a key file of 2^26 bits. Nobody hands over more at once.
const MAX_FILE_BYTES: usize = (8 << 20) + MAX_METADATA_BYTES + 20;

#[derive(Debug, clap::Args)]
pub(super) struct InspectArgs {
    /// The file.
    file: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Why a file is not one that the bridge would take.
#[derive(Debug, thiserror::Error)]
pub(super) enum InspectError {
    #[error("cannot be read")]
    Read(#[from] io::Error),
    #[error("more than {MAX_FILE_BYTES} bytes: not a hand-over file")]
    TooLong,
    #[error("{bytes} bytes; a qcrypto file begins with 16, a key file with 20")]
    TooShort { bytes: usize },
    #[error(transparent)]
    Type7(#[from] Type7Error),
    #[error("{have} bytes of {need}: cut off, or still being written")]
    Incomplete { have: usize, need: usize },
    #[error("{extra} bytes after the key")]
    TrailingBytes { extra: usize },
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
}

/// What is in a file, as far as it could be read.
#[derive(Debug, Serialize)]
struct Inspection {
    file: PathBuf,
    #[serde(flatten)]
    contents: Contents,
    /// Why the bridge would not take it.
    problem: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct Contents {
    format: Option<&'static str>,
    file_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    type7: Option<Type7Fields>,
    key_bits: Option<u32>,
    randomness: Option<Randomness>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Type7Fields {
    tag: u32,
    first_epoch: u32,
    epochs: u32,
    name_matches: bool,
}

impl InspectArgs {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut contents = Contents::default();
        let result = inspect(&self.file, &mut contents);
        let inspection = Inspection {
            file: self.file.clone(),
            contents,
            problem: result.as_ref().err().map(|error| chain(error)),
        };
        if self.json {
            let json = serde_json::to_string_pretty(&inspection).map_err(io::Error::from)?;
            println!("{json}");
        } else {
            inspection.print();
        }
        result.map_err(|source| Failure::Inspect {
            file: self.file,
            source,
        })
    }
}

/// Fills in what can be read; the error is the first thing that is wrong.
fn inspect(path: &Path, contents: &mut Contents) -> Result<(), InspectError> {
    let bytes = read(path)?;
    contents.file_bytes = bytes.len();
    if bytes.starts_with(&MAGIC) {
        inspect_key_file(&bytes, contents)
    } else {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        inspect_type7(&bytes, &name, contents)
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, InspectError> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length > MAX_FILE_BYTES {
        return Err(InspectError::TooLong);
    }
    // All of it is there from the start: a buffer that grows leaves key behind.
    let mut bytes = Zeroizing::new(vec![0; MAX_FILE_BYTES.min(length + 1)]);
    let mut filled = 0;
    loop {
        match file.read(&mut bytes[filled..])? {
            0 => break,
            more => filled += more,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn inspect_type7(bytes: &[u8], name: &str, contents: &mut Contents) -> Result<(), InspectError> {
    let too_short = InspectError::TooShort { bytes: bytes.len() };
    let (header, words) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(too_short)?;
    let header = Header::decode(header)?;
    contents.format = Some("qcrypto final key (type 7)");
    contents.type7 = Some(Type7Fields {
        tag: header.tag,
        first_epoch: header.first_epoch,
        epochs: header.epochs,
        name_matches: header.check_name(name).is_ok(),
    });
    contents.key_bits = Some(header.key_bits);
    let (have, need) = (bytes.len(), header.file_bytes());
    if have < need {
        return Err(InspectError::Incomplete { have, need });
    }
    if have > need {
        let extra = have - need;
        return Err(InspectError::TrailingBytes { extra });
    }
    let mut key = Zeroizing::new(vec![0; bytes_for_bits(header.key_bits)]);
    type7::decode_key(&header, words, &mut key)?;
    contents.randomness = Randomness::of(&key, header.key_bits);
    Ok(header.check_name(name)?)
}

fn inspect_key_file(bytes: &[u8], contents: &mut Contents) -> Result<(), InspectError> {
    contents.format = Some("key file (QKDKEYF1)");
    let file = KeyFile::decode(bytes)?;
    contents.key_bits = Some(file.key_bits);
    contents.randomness = Randomness::of(file.key, file.key_bits);
    contents.metadata = serde_json::to_value(file.metadata).ok().map(withhold);
    Ok(())
}

/// Takes out digests of key bits: whoever has one can check a guess.
fn withhold(mut metadata: Value) -> Value {
    for (name, value) in metadata.as_object_mut().into_iter().flatten() {
        if name == "digest" {
            *value = "withheld".into();
        } else {
            *value = withhold(value.take());
        }
    }
    metadata
}

impl Inspection {
    fn print(&self) {
        let contents = &self.contents;
        let Some(format) = contents.format else {
            return;
        };
        let line = |name: &str, value: String| println!("{name:<14} {value}");
        line("file", self.file.display().to_string());
        line("format", format.to_owned());
        line("length", format!("{} bytes", contents.file_bytes));
        if let Some(fields) = &contents.type7 {
            let name = if fields.name_matches {
                "the file's name"
            } else {
                "NOT the file's name"
            };
            line("tag", format!("{:#x}", fields.tag));
            line(
                "first epoch",
                format!("{:08x} ({name})", fields.first_epoch),
            );
            line("epochs", fields.epochs.to_string());
        }
        match contents.key_bits {
            Some(0) => line("key", "none: a block that was given up".to_owned()),
            Some(bits) => line("key", format!("{bits} bits")),
            None => {}
        }
        if let Some(random) = &contents.randomness {
            for (name, value) in random.lines() {
                line(name, value);
            }
        }
        if let Some(metadata) = &contents.metadata {
            let json = format!("{metadata:#}");
            line("metadata", json.replace('\n', &format!("\n{:15}", "")));
        }
    }
}
