//! The end of a hop that follows the owner of the pad.

use qkd_keyfile::{KeySpan, NodeId, StreamId, metadata::RelayEncryption};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{
    BatchKey, HopError, TAG_BYTES,
    aes::{KEY_BYTES, OVERHEAD_BYTES},
    link_stream, masked, read_hash_key, read_some,
};
use crate::{
    io::Cx,
    record::Purpose,
    session::{HashKey, Session},
    store::FollowError,
    wire::{Cargo, HopRef, MAX_ITEMS, Message, RelayHeader, Reservation},
};

/// What a hop has brought.
#[derive(Debug)]
pub(crate) enum Arrived {
    /// A key file.
    File(RelayHeader, KeyBuf),
    /// Bits of the link, reserved at both ends from now on.
    Reserved(RelayHeader, Reservation, KeyBuf),
}

/// Checks, burns and decrypts a hop. `None` for one that was accepted before, which is acknowledged
/// again, and, without acknowledgement, for one of another session or one that came before the
/// commit of a segment that its pad is from.
///
/// # Errors
///
/// See [`HopError`]; nothing was burned.
pub(crate) fn receive(
    cx: &mut Cx<'_>,
    session: &mut Session,
    peer: &NodeId,
    hop: HopRef<'_>,
) -> Result<Option<Arrived>, HopError> {
    let stream = link_stream(cx, peer).ok_or(HopError::Malformed)?;
    let header: RelayHeader = postcard::from_bytes(hop.header).map_err(|_| HopError::Malformed)?;
    if session.accepting_id() != Some(header.session) {
        return Ok(None);
    }
    let taken = Message::HopTaken {
        session: header.session,
        sequence: header.sequence,
    };
    if session.receiving.accepted.contains(header.sequence) {
        cx.send(peer, &taken);
        return Ok(None);
    }
    if !is_well_formed(&header, hop.ciphertext.len()) {
        return Err(HopError::Malformed);
    }
    let fresh = Fresh::of(session, &header);
    match cx.store.check_follow(&stream, &fresh.all(&header)) {
        Ok(()) => {}
        // The commit is on its way; the hop comes again.
        Err(FollowError::Unconfirmed) => return Ok(None),
        Err(error) => return Err(HopError::Misuse(error)),
    }
    let pads = read(cx, &stream, &header, fresh)?;
    let known = session.receiving.hash_keys.iter();
    let mut known = known.filter(|key| key.spans == header.hash_key);
    let hash_key = pads.hash_key.as_ref();
    let hash_key = hash_key.or_else(|| known.next()).map(|key| &key.key);
    let tag = hash_key
        .ok_or(HopError::Malformed)?
        .tag(hop.header, hop.ciphertext);
    let expected = masked(tag, pads.mask.expose());
    if !bool::from(expected.ct_eq(&hop.tag)) {
        return Err(HopError::BadTag);
    }
    let arrived = open(cx, session, hop, header, &pads)?;
    accept(cx, session, &stream, arrived.header(), fresh)?;
    session.receiving.keep(pads.hash_key, pads.batch);
    cx.send(peer, &taken);
    let arrived = match (arrived, pads.bits) {
        (Opened::File(header, file), _) => Arrived::File(header, file),
        (Opened::Padded(header), Some(mut pad)) => {
            // The pad's own buffer becomes the key file: no third copy of either exists.
            cx.backend.xor_in_place(pad.expose_mut(), hop.ciphertext);
            Arrived::File(header, pad)
        }
        (Opened::Reserved(header, reservation), Some(bits)) => {
            Arrived::Reserved(header, reservation, bits)
        }
        (Opened::Padded(_) | Opened::Reserved(..), None) => return Err(HopError::Malformed),
    };
    Ok(Some(arrived))
}

/// Which of a hop's keys are not known yet: their bits are burned with this hop.
#[derive(Debug, Clone, Copy)]
struct Fresh {
    hash_key: bool,
    pad: bool,
}

impl Fresh {
    fn of(session: &Session, header: &RelayHeader) -> Self {
        let receiving = &session.receiving;
        let mut hash_keys = receiving.hash_keys.iter().map(|key| &key.spans);
        let mut batches = receiving.batches.iter().map(|key| &key.spans);
        let is_aes = matches!(header.cargo, Cargo::Aes256Gcm { .. });
        Self {
            hash_key: hash_keys.all(|spans| *spans != header.hash_key),
            pad: !is_aes || batches.all(|spans| *spans != header.pad),
        }
    }

    fn hash_key(self, header: &RelayHeader) -> &[KeySpan] {
        if self.hash_key { &header.hash_key } else { &[] }
    }

    fn pad(self, header: &RelayHeader) -> &[KeySpan] {
        if self.pad { &header.pad } else { &[] }
    }

    fn all(self, header: &RelayHeader) -> Vec<KeySpan> {
        [self.hash_key(header), &header.mask, self.pad(header)].concat()
    }
}

/// Bits that a hop names, read and not yet burned.
struct Pads {
    hash_key: Option<HashKey>,
    mask: KeyBuf,
    /// A fresh key of a batch.
    batch: Option<BatchKey>,
    /// Pad, or reserved bits.
    bits: Option<KeyBuf>,
}

fn read(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    header: &RelayHeader,
    fresh: Fresh,
) -> Result<Pads, HopError> {
    let hash_key = match fresh.hash_key(header) {
        [] => None,
        spans => Some(HashKey {
            spans: spans.to_vec(),
            key: read_hash_key(cx, stream, spans)?,
        }),
    };
    let mask = cx.store.read_all(stream, &header.mask)?;
    let mut bits = read_some(cx, stream, fresh.pad(header))?;
    let mut batch = None;
    if matches!(header.cargo, Cargo::Aes256Gcm { .. })
        && let Some(key) = bits.take()
    {
        batch = Some(BatchKey::new(header.pad.clone(), &key)?);
    }
    Ok(Pads {
        hash_key,
        mask,
        batch,
        bits,
    })
}

/// A hop whose tag fits.
enum Opened {
    File(RelayHeader, KeyBuf),
    /// To be decrypted with the pad, once that is burned.
    Padded(RelayHeader),
    Reserved(RelayHeader, Reservation),
}

impl Opened {
    const fn header(&self) -> &RelayHeader {
        match self {
            Self::File(header, _) | Self::Padded(header) | Self::Reserved(header, _) => header,
        }
    }
}

fn open(
    cx: &Cx<'_>,
    session: &Session,
    hop: HopRef<'_>,
    header: RelayHeader,
    pads: &Pads,
) -> Result<Opened, HopError> {
    match header.cargo.clone() {
        Cargo::Padded => Ok(Opened::Padded(header)),
        Cargo::Reservation(reservation) => Ok(Opened::Reserved(header, reservation)),
        Cargo::Aes256Gcm { nonce } => {
            let known = session.receiving.batches.iter();
            let mut known = known.filter(|key| key.spans == header.pad);
            let key = pads.batch.as_ref().or_else(|| known.next());
            let key = key.ok_or(HopError::Malformed)?;
            let len = hop.ciphertext.len().saturating_sub(OVERHEAD_BYTES);
            let mut file = cx.store.pool().take(len).map_err(|_| HopError::Memory)?;
            key.decrypt(nonce, hop.header, hop.ciphertext, &mut file)?;
            Ok(Opened::File(header, file))
        }
    }
}

/// Burns the bits, for good; the hop is not accepted again.
fn accept(
    cx: &mut Cx<'_>,
    session: &mut Session,
    stream: &StreamId,
    header: &RelayHeader,
    fresh: Fresh,
) -> Result<(), HopError> {
    let store = &mut *cx.store;
    if let Cargo::Reservation(reservation) = &header.cargo {
        let tags = [fresh.hash_key(header), &header.mask].concat();
        let purpose = Purpose::Relay(reservation.relay);
        // All was checked together, so the second cannot fail after the first.
        let followed = store.follow(stream, &tags, Purpose::Pad);
        followed
            .and_then(|()| store.follow(stream, &header.pad, purpose))
            .map_err(HopError::Misuse)?;
    } else {
        let followed = store.follow(stream, &fresh.all(header), Purpose::Pad);
        followed.map_err(HopError::Misuse)?;
    }
    let (named, method) = match header.cargo {
        Cargo::Aes256Gcm { .. } => (&header.pad[..], RelayEncryption::Aes256Gcm),
        _ => (fresh.pad(header), RelayEncryption::OneTimePad),
    };
    let spans = [fresh.hash_key(header), &header.mask, named].concat();
    store.carried(&header.route, header.segment, stream, spans, method);
    let accepted = &mut session.receiving.accepted;
    accepted.insert(header.sequence, header.sequence + 1);
    Ok(())
}

/// Whether lengths and numbers can be. Spans stand in the order in which an owner takes them, so that
/// no row is opened twice for one hop.
fn is_well_formed(header: &RelayHeader, ciphertext_bytes: usize) -> bool {
    let ascending = |spans: &[KeySpan]| {
        spans.len() <= MAX_ITEMS && spans.windows(2).all(|pair| pair[0] < pair[1])
    };
    let pad_bytes = total(&header.pad);
    let lengths_fit = match header.cargo {
        Cargo::Padded => pad_bytes == Some(ciphertext_bytes as u64),
        Cargo::Aes256Gcm { .. } => {
            pad_bytes == Some(u64::from(KEY_BYTES)) && ciphertext_bytes > OVERHEAD_BYTES
        }
        Cargo::Reservation(_) => pad_bytes > Some(0) && ciphertext_bytes == 0,
    };
    lengths_fit
        && total(&header.mask) == Some(u64::from(TAG_BYTES))
        && total(&header.hash_key) == Some(u64::from(TAG_BYTES))
        && [&header.pad, &header.mask, &header.hash_key].map(|spans| ascending(spans)) == [true; 3]
        && header.sequence < u64::MAX
        && header.segment.0 < u64::MAX
}

fn total(spans: &[KeySpan]) -> Option<u64> {
    spans.iter().try_fold(0_u64, |sum, span| {
        sum.checked_add(u64::from(span.len_bytes))
    })
}
