//! From an open hand-over file to a key, or to why there is none.

use std::{cmp::Ordering, ffi::OsStr, io};

use nix::errno::Errno;
use qkd_handover::type7::{HEADER_BYTES, Header, decode_key};
use qkd_keyfile::units::bytes_for_bits;
use zeroize::Zeroize;

use super::folder::OpenFile;
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

/// What a header says of its file.
pub(super) enum Look {
    /// The file is as long as it should be.
    Whole(Header),
    /// The file is shorter: it is being written, or was left so.
    Partial(CorruptReason),
}

/// Reads and checks the header.
pub(super) fn read_header(file: &OpenFile, name: &OsStr, max_bits: u32) -> Result<Look, NoEvent> {
    let have_bytes = file.identity.size_bytes;
    let partial = |need_bytes| {
        Ok(Look::Partial(CorruptReason::Incomplete {
            have_bytes,
            need_bytes,
        }))
    };
    if have_bytes < HEADER_BYTES as u64 {
        return partial(HEADER_BYTES);
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact(&mut bytes, 0)?;
    let header = Header::decode(&bytes).map_err(CorruptReason::from)?;
    header
        .check_name(&name.to_string_lossy())
        .map_err(CorruptReason::from)?;
    let key_bits = header.key_bits;
    if key_bits > max_bits {
        return Err(CorruptReason::TooManyBits { key_bits, max_bits }.into());
    }
    let need_bytes = header.file_bytes();
    match have_bytes.cmp(&(need_bytes as u64)) {
        Ordering::Less => partial(need_bytes),
        Ordering::Equal => Ok(Look::Whole(header)),
        Ordering::Greater => Err(NoEvent::Bad(CorruptReason::TooLong {
            have_bytes,
            need_bytes,
        })),
    }
}

/// Reads the words into `scratch`, the key into `out`, and wipes `scratch`.
pub(super) fn read_key(
    file: &OpenFile,
    header: &Header,
    scratch: &mut [u8],
    out: &mut [u8],
) -> Result<(), NoEvent> {
    let words = &mut scratch[..header.file_bytes() - HEADER_BYTES];
    let out = &mut out[..bytes_for_bits(header.key_bits)];
    let done = read_unchanged(file, header, words, out);
    words.zeroize();
    if done.is_err() {
        out.zeroize();
    }
    done
}

fn read_unchanged(
    file: &OpenFile,
    header: &Header,
    words: &mut [u8],
    out: &mut [u8],
) -> Result<(), NoEvent> {
    file.read_exact(words, HEADER_BYTES)?;
    decode_key(header, words, out).map_err(CorruptReason::from)?;
    if file.is_unchanged() {
        Ok(())
    } else {
        Err(NoEvent::Later)
    }
}

pub(super) fn kind(errno: Errno) -> io::ErrorKind {
    io::Error::from(errno).kind()
}
