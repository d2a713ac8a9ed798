//! Reading a TOML file, and saying what is wrong with it.

use std::{
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

/// What is wrong with a configuration: where, and what to do.
#[derive(Debug)]
pub struct ConfigError {
    path: PathBuf,
    /// Line and column, from 1.
    place: Option<(usize, usize)>,
    what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// Something that concerns one entry of the file's `text`, or the file as a whole.
    pub(super) fn at(path: &Path, text: &str, span: Option<Range<usize>>, what: String) -> Self {
        Self {
            path: path.to_owned(),
            place: span.map(|span| place_of(text, &span)),
            what,
        }
    }

    /// Something that concerns the file as a whole.
    pub(crate) fn whole(path: &Path, what: String) -> Self {
        Self {
            path: path.to_owned(),
            place: None,
            what,
        }
    }
}

/// Reads any of the program's TOML files.
pub(crate) fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<(T, String), ConfigError> {
    let error = |place, what| ConfigError {
        path: path.to_owned(),
        place,
        what,
    };
    let text = fs::read_to_string(path).map_err(|source| error(None, unreadable(&source)))?;
    match toml::from_str(&text) {
        Ok(value) => Ok((value, text)),
        Err(source) => {
            let place = source.span().map(|span| place_of(&text, &span));
            Err(error(place, source.message().to_owned()))
        }
    }
}

fn unreadable(source: &io::Error) -> String {
    format!("cannot be read: {source}")
}

fn place_of(text: &str, span: &Range<usize>) -> (usize, usize) {
    let before = &text[..span.start.min(text.len())];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}
