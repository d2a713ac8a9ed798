//! The socket where producers come for their ring.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    os::unix::{fs::FileTypeExt, fs::PermissionsExt},
    path::Path,
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

use qkd_handover::ring::{Consumer, MapError, greeting::Greeting};

use super::{
    config::SharedMemoryConfig,
    door::{Connection, Refused, Rings},
    name::Name,
    numbers::Numbers,
    ring::Ring,
};
use crate::{advice, config::OpenError, readiness::readable};

/// Where producers connect, and get a ring made for them.
#[derive(Debug)]
pub(super) struct SocketDoor {
    listener: Listener,
    peer_uids: Vec<u32>,
    rings: Rings,
    /// For the next producer.
    spare: Option<(Consumer, OwnedFd)>,
}

/// A listening `SOCK_SEQPACKET` socket, whose file goes away with it.
#[derive(Debug)]
struct Listener {
    // tokio's type for stream sockets: accepting, credentials and readiness are the same.
    socket: UnixListener,
    _name: Name,
}

/// A producer that was given its ring.
#[derive(Debug)]
pub(super) struct SocketConnection {
    socket: UnixStream,
    wakeup: AsyncFd<EventFd>,
}

impl SocketDoor {
    /// Makes the first ring and listens.
    pub(super) fn open(config: &SharedMemoryConfig, path: &Path) -> Result<Self, OpenError> {
        let mut rings = Rings::new(config);
        let ring = |source| OpenError::Ring {
            path: path.to_owned(),
            source,
        };
        let spare = rings.in_memory().map_err(ring)?;
        let listener = Listener::new(path, !config.peer_uids.is_empty());
        Ok(Self {
            listener: listener.map_err(|source| OpenError::Socket {
                path: path.to_owned(),
                advice: advice::new_socket(path),
                source,
            })?,
            peer_uids: config.peer_uids.clone(),
            rings,
            spare: Some(spare),
        })
    }

    /// The next producer.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        numbers: &Numbers,
    ) -> Poll<Result<Ring, Refused>> {
        let Ok((socket, uid)) = ready!(self.listener.poll_accept(cx)) else {
            // Out of descriptors, most likely.
            return Poll::Ready(Err(Refused::Failed(None)));
        };
        if !is_trusted(uid, &self.peer_uids) {
            return Poll::Ready(Err(Refused::Stranger { uid }));
        }
        let greeted = self.greet(socket, numbers);
        Poll::Ready(greeted.map_err(|error| Refused::Failed(Some(error.kind()))))
    }

    fn greet(&mut self, socket: UnixStream, numbers: &Numbers) -> io::Result<Ring> {
        let spare = self.spare.take();
        let (consumer, memory) =
            spare
                .map_or_else(|| self.rings.in_memory(), Ok)
                .map_err(|error| match error {
                    MapError::Os { source, .. } => source.into(),
                    _ => io::Error::from(io::ErrorKind::InvalidInput),
                })?;
        let greeting = Greeting {
            generation: consumer.generation(),
            last_durable: numbers.durable,
            session: numbers.session(),
        };
        let connection = SocketConnection::greet(socket, &greeting.encode(), &memory)?;
        Ok(Ring::new(consumer, Connection::Socket(connection)))
    }
}

impl Listener {
    /// Listens at `path`, in place of a socket that nobody listens at any more. Others than this
    /// user and root can connect only if `open_to_all`.
    fn new(path: &Path, open_to_all: bool) -> io::Result<Self> {
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
        Ok(Self {
            _name: Name::of(path)?,
            socket: UnixListener::from_std(socket.into())?,
        })
    }

    /// The next connection, and the user at its other end.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(UnixStream, u32)>> {
        let (socket, _) = ready!(self.socket.poll_accept(cx))?;
        let uid = socket.peer_cred()?.uid();
        Poll::Ready(Ok((socket, uid)))
    }
}

impl SocketConnection {
    /// Hands a producer its ring: the greeting, with the memory and the eventfd.
    fn greet(socket: UnixStream, greeting: &[u8], ring: &impl AsFd) -> io::Result<Self> {
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

fn new_socket() -> nix::Result<OwnedFd> {
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
