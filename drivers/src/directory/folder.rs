//! A hand-over folder, held by a descriptor: whatever the folder's path comes to mean later, these
//! functions stay in the folder that was opened and checked.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2},
    sys::{
        stat::{FileStat, Mode, fstat, fstatat, mkdirat, stat},
        uio::pread,
    },
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

use crate::{advice, config::OpenError, event::CorruptReason};

/// Tells a file from any other that has had its name, and from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    modified_ns: i128,
    pub(super) size_bytes: u64,
}

/// Tells a file from any other while both exist, whatever it is called and however it grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Inode {
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl Identity {
    fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            modified_ns: i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec),
            size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        }
    }

    pub(super) const fn inode(&self) -> Inode {
        Inode {
            device: self.device,
            inode: self.inode,
        }
    }

    /// When the file was last written to, in nanoseconds since 1970.
    pub(super) const fn modified_ns(&self) -> i128 {
        self.modified_ns
    }

    /// The identity in decimal, for a note.
    pub(super) fn to_text(self) -> String {
        let Self {
            device,
            inode,
            modified_ns,
            size_bytes,
        } = self;
        format!("{device} {inode} {modified_ns} {size_bytes}")
    }

    /// The opposite of [`to_text`](Self::to_text).
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let mut fields = text.split(' ');
        let identity = Self {
            device: fields.next()?.parse().ok()?,
            inode: fields.next()?.parse().ok()?,
            modified_ns: fields.next()?.parse().ok()?,
            size_bytes: fields.next()?.parse().ok()?,
        };
        fields.next().is_none().then_some(identity)
    }

    /// When the file was last written to, in seconds since 1970.
    pub(super) fn modified_s(&self) -> i64 {
        i64::try_from(self.modified_ns.div_euclid(1_000_000_000)).unwrap_or(i64::MAX)
    }
}

/// An open folder.
#[derive(Debug)]
pub(super) struct Folder {
    fd: OwnedFd,
    device_inode: (u64, u64),
    owner_uids: Vec<u32>,
}

/// A regular file of a trusted owner, open for reading.
#[derive(Debug)]
pub(super) struct OpenFile {
    fd: OwnedFd,
    pub(super) identity: Identity,
}

impl Folder {
    /// Opens the folder at `path` and checks who can put files into it.
    pub(super) fn open(path: &Path, more_owner_uids: &[u32]) -> Result<Self, OpenError> {
        let fail = |errno: Errno| OpenError::Folder {
            path: path.to_owned(),
            advice: advice::folder(path),
            source: errno.into(),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty()).map_err(fail)?;
        let stat = fstat(&fd).map_err(fail)?;
        let mut owner_uids = more_owner_uids.to_vec();
        owner_uids.extend([0, geteuid().as_raw()]);
        if !owner_uids.contains(&stat.st_uid) {
            return Err(OpenError::FolderOwner {
                path: path.to_owned(),
                uid: stat.st_uid,
            });
        }
        if stat.st_mode & 0o002 != 0 {
            return Err(OpenError::FolderMode {
                path: path.to_owned(),
                mode: stat.st_mode & 0o7777,
            });
        }
        Ok(Self {
            fd,
            device_inode: (stat.st_dev, stat.st_ino),
            owner_uids,
        })
    }

    /// Whether `path` still leads to this folder.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        stat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.device_inode)
    }

    /// Every name in the folder, in no order.
    pub(super) fn names(&self) -> nix::Result<impl Iterator<Item = nix::Result<OsString>> + use<>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let entries = Dir::openat(&self.fd, ".", flags, Mode::empty())?.into_iter();
        Ok(entries.map(|entry| {
            entry.map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned())
        }))
    }

    /// What stands under `name`, if anything, without following a link.
    pub(super) fn look_at(&self, name: &OsStr) -> nix::Result<Option<(Identity, Kind)>> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some((Identity::of(&stat), Kind::of(&stat)))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Opens a file that is fit to be read; the inner error says why it is not.
    pub(super) fn open_file(&self, name: &OsStr) -> nix::Result<Result<OpenFile, CorruptReason>> {
        // NONBLOCK: opening a pipe that took the place of a file must not wait for its writer.
        let flags = OFlag::O_RDONLY
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC
            | OFlag::O_NONBLOCK
            | OFlag::O_NOCTTY;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ELOOP | Errno::ENXIO) => return Ok(Err(CorruptReason::NotRegular)),
            Err(errno) => return Err(errno),
        };
        let stat = fstat(&fd)?;
        Ok(self.check(&stat).map(|()| OpenFile {
            fd,
            identity: Identity::of(&stat),
        }))
    }

    fn check(&self, stat: &FileStat) -> Result<(), CorruptReason> {
        if Kind::of(stat) != Kind::Regular {
            return Err(CorruptReason::NotRegular);
        }
        if !self.owner_uids.contains(&stat.st_uid) {
            return Err(CorruptReason::Owner { uid: stat.st_uid });
        }
        let mode = stat.st_mode & 0o7777;
        if mode & 0o022 != 0 {
            return Err(CorruptReason::Mode { mode });
        }
        Ok(())
    }

    pub(super) fn remove(&self, name: &OsStr) -> nix::Result<()> {
        unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)
    }

    /// Moves a file to the folder `to` inside this one, which is made if need be; a file that is
    /// there already under this name is kept, and the new one gets a number.
    pub(super) fn set_aside(&self, name: &OsStr, to: &str) -> nix::Result<()> {
        match mkdirat(&self.fd, to, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let aside = openat(&self.fd, to, flags, Mode::empty())?;
        for number in 0..MAX_NAMESAKES {
            let mut new_name = name.to_owned();
            if number > 0 {
                new_name.push(format!(".{number}"));
            }
            let flags = RenameFlags::RENAME_NOREPLACE;
            match renameat2(&self.fd, name, &aside, new_name.as_os_str(), flags) {
                Err(Errno::EEXIST) => {}
                done => return done,
            }
        }
        Err(Errno::EEXIST)
    }

    /// The content of a small file of our own; `None` if it is not there.
    pub(super) fn read_note(&self, name: &str, max_bytes: usize) -> io::Result<Option<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let len = usize::try_from(fstat(&fd)?.st_size).unwrap_or(usize::MAX);
        let mut text = vec![0; len.min(max_bytes)];
        let len = pread(&fd, &mut text, 0)?;
        text.truncate(len);
        String::from_utf8(text)
            .map(Some)
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Replaces a small file of our own, durably and in one step.
    pub(super) fn write_note(&self, name: &str, text: &str) -> nix::Result<()> {
        let temporary = format!("{name}.tmp");
        let flags = OFlag::O_WRONLY
            | OFlag::O_CREAT
            | OFlag::O_TRUNC
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC;
        let fd = openat(
            &self.fd,
            temporary.as_str(),
            flags,
            Mode::S_IRUSR | Mode::S_IWUSR,
        )?;
        write_all(&fd, text)?;
        nix::unistd::fsync(&fd)?;
        nix::fcntl::renameat(&self.fd, temporary.as_str(), &self.fd, name)?;
        nix::unistd::fsync(&self.fd)
    }

    /// Appends to a small file of our own, which is made if need be; durable when it returns.
    pub(super) fn append_note(&self, name: &str, text: &str) -> nix::Result<()> {
        let flags = OFlag::O_WRONLY
            | OFlag::O_CREAT
            | OFlag::O_APPEND
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        write_all(&fd, text)?;
        nix::unistd::fsync(&fd)
    }

    /// Makes durable what names stand in the folder.
    pub(super) fn sync(&self) -> nix::Result<()> {
        nix::unistd::fsync(&self.fd)
    }
}

impl OpenFile {
    /// Fills `out` from `offset_bytes` on; an early end of the file is an error.
    pub(super) fn read_exact(&self, mut out: &mut [u8], offset_bytes: usize) -> nix::Result<()> {
        let mut offset = i64::try_from(offset_bytes).map_err(|_| Errno::EFBIG)?;
        while !out.is_empty() {
            let len = match pread(&self.fd, out, offset) {
                Ok(0) => return Err(Errno::ENODATA),
                Ok(len) => len,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            out = &mut out[len..];
            offset += i64::try_from(len).map_err(|_| Errno::EFBIG)?;
        }
        Ok(())
    }

    /// What the file is now.
    pub(super) fn look(&self) -> nix::Result<Identity> {
        fstat(&self.fd).map(|stat| Identity::of(&stat))
    }

    /// Whether the file is as it was when it was opened.
    pub(super) fn is_unchanged(&self) -> bool {
        self.look().is_ok_and(|now| now == self.identity)
    }
}

/// What stands under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Other,
}

impl Kind {
    const fn of(stat: &FileStat) -> Self {
        match stat.st_mode & 0o170_000 {
            0o100_000 => Self::Regular,
            _ => Self::Other,
        }
    }
}

fn write_all(fd: &OwnedFd, text: &str) -> nix::Result<()> {
    if nix::unistd::write(fd, text.as_bytes())? != text.len() {
        return Err(Errno::ENOSPC);
    }
    Ok(())
}

/// Files of one name in a side folder before it counts as full.
const MAX_NAMESAKES: u32 = 1000;
