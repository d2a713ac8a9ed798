//! What a module can tell. No event holds a key byte.

use qkd_handover::{
    block::BlockError,
    clavis2::{Clavis2Error, Refusal},
    hex_lines::HexLineError,
    r10::{self, R10Error},
    ring::RingFault,
    serial::FrameError,
    status::{self, ModuleState, StatusError},
    type7::Type7Error,
};
use qkd_keyfile::{KeyFileError, QkdKeyId, metadata::QkdKeyMetadata, units::bytes_for_bits};

pub(crate) use qkd_handover::status::{Band, Severity};

use crate::etsi014::ContainerError;

/// Something that happened at a module.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A key block is at the start of the caller's buffer. It stays outstanding until it is settled.
    Key(KeyBlock),
    /// The module gave up a block: there is an ID, and no key. Nothing is to be settled.
    Empty {
        /// ID of the QKD-key that is not there.
        id: QkdKeyId,
    },
    /// A measured value.
    Metric(Metric),
    /// What the module is doing.
    State(ModuleState),
    /// Something that an operator should know.
    Alarm(Alarm),
    /// The module delivered, and it did not arrive, or the module itself dropped it. From a module that
    /// gives a key out once, also what may have been lost with an answer that did not arrive.
    Gap {
        /// Number of blocks lost; at most so many where it cannot be told.
        blocks: u64,
    },
    /// A block failed a check. It was set aside or dropped, and the module goes on.
    Corrupt {
        /// ID of the QKD-key, where what is left of the block tells it.
        id: Option<QkdKeyId>,
        /// What was wrong with it.
        reason: CorruptReason,
    },
    /// The module is out of reach. The driver tries to reach it again by itself.
    ///
    /// Key blocks that were not settled may come again.
    Detached {
        /// Why.
        reason: DetachReason,
    },
    /// The module is within reach (again), or began to number its keys anew.
    Attached {
        /// Who the module says it is; for files, where they lie.
        device: String,
        /// Changes when the module numbers its QKD-keys anew, so that IDs may repeat.
        ///
        /// `None` where it cannot be told yet, or IDs do not repeat.
        session: Option<u64>,
    },
}

/// A key block in the caller's buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBlock {
    /// Y.3803 Table 1 (1), as far as the hand-over tells.
    pub metadata: QkdKeyMetadata,
    /// Length of the key, in bits. The first bit is the top bit of the buffer's first byte; unused
    /// bits of the last byte are zero.
    pub key_bits: u32,
    /// Quantum bit error rate of the block, in parts per million, where the module tells it. A
    /// [`Event::Metric`] with its band follows.
    pub qber_ppm: Option<u32>,
}

impl KeyBlock {
    /// Bytes of the caller's buffer that the key takes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        bytes_for_bits(self.key_bits)
    }
}

/// A measured value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    /// What was measured.
    pub value: Value,
    /// Where it lies, by the module's own word or by configured [`Limits`](crate::Limits): the worse.
    pub band: Band,
}

/// What a module measures.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// Quantum bit error rate, in parts per million.
    QberPpm(u32),
    /// Secret key rate, in bits per second.
    KeyRateBitsPerS(u64),
    /// Visibility of the interference, in parts per million.
    VisibilityPpm(u32),
    /// Temperature, in thousandths of a degree Celsius.
    TemperatureMilliCelsius(i32),
    /// Anything else.
    Other {
        /// What, with its unit, such as `laser_ma`.
        name: String,
        /// The decimal number, as the module wrote it.
        value: String,
    },
}

impl Value {
    /// The value's name, the same for every value of its kind.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::QberPpm(_) => status::QBER,
            Self::KeyRateBitsPerS(_) => status::KEY_RATE,
            Self::VisibilityPpm(_) => status::VISIBILITY,
            Self::TemperatureMilliCelsius(_) => status::TEMPERATURE,
            Self::Other { name, .. } => name,
        }
    }
}

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    /// What.
    pub code: AlarmCode,
    /// How bad.
    pub severity: Severity,
}

/// What an alarm is about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AlarmCode {
    /// The module itself raised it; it comes with every status for as long as it lasts.
    Module {
        /// The vendor's code.
        code: String,
    },
    /// A bad hand-over file could not be moved to the quarantine folder. It is left where it is and
    /// ignored until it changes.
    CannotQuarantine {
        /// Name of the file.
        file: String,
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
    /// A settled hand-over file could not be deleted or moved. **Its key bits are still there.**
    CannotSettle {
        /// Name of the file.
        file: String,
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
    /// A user who is not trusted with keys connected to the socket of a ring, and was turned away.
    StrangerConnected {
        /// The user's number.
        uid: u32,
    },
    /// The ring is a file: it cannot be sealed, and its producer, which is trusted, can take the memory away.
    RingNotSealed,
    /// The note of what is settled could not be written: after a crash, what was settled last may be
    /// delivered again.
    CannotKeepJournal {
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
    /// A file of records became shorter, or other records stand in it: it is read from its start. What
    /// was not read of the old ones is lost.
    FileReplaced {
        /// Name of the file.
        file: String,
    },
    /// A device answers that our requests are wrong.
    DeviceRefuses {
        /// Its reason.
        reason: Refusal,
    },
    /// A key manager answers, and gives us nothing: 401 if it does not know our certificate, 400 if it
    /// does not take the length of key or the number of keys.
    KeyManagerRefuses {
        /// Its HTTP status.
        status: u16,
    },
    /// The folder's state could not be written: a restart may not notice that the numbering began
    /// anew in between.
    CannotKeepNumbering {
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
}

impl AlarmCode {
    /// What the alarm is called: the module's own by the module's code, which may be any text.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Module { code } => code,
            Self::CannotQuarantine { .. } => "cannot-quarantine",
            Self::CannotSettle { .. } => "cannot-settle",
            Self::StrangerConnected { .. } => "stranger-connected",
            Self::RingNotSealed => "ring-not-sealed",
            Self::CannotKeepJournal { .. } => "cannot-keep-journal",
            Self::FileReplaced { .. } => "file-replaced",
            Self::DeviceRefuses { .. } => "device-refuses",
            Self::KeyManagerRefuses { .. } => "key-manager-refuses",
            Self::CannotKeepNumbering { .. } => "cannot-keep-numbering",
        }
    }
}

/// Why a block was not delivered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CorruptReason {
    /// A link, folder, pipe or device where a hand-over file should be.
    #[error("not a regular file")]
    NotRegular,
    /// The file belongs to a user who is not trusted with keys.
    #[error("file belongs to user {uid}")]
    Owner {
        /// The user's number.
        uid: u32,
    },
    /// Others than its owner can write to the file.
    #[error("file mode {mode:o} lets others write to it")]
    Mode {
        /// The permission bits.
        mode: u32,
    },
    /// The operating system does not let the file be read.
    #[error("file cannot be read: {error}")]
    Unreadable {
        /// Its reason.
        error: std::io::ErrorKind,
    },
    /// The file's name is none that a hand-over file has.
    #[error("{name:?} is no name of a hand-over file")]
    Name {
        /// Start of the name.
        name: String,
    },
    /// The file is longer than its header says.
    #[error("file of {have_bytes} bytes, {need_bytes} by its header")]
    TooLong {
        /// Length of the file, in bytes.
        have_bytes: u64,
        /// Length by the header, in bytes.
        need_bytes: usize,
    },
    /// The file stopped growing before it was whole.
    #[error("file stopped growing at {have_bytes} bytes of {need_bytes}")]
    Incomplete {
        /// Length of the file, in bytes.
        have_bytes: u64,
        /// Length by the header, in bytes; that of the header itself if not even that is there.
        need_bytes: usize,
    },
    /// The key is longer than the configured bound.
    #[error("{key_bits} key bits, {max_bits} allowed by the configuration")]
    TooManyBits {
        /// Length of the key, in bits.
        key_bits: u32,
        /// The bound, in bits.
        max_bits: u32,
    },
    /// The file belongs to a numbering that ended before one whose keys were delivered already.
    #[error("written before the numbering began anew")]
    EndedNumbering,
    /// Not a final-key file.
    #[error(transparent)]
    Type7(#[from] Type7Error),
    /// Not a key file.
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// A key file of something else than a QKD-key, or one that contradicts itself.
    #[error("no key file of a QKD-key")]
    NotAQkdKey,
    /// A line of hexadecimal digits that is none. The file's next line is read.
    #[error("line {line}: {error}")]
    HexLine {
        /// Its number in the file, from 0.
        line: u32,
        /// What was wrong with it.
        error: HexLineError,
    },
    /// Not an R10 record. Nothing says where the next one begins, so the rest of the file is lost.
    #[error(transparent)]
    R10(#[from] R10Error),
    /// An R10 record of a key that is not secret, such as one before privacy amplification.
    #[error("a key of state {state:?} is not to be used")]
    R10State {
        /// How far the key has come.
        state: r10::State,
    },
    /// Not a datagram of a Clavis2.
    #[error(transparent)]
    Clavis2(#[from] Clavis2Error),
    /// An answer to nothing that was asked, or to what was asked before, or of another key.
    #[error("an answer to nothing that was asked")]
    Unasked,
    /// A key manager's answer is no key container. None of its keys is taken.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Damage on a serial line. A damaged key frame comes again.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A producer broke the rules of its ring, which is then thrown away.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A record of a ring holds no valid key block.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A record of a ring holds no valid status.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// A ring's block is not above the one before it.
    #[error("block {number} after block {after}")]
    Disordered {
        /// Its number.
        number: u64,
        /// The number before it.
        after: u64,
    },
    /// A ring's block is one that the producer was told to be durable: sent once more against the
    /// rule, or numbered anew, which a ring cannot tell. Delivering it might use its bits twice.
    #[error("block {number} once more, though all up to {durable} are durable")]
    Durable {
        /// Its number.
        number: u64,
        /// What the producer was told.
        durable: u64,
    },
}

/// Why a module is out of reach.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DetachReason {
    /// The hand-over folder was removed, replaced or can no longer be read.
    #[error("hand-over folder is gone")]
    FolderGone,
    /// The device's file is not there or does not answer, as after unplugging.
    #[error("cannot open the port: {error}")]
    CannotOpen {
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
    /// A request was not answered in time.
    #[error("no answer")]
    NoAnswer,
    /// The line was hung up.
    #[error("the line was hung up")]
    HungUp,
    /// Reading or writing failed.
    #[error("reading or writing failed: {error}")]
    Io {
        /// The operating system's reason.
        error: std::io::ErrorKind,
    },
    /// The producer closed its connection, or its process ended.
    #[error("the producer is gone")]
    Closed,
    /// The producer's heartbeat stands still.
    #[error("the producer's heartbeat stands still")]
    Silent,
    /// The producer broke the rules of its ring.
    #[error("the producer broke the rules of its ring")]
    BrokeRules,
    /// Another device than the configured one answered.
    #[error("device {found:?} answered, {expected:?} is configured")]
    OtherDevice {
        /// The configured name.
        expected: String,
        /// The name in its hello.
        found: String,
    },
}
