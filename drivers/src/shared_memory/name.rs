//! A name in the file system that goes away with its owner.

use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A socket, FIFO or file that this process has put at a path. When it is dropped the path is removed,
/// unless something else is there by then.
#[derive(Debug)]
pub(super) struct Name {
    path: PathBuf,
    device_inode: (u64, u64),
}

impl Name {
    /// What is at `path` now.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            device_inode: device_inode(&std::fs::symlink_metadata(path)?),
        })
    }

    /// Whether it still is there.
    pub(super) fn holds(&self) -> bool {
        let found = std::fs::symlink_metadata(&self.path);
        found.is_ok_and(|metadata| device_inode(&metadata) == self.device_inode)
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.holds() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn device_inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
