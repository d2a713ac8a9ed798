//! A module that hands over its key blocks through shared memory, as fast as the node takes them.

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    num::NonZeroU64,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use qkd_handover::{
    block::BlockHeader,
    ring::{
        Producer, WriteError,
        greeting::{GREETING_BYTES, Greeting},
    },
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, socket_with,
};

/// How long a consumer may take to listen, or to read anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause when a ring is full: shorter than the ring takes to run empty.
const PAUSE: Duration = Duration::from_micros(50);

/// The producer's end of a ring.
pub(crate) struct Module {
    producer: Producer,
    wakeup: OwnedFd,
    /// The connection ends with it.
    _socket: OwnedFd,
    next: u64,
}

impl Module {
    /// Connects to a consumer's socket, waiting for it if need be.
    pub(crate) fn connect(path: &Path) -> Self {
        let start = Instant::now();
        loop {
            match Self::try_connect(path) {
                Ok(module) => return module,
                Err(error) if start.elapsed() > PATIENCE => panic!("{}: {error}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn try_connect(path: &Path) -> std::io::Result<Self> {
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let mut bytes = [0; GREETING_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&socket, &mut slices, &mut control, flags)?.bytes;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        let greeting = Greeting::decode(&bytes[..received]).map_err(std::io::Error::other)?;
        let [memory, wakeup] = <[OwnedFd; 2]>::try_from(descriptors).expect("two descriptors");
        let producer = Producer::attach(memory.as_fd(), &greeting, NonZeroU64::MIN);
        let producer = producer.map_err(std::io::Error::other)?;
        // The consumer hears of the session.
        rustix::io::write(&wakeup, &1_u64.to_ne_bytes())?;
        Ok(Self {
            producer,
            wakeup,
            _socket: socket,
            next: 0,
        })
    }

    /// Writes one block; `false` if there is no room now.
    pub(crate) fn offer(&mut self, key: &[u8]) -> bool {
        let header = BlockHeader {
            number: self.next,
            generated_at: None,
            key_bits: u32::try_from(key.len() * 8).unwrap(),
            qber_ppm: None,
        };
        match self.producer.write_block(&header, key) {
            Ok(sleeps) => {
                if sleeps {
                    rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes()).unwrap();
                }
                self.next += 1;
                true
            }
            Err(WriteError::Full { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Blocks that the consumer holds durably.
    pub(crate) fn durable_blocks(&self) -> u64 {
        self.producer.durable().map_or(0, |number| number + 1)
    }

    /// Blocks written.
    pub(crate) fn blocks(&self) -> u64 {
        self.next
    }

    /// Whether the consumer has read everything.
    pub(crate) fn is_drained(&mut self) -> bool {
        self.producer.is_drained().unwrap()
    }
}

/// Blocks that are not durable at a consumer, at most: 32 MiB of 64 KiB each. A node that has credit for
/// fewer takes fewer.
const AHEAD_MAX: u64 = 512;

/// Hands the same blocks over to all modules, as fast as the slowest consumer takes them: each block
/// to all of them before the next, as the two ends of a module pair do.
pub(crate) fn feed(modules: &mut [Module], key: &[u8], block_bytes: usize) {
    for block in key.chunks(block_bytes) {
        for at in 0..modules.len() {
            let start = Instant::now();
            while is_ahead(modules) || !modules[at].offer(block) {
                assert!(start.elapsed() < PATIENCE, "nobody reads");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn is_ahead(modules: &[Module]) -> bool {
    let ahead = |module: &Module| module.blocks() - module.durable_blocks() >= AHEAD_MAX;
    modules.iter().any(ahead)
}
