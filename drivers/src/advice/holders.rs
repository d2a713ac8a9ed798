//! Which processes have a file open.

use std::{fs, path::Path};

/// A process that has the file open.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) pid: u32,
    /// At most 15 bytes of its name.
    pub(super) name: String,
}

/// The processes that have `path` open, as far as this user may see them.
pub(super) fn of(path: &Path) -> Vec<Holder> {
    let Ok(path) = fs::canonicalize(path) else {
        return Vec::new();
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let mut files = fs::read_dir(process.path().join("fd")).ok()?.flatten();
            files
                .any(|file| fs::read_link(file.path()).is_ok_and(|to| to == path))
                .then(|| Holder {
                    pid,
                    name: fs::read_to_string(process.path().join("comm"))
                        .map_or_else(|_| "a process".to_owned(), |name| name.trim().to_owned()),
                })
        })
        .collect()
}
