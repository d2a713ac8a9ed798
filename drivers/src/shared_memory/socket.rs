//! The socket where producers come for their ring.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd},
    os::unix::{fs::FileTypeExt, fs::MetadataExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    task::{Context, Poll, ready},
};

use nix::{
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{
            AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind,
            connect, listen, sendmsg, socket,
        },
    },
    unistd::geteuid,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{UnixListener, UnixStream},
};

use crate::readiness::readable;

/// A listening `SOCK_SEQPACKET` socket, whose file goes away with it.
#[derive(Debug)]
pub(super) struct Listener {
    // tokio's type for stream sockets: accepting, credentials and readiness are the same.
    socket: UnixListener,
    path: PathBuf,
    device_inode: (u64, u64),
}

/// A producer that was given its ring.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    wakeup: AsyncFd<EventFd>,
}

impl Listener {
    /// Listens at `path`, in place of a socket that nobody listens at any more. Others than this
    /// user and root can connect only if `open_to_all`.
    pub(super) fn new(path: &Path, open_to_all: bool) -> io::Result<Self> {
        let address = UnixAddr::new(path)?;
        if fs_says_socket(path) {
            match connect(new_socket()?.as_raw_fd(), &address) {
                Err(nix::errno::Errno::ECONNREFUSED) => std::fs::remove_file(path)?,
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        let socket = new_socket()?;
        bind(socket.as_raw_fd(), &address)?;
        // Before `listen`, so that there is no moment in which others can connect.
        let mode = if open_to_all { 0o666 } else { 0o600 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        listen(&socket, Backlog::new(1)?)?;
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            socket: UnixListener::from_std(socket.into())?,
            path: path.to_owned(),
            device_inode: (metadata.dev(), metadata.ino()),
        })
    }

    /// The next connection, and the user at its other end.
    pub(super) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(UnixStream, u32)>> {
        let (socket, _) = ready!(self.socket.poll_accept(cx))?;
        let uid = socket.peer_cred()?.uid();
        Poll::Ready(Ok((socket, uid)))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let same =
            |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino()) == self.device_inode;
        if std::fs::symlink_metadata(&self.path).is_ok_and(same) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Connection {
    /// Hands a producer its ring: the greeting, with the memory and the eventfd.
    pub(super) fn greet(socket: UnixStream, greeting: &[u8], ring: &impl AsFd) -> io::Result<Self> {
        let wakeup = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let descriptors = [ring.as_fd().as_raw_fd(), wakeup.as_fd().as_raw_fd()];
        let sent = sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(greeting)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )?;
        if sent != greeting.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(Self {
            socket,
            wakeup: readable(wakeup)?,
        })
    }

    /// Ready once the connection is of no more use: closed, broken, or spoken on by a producer,
    /// which has nothing to say.
    pub(super) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if ready!(self.socket.poll_read_ready(cx)).is_err() {
                return Poll::Ready(());
            }
            let mut byte = [0];
            match self.socket.try_io(Interest::READABLE, || {
                let flags = MsgFlags::MSG_DONTWAIT;
                Ok(nix::sys::socket::recv(
                    self.socket.as_raw_fd(),
                    &mut byte,
                    flags,
                )?)
            }) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Ready once for every time that the producer has written to the eventfd.
    ///
    /// The eventfd is never read: its readiness is edge-triggered, and every write is an edge. A
    /// read could block, because the producer shares the descriptor's flags and can take
    /// `O_NONBLOCK` away.
    pub(super) fn poll_wakeup(&self, cx: &mut Context<'_>) -> Poll<()> {
        if let Ok(mut guard) = ready!(self.wakeup.poll_read_ready(cx)) {
            guard.clear_ready();
        }
        Poll::Ready(())
    }
}

fn new_socket() -> nix::Result<std::os::fd::OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

fn fs_says_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Whether a user may bring keys: this one, root, or one that the configuration names.
pub(super) fn is_trusted(uid: u32, more_uids: &[u32]) -> bool {
    uid == 0 || uid == geteuid().as_raw() || more_uids.contains(&uid)
}
