//! From an open hand-over file of one block to a key, or to why there is none.

use std::{cmp::Ordering, ffi::OsStr, io};

use nix::errno::Errno;
use qkd_handover::type7::{
    HEADER_BYTES, Header, decode_guardian_key, decode_key, guardian_key_bits,
};
use qkd_keyfile::{
    KeyFile, KeyFileError,
    metadata::{KeyMetadata, QkdKeyMetadata},
    units::bytes_for_bits,
};
use zeroize::Zeroize;

use super::{DirectoryConfig, Format, folder::OpenFile, names::id_of};
use crate::event::CorruptReason;

/// Why a file gave no event.
pub(super) enum NoEvent {
    /// There is nothing to say about it, now or later.
    Skip,
    /// Look at it again with the next scan.
    Later,
    /// It failed a check.
    Bad(CorruptReason),
}

impl From<Errno> for NoEvent {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ENOENT => Self::Skip,
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EINTR | Errno::ENODATA => {
                Self::Later
            }
            _ => Self::Bad(CorruptReason::Unreadable { error: kind(errno) }),
        }
    }
}

impl From<CorruptReason> for NoEvent {
    fn from(reason: CorruptReason) -> Self {
        Self::Bad(reason)
    }
}

/// What the part of a file before its key says.
pub(super) enum Look {
    /// The file is as long as it should be.
    Whole(Head),
    /// The file is shorter: it is being written, or was left so.
    Partial(CorruptReason),
}

/// Everything about a whole file but its key.
pub(super) struct Head {
    /// Table 1 (1), as far as the file tells.
    pub(super) metadata: QkdKeyMetadata,
    /// Length of the key to be delivered, in bits.
    pub(super) key_bits: u32,
    layout: Layout,
}

enum Layout {
    Type7(Header),
    Guardian(Header),
    Raw,
    /// The key follows so many bytes.
    KeyFile {
        head_bytes: usize,
    },
}

/// Reads and checks what stands before the key.
pub(super) fn read_head(
    file: &OpenFile,
    name: &OsStr,
    config: &DirectoryConfig,
    scratch: &mut [u8],
) -> Result<Look, NoEvent> {
    match config.format {
        Format::Cor => raw(file, name, config),
        Format::KeyFile => {
            let look = key_file(file, config, scratch);
            scratch.zeroize();
            look
        }
        _ => type7(file, name, config),
    }
}

fn type7(file: &OpenFile, name: &OsStr, config: &DirectoryConfig) -> Result<Look, NoEvent> {
    let have_bytes = file.identity.size_bytes;
    if have_bytes < HEADER_BYTES as u64 {
        return Ok(partial(have_bytes, HEADER_BYTES));
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact(&mut bytes, 0)?;
    let header = Header::decode(&bytes).map_err(CorruptReason::from)?;
    header
        .check_name(&name.to_string_lossy())
        .map_err(CorruptReason::from)?;
    check_bits(header.key_bits, config)?;
    let (key_bits, layout) = match config.format {
        Format::Type7Guardian => (guardian_key_bits(header.key_bits), Layout::Guardian(header)),
        _ => (header.key_bits, Layout::Type7(header)),
    };
    let id = id_of(name, config.format).ok_or(NoEvent::Skip)?;
    whole(
        have_bytes,
        header.file_bytes(),
        QkdKeyMetadata::new(id),
        key_bits,
        layout,
    )
}

fn raw(file: &OpenFile, name: &OsStr, config: &DirectoryConfig) -> Result<Look, NoEvent> {
    let id = id_of(name, config.format).ok_or(NoEvent::Skip)?;
    whole(
        file.identity.size_bytes,
        config.file_bytes as usize,
        QkdKeyMetadata::new(id),
        config.longest_key_bits(),
        Layout::Raw,
    )
}

fn key_file(
    file: &OpenFile,
    config: &DirectoryConfig,
    scratch: &mut [u8],
) -> Result<Look, NoEvent> {
    let have_bytes = file.identity.size_bytes;
    let too_long = || {
        let need_bytes = scratch.len();
        CorruptReason::TooLong {
            have_bytes,
            need_bytes,
        }
    };
    let len = usize::try_from(have_bytes).map_err(|_| too_long())?;
    if len > scratch.len() {
        return Err(too_long().into());
    }
    let bytes = &mut scratch[..len];
    file.read_exact(bytes, 0)?;
    let found = match KeyFile::decode(bytes) {
        Ok(found) => found,
        Err(KeyFileError::Truncated { need, .. }) => return Ok(partial(have_bytes, need)),
        Err(error) => return Err(CorruptReason::from(error).into()),
    };
    let (key_bits, head_bytes) = (found.key_bits, len - found.key.len());
    check_bits(key_bits, config)?;
    let KeyMetadata::Qkd(metadata) = found.metadata else {
        return Err(CorruptReason::NotAQkdKey.into());
    };
    if metadata.key_bits.is_some_and(|bits| bits != key_bits) {
        return Err(CorruptReason::NotAQkdKey.into());
    }
    let layout = Layout::KeyFile { head_bytes };
    whole(have_bytes, len, metadata, key_bits, layout)
}

fn check_bits(key_bits: u32, config: &DirectoryConfig) -> Result<(), NoEvent> {
    let max_bits = config.max_block_bits;
    if key_bits > max_bits {
        return Err(CorruptReason::TooManyBits { key_bits, max_bits }.into());
    }
    Ok(())
}

fn whole(
    have_bytes: u64,
    need_bytes: usize,
    metadata: QkdKeyMetadata,
    key_bits: u32,
    layout: Layout,
) -> Result<Look, NoEvent> {
    match have_bytes.cmp(&(need_bytes as u64)) {
        Ordering::Less => Ok(partial(have_bytes, need_bytes)),
        Ordering::Equal => Ok(Look::Whole(Head {
            metadata,
            key_bits,
            layout,
        })),
        Ordering::Greater => Err(NoEvent::Bad(CorruptReason::TooLong {
            have_bytes,
            need_bytes,
        })),
    }
}

const fn partial(have_bytes: u64, need_bytes: usize) -> Look {
    Look::Partial(CorruptReason::Incomplete {
        have_bytes,
        need_bytes,
    })
}

/// Reads the key into `out`; `scratch` is wiped.
pub(super) fn read_key(
    file: &OpenFile,
    head: &Head,
    scratch: &mut [u8],
    out: &mut [u8],
) -> Result<(), NoEvent> {
    let out = &mut out[..bytes_for_bits(head.key_bits)];
    let done = read_unchanged(file, head, scratch, out);
    scratch.zeroize();
    if done.is_err() {
        out.zeroize();
    }
    done
}

fn read_unchanged(
    file: &OpenFile,
    head: &Head,
    scratch: &mut [u8],
    out: &mut [u8],
) -> Result<(), NoEvent> {
    match &head.layout {
        Layout::Type7(header) | Layout::Guardian(header) => {
            let words = &mut scratch[..header.file_bytes() - HEADER_BYTES];
            file.read_exact(words, HEADER_BYTES)?;
            let done = match head.layout {
                Layout::Guardian(_) => decode_guardian_key(header, words, out),
                _ => decode_key(header, words, out),
            };
            done.map_err(CorruptReason::from)?;
        }
        Layout::Raw => file.read_exact(out, 0)?,
        Layout::KeyFile { head_bytes } => file.read_exact(out, *head_bytes)?,
    }
    if file.is_unchanged() {
        Ok(())
    } else {
        Err(NoEvent::Later)
    }
}

pub(super) fn kind(errno: Errno) -> io::ErrorKind {
    io::Error::from(errno).kind()
}
