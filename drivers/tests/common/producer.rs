//! A producer at the socket of a ring: well-behaved by itself, and with a way to misbehave.

use std::{
    fs::OpenOptions,
    io::IoSliceMut,
    mem::MaybeUninit,
    num::NonZeroU64,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
};

use qkd_handover::ring::{
    IDENTITY_BYTES, Producer, WriteError, fifo_path, generation_in,
    greeting::{GREETING_BYTES, Greeting},
};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, socket_with,
};

/// What a device numbers its blocks in that has never begun anew.
pub(crate) const SESSION: NonZeroU64 = NonZeroU64::new(0x51).unwrap();

/// One connection. At a file, the FIFO is socket and eventfd in one.
pub(crate) struct Connected {
    pub(crate) producer: Producer,
    pub(crate) greeting: Greeting,
    pub(crate) memory: std::fs::File,
    pub(crate) wakeup: OwnedFd,
    pub(crate) socket: OwnedFd,
}

impl Connected {
    /// Connects and waits for the greeting.
    pub(crate) fn new(path: &Path) -> std::io::Result<Self> {
        Self::in_session(path, SESSION)
    }

    /// As [`new`](Self::new), of a device that numbers its blocks in `session`.
    pub(crate) fn in_session(path: &Path, session: NonZeroU64) -> std::io::Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let mut bytes = [0; GREETING_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let greeting = Greeting::decode(&bytes[..received.bytes]).expect("a greeting");
        let [memory, wakeup] = <[OwnedFd; 2]>::try_from(descriptors).expect("two descriptors");
        let producer = Producer::attach(memory.as_fd(), &greeting, session).expect("a ring");
        rustix::io::write(&wakeup, &1_u64.to_ne_bytes())?;
        Ok(Self {
            producer,
            greeting,
            memory: memory.into(),
            wakeup,
            socket,
        })
    }

    /// Comes to the ring in the file at `path`, as soon as there is one that nobody has used.
    pub(crate) fn in_file(path: &Path) -> std::io::Result<Self> {
        let began = std::time::Instant::now();
        loop {
            match Self::try_file(path) {
                Err(_) if began.elapsed().as_secs() < 20 => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }

    /// The same, at once or not at all.
    pub(crate) fn try_file(path: &Path) -> std::io::Result<Self> {
        let memory = OpenOptions::new().read(true).write(true).open(path)?;
        flock(&memory, FlockOperation::NonBlockingLockExclusive)?;
        let mut head = [0; IDENTITY_BYTES];
        memory.read_exact_at(&mut head, 0)?;
        let generation = generation_in(&head).ok_or(std::io::ErrorKind::InvalidData)?;
        let fifo = fifo_path(path, generation);
        let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
        let fifo = OpenOptions::new()
            .write(true)
            .custom_flags(flags)
            .open(fifo)?;
        let (producer, greeting) = Producer::attach_file(memory.as_fd(), SESSION)
            .map_err(|_| std::io::ErrorKind::InvalidData)?;
        rustix::io::write(&fifo, &1_u64.to_ne_bytes())?;
        Ok(Self {
            producer,
            greeting,
            memory,
            wakeup: fifo.try_clone()?.into(),
            socket: fifo.into(),
        })
    }

    /// Writes the block with this number (see [`super::device::block`]).
    pub(crate) fn send(&mut self, number: u64) -> Result<(), WriteError> {
        let (header, key) = super::device::block(number);
        let sleeps = self.producer.write_block(&header, &key)?;
        self.wake_if(sleeps);
        Ok(())
    }

    pub(crate) fn wake_if(&self, sleeps: bool) {
        if sleeps {
            rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes()).expect("an eventfd");
        }
    }

    /// Overwrites a word of the ring behind the back of its rules.
    pub(crate) fn poke(&self, offset: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, offset).expect("a memfd");
    }
}
