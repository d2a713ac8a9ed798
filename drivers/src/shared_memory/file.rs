//! A ring in a file that producers find by its name, with a FIFO beside it.
//!
//! The file gets its name when its header is written, so that whoever finds it finds a whole ring with its
//! greeting; who finds it is for owner, group and mode to say. The FIFO is what the connection is at a
//! socket: a producer opens it to write, bytes wake this side, its end is the producer's end (the kernel
//! closes it with the process), and for the producer a FIFO that nobody reads is the end of its ring. So
//! nothing is asked at intervals while nothing happens. Its name has the ring's generation, which the
//! producer takes from the header: nobody comes to the FIFO of another ring.
//!
//! Ring and FIFO go away with the producer, and the next generation takes their place. This side keeps
//! the FIFO locked (`flock`): a ring whose FIFO nobody has locked is what a bridge that is gone left behind.

use std::{
    fs::{File, OpenOptions, Permissions},
    future::Future,
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    sys::{
        stat::Mode,
        statfs::{TMPFS_MAGIC, statfs},
    },
    unistd::mkfifo,
};
use qkd_handover::ring::{self, Consumer, IDENTITY_BYTES, MapError};
use rustix::fs::{AtFlags, CWD, FlockOperation, flock, linkat};
use tokio::{
    net::unix::pipe::Receiver,
    time::{Instant, Sleep, sleep_until},
};

use super::{
    config::SharedMemoryConfig,
    door::{Connection, Refused, Rings},
    name::Name,
    numbers::Numbers,
    ring::Ring,
    socket::is_trusted,
};
use crate::config::OpenError;

/// Why a ring cannot stand at its path. `Display` says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// Its folder is on a disk.
    #[error("key would come to lie on a disk there: give a path on a tmpfs, such as /dev/shm")]
    OnDisk,
    /// Others can take the file away and put one of theirs in its place.
    #[error("its folder has mode {mode:o}: take away the others' right to write (chmod o-w)")]
    FolderMode {
        /// The folder's permission bits.
        mode: u32,
    },
    /// Its folder belongs to a user who is not trusted with keys.
    #[error("its folder belongs to user {uid}: change its owner, or give another folder")]
    FolderOwner {
        /// The folder's owner.
        uid: u32,
    },
    /// Another bridge has a ring there.
    #[error("another program has its ring there")]
    InUse,
    /// Something else is there. It is left as it is.
    #[error("a file that is no ring is there: give another path, or remove it")]
    NotARing,
    /// No memory for it, or no valid size.
    #[error("check `capacity_bytes` and the free memory: {0}")]
    Ring(MapError),
    /// The system refuses a step.
    #[error("cannot {step}: {source}")]
    Os {
        /// What was to be done.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// Puts rings at a path and waits for their producers.
#[derive(Debug)]
pub(super) struct FileDoor {
    path: PathBuf,
    gid: Option<u32>,
    rings: Rings,
    offer: Option<Offer>,
    /// When to look whether the ring still is where producers look for it.
    look: Pin<Box<Sleep>>,
}

/// A ring that has no producer yet.
#[derive(Debug)]
struct Offer {
    consumer: Consumer,
    fifo: Fifo,
}

/// The reading end of a ring's FIFO. It and the ring lose their names with this.
#[derive(Debug)]
pub(super) struct Fifo {
    pipe: Receiver,
    /// Bytes have come that nobody was told of.
    woken: bool,
    _name: Name,
    // After the FIFO's: a ring without one is known to be left behind.
    ring_name: Name,
}

impl FileDoor {
    /// Puts the first ring at `path`.
    pub(super) fn open(config: &SharedMemoryConfig, path: &Path) -> Result<Self, OpenError> {
        let mut door = Self {
            path: path.to_owned(),
            gid: config.peer_gid,
            rings: Rings::new(config),
            offer: None,
            look: Box::pin(sleep_until(Instant::now() + LOOK_INTERVAL)),
        };
        let offer = door.make(&Numbers::default());
        door.offer = Some(offer.map_err(|reason| OpenError::RingFile {
            path: path.to_owned(),
            reason,
        })?);
        Ok(door)
    }

    /// The next producer: one that has opened the FIFO.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        numbers: &Numbers,
    ) -> Poll<Result<Ring, Refused>> {
        loop {
            let Some(mut offer) = self.offer.take() else {
                match self.make(numbers) {
                    Ok(offer) => self.offer = Some(offer),
                    Err(error) => return Poll::Ready(Err(Refused::Failed(Some(error.kind())))),
                }
                continue;
            };
            if offer.fifo.poll_any(cx).is_ready() {
                let ring = Ring::new(offer.consumer, Connection::Fifo(offer.fifo));
                return Poll::Ready(Ok(ring));
            }
            if self.look.as_mut().poll(cx).is_ready() {
                self.look.as_mut().reset(Instant::now() + LOOK_INTERVAL);
                // Removed, replaced or cut off: no producer can come to it any more.
                if offer.fifo.ring_name.holds() && offer.consumer.producer_status().is_ok() {
                    self.offer = Some(offer);
                }
                continue;
            }
            self.offer = Some(offer);
            return Poll::Pending;
        }
    }

    pub(super) fn set_durable(&mut self, number: u64) {
        if let Some(offer) = &mut self.offer {
            offer.consumer.set_durable(number);
        }
    }

    fn make(&mut self, numbers: &Numbers) -> Result<Offer, FileError> {
        let folder = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        check_folder(folder)?;
        clear(&self.path)?;
        // Without a name until it is whole, so that a process that dies here leaves nothing.
        let nameless = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(OFlag::O_TMPFILE.bits())
            .open(folder);
        let file = nameless.map_err(os("make a file in its folder"))?;
        self.let_in(&file, 0o660)?;
        let generation = self.rings.next_generation();
        let own = file.try_clone().map_err(os("keep the file open"))?;
        let consumer = Consumer::in_file(
            own,
            self.rings.capacity_bytes,
            generation,
            self.rings.device,
        );
        let mut consumer = consumer.map_err(FileError::Ring)?;
        if let Some(session) = numbers.known_session() {
            consumer.begin_session(session, numbers.durable);
        }
        let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, nameless, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)
            .map_err(|error| os("give the file its name")(error.into()))?;
        let ring_name = Name::of(&self.path).map_err(os("give the file its name"))?;
        let fifo = self.fifo(&ring::fifo_path(&self.path, generation), ring_name)?;
        Ok(Offer { consumer, fifo })
    }

    fn fifo(&self, path: &Path, ring_name: Name) -> Result<Fifo, FileError> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|error| os("make the FIFO beside it")(error.into()))?;
        let name = Name::of(path).map_err(os("make the FIFO beside it"))?;
        let file = open(path).map_err(os("open the FIFO beside it"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| os("lock the FIFO beside it")(error.into()))?;
        self.let_in(&file, 0o620)?;
        Ok(Fifo {
            pipe: Receiver::from_file(file).map_err(os("wait for the FIFO beside it"))?,
            woken: false,
            _name: name,
            ring_name,
        })
    }

    /// Gives the group its rights, if there is one. A folder with the setgid bit has given the file to its
    /// group already, which needs no right to change owners.
    fn let_in(&self, file: &File, mode: u32) -> Result<(), FileError> {
        let Some(gid) = self.gid else {
            return Ok(());
        };
        if !file.metadata().is_ok_and(|metadata| metadata.gid() == gid) {
            fchown(file, None, Some(gid)).map_err(os("give it to the group `peer_gid`"))?;
        }
        file.set_permissions(Permissions::from_mode(mode))
            .map_err(os("let the group `peer_gid` use it"))
    }
}

impl Fifo {
    /// Ready once no producer has it open any more.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut emptied = false;
        loop {
            if ready!(self.pipe.poll_read_ready(cx)).is_err() {
                return Poll::Ready(());
            }
            match self.pipe.try_read(&mut [0; 512]) {
                Ok(1..) => self.woken = true,
                // Empty, and ready again at once: a producer has closed it, and another opened it since.
                Err(error) if error.kind() == ErrorKind::WouldBlock && !emptied => emptied = true,
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Ready once for all bytes that have come since, and when it is closed.
    pub(super) fn poll_wakeup(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let closed = self.poll_closed(cx);
        match std::mem::take(&mut self.woken) {
            true => Poll::Ready(()),
            false => closed,
        }
    }

    /// Ready once a producer has been there.
    fn poll_any(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let closed = self.poll_closed(cx);
        match self.woken {
            true => Poll::Ready(()),
            false => closed,
        }
    }
}

impl FileError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::OnDisk => ErrorKind::Unsupported,
            Self::FolderMode { .. } | Self::FolderOwner { .. } => ErrorKind::PermissionDenied,
            Self::InUse => ErrorKind::AddrInUse,
            Self::NotARing => ErrorKind::AlreadyExists,
            Self::Ring(_) => ErrorKind::OutOfMemory,
            Self::Os { source, .. } => source.kind(),
        }
    }
}

/// Nobody but whom the node trusts may rename or remove files in it, and it is in memory.
fn check_folder(folder: &Path) -> Result<(), FileError> {
    let metadata = std::fs::metadata(folder).map_err(os("look at its folder"))?;
    let (mode, uid) = (metadata.mode() & 0o7777, metadata.uid());
    let is_sticky = mode & 0o1000 != 0;
    if mode & 0o002 != 0 && !is_sticky {
        return Err(FileError::FolderMode { mode });
    }
    if !is_trusted(uid, &[]) {
        return Err(FileError::FolderOwner { uid });
    }
    let system = statfs(folder).map_err(|error| os("look at its folder")(error.into()))?;
    if system.filesystem_type() != TMPFS_MAGIC {
        return Err(FileError::OnDisk);
    }
    Ok(())
}

/// Removes what a bridge that is gone has left at `path`, and nothing else.
fn clear(path: &Path) -> Result<(), FileError> {
    let found = match open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(_) => return Err(FileError::NotARing),
    };
    let mut head = [0; IDENTITY_BYTES];
    let is_file = found.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file || found.read_exact_at(&mut head, 0).is_err() {
        return Err(FileError::NotARing);
    }
    let generation = ring::generation_in(&head).ok_or(FileError::NotARing)?;
    let fifo = ring::fifo_path(path, generation);
    match open(&fifo) {
        Ok(end) => {
            if flock(&end, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Err(FileError::InUse);
            }
            std::fs::remove_file(&fifo).map_err(os("remove the FIFO of a bridge that is gone"))?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(source) => return Err(os("look at the FIFO beside it")(source)),
    }
    std::fs::remove_file(path).map_err(os("remove the ring of a bridge that is gone"))
}

/// Opens what is at `path` itself, to read, and waits for nobody.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)
}

fn os(step: &'static str) -> impl Fn(io::Error) -> FileError {
    move |source| FileError::Os { step, source }
}

/// Time between two looks whether the ring still is where producers look for it.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
