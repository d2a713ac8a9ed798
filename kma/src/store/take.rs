//! What the owner of bits does with them: plan, read, take. A plan changes nothing, so whatever
//! fails between the plan and the taking costs no bit.

use qkd_keyfile::{KeySpan, NodeId, SegmentNumber, StreamId, metadata::SecurityLevel};

use super::{ReadError, Store};
use crate::{
    record::{Binding, BurnReason, Purpose, Record},
    vault::GetError,
};

/// Most spans of one plan.
pub(crate) const SPANS_MAX: usize = 4096;

/// Open segments that are looked through for keys, at most.
const SCAN_MAX: usize = 4096;

/// Fewer bits in stock than asked for. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{have_bytes} bytes in stock, {want_bytes} asked for")]
pub struct Short {
    /// What is there, above the floor.
    pub have_bytes: u64,
    /// What was asked for.
    pub want_bytes: u64,
}

/// Keys that are to be cut from a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyOrder {
    /// How many.
    pub(crate) number: u32,
    /// Length of each.
    pub(crate) len_bytes: u32,
    /// Stays in stock.
    pub(crate) floor_bytes: u64,
    /// The weakest level that will do.
    pub(crate) level: SecurityLevel,
}

/// What an order would take, in this order.
#[derive(Debug, Default)]
pub(crate) struct KeyPlan(pub(crate) Vec<(KeySpan, Purpose)>);

impl KeyPlan {
    /// The spans of the keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = KeySpan> {
        let keys = self.0.iter().filter(|(_, p)| *p == Purpose::Supply);
        keys.map(|(span, _)| *span)
    }
}

impl Store {
    /// Where `want_bytes` of pad are, oldest segment first, with `floor_bytes` left in stock beyond
    /// them. To be taken with [`Store::take`] before anything else is.
    ///
    /// # Errors
    ///
    /// [`Short`], also where the bytes are scattered over too many segments.
    pub(crate) fn plan_pad(
        &self,
        stream: &StreamId,
        want_bytes: u32,
        floor_bytes: u64,
    ) -> Result<Vec<KeySpan>, Short> {
        let have_bytes = self.available_bytes(stream).saturating_sub(floor_bytes);
        let short = Short {
            have_bytes,
            want_bytes: u64::from(want_bytes),
        };
        let entry = self.state.streams.get(stream).ok_or(short)?;
        if have_bytes < short.want_bytes {
            return Err(short);
        }
        let mut spans = Vec::new();
        let mut left = want_bytes;
        for number in entry.open.iter().take(SPANS_MAX) {
            let Some(segment) = entry.segments.get(number).filter(|_| left > 0) else {
                break;
            };
            let len_bytes = left.min(segment.remaining_bytes());
            spans.push(KeySpan {
                segment: *number,
                offset_bytes: segment.mark_bytes,
                len_bytes,
            });
            left -= len_bytes;
        }
        if left > 0 { Err(short) } else { Ok(spans) }
    }

    /// Takes spans that were planned: the mark moves, durably with the next commit.
    pub(crate) fn take(&mut self, stream: &StreamId, spans: &[KeySpan], purpose: Purpose) {
        let joined = |a: &KeySpan, b: &KeySpan| {
            a.segment == b.segment && a.end_bytes() == Some(b.offset_bytes)
        };
        for run in spans.chunk_by(joined) {
            let span = KeySpan {
                len_bytes: run.iter().map(|span| span.len_bytes).sum(),
                ..run[0]
            };
            self.record(Record::Taken {
                stream: stream.clone(),
                span,
                purpose,
            });
        }
    }

    /// Where the keys of an order would be cut, each from one segment. What a segment in use has
    /// left is burned when it is too short for the next key; one that is still whole is passed over,
    /// and waits for shorter keys.
    ///
    /// # Errors
    ///
    /// [`Short`].
    pub(crate) fn plan_keys(&self, stream: &StreamId, order: KeyOrder) -> Result<KeyPlan, Short> {
        let available = self.available_bytes(stream);
        let have_bytes = available.saturating_sub(order.floor_bytes);
        let short = Short {
            have_bytes,
            want_bytes: u64::from(order.number) * u64::from(order.len_bytes),
        };
        let entry = self.state.streams.get(stream).ok_or(short)?;
        if have_bytes < short.want_bytes || order.len_bytes == 0 {
            return Err(short);
        }
        let mut plan = KeyPlan::default();
        let (mut missing, mut consumed) = (order.number, 0_u64);
        let segments = entry.open.iter().take(SCAN_MAX);
        for (&number, segment) in segments.filter_map(|n| entry.segments.get_key_value(n)) {
            if missing == 0 {
                break;
            }
            if segment.level < order.level {
                continue;
            }
            let span = |offset_bytes, len_bytes| KeySpan {
                segment: number,
                offset_bytes,
                len_bytes,
            };
            let keys = missing.min(segment.remaining_bytes() / order.len_bytes);
            let end = segment.mark_bytes + keys * order.len_bytes;
            let offsets = (0..keys).map(|key| segment.mark_bytes + key * order.len_bytes);
            let cut = offsets.map(|at| (span(at, order.len_bytes), Purpose::Supply));
            plan.0.extend(cut);
            consumed += u64::from(keys) * u64::from(order.len_bytes);
            missing -= keys;
            let rest = segment.len_bytes - end;
            if missing > 0 && rest > 0 && (keys > 0 || segment.is_touched()) {
                let burn = Purpose::Burn(BurnReason::Remainder);
                plan.0.push((span(end, rest), burn));
                consumed += u64::from(rest);
            }
        }
        if missing > 0 || consumed > have_bytes {
            return Err(short);
        }
        Ok(plan)
    }

    /// Bits that cannot be read are of no use to anyone: what the segment has left is burned, so that
    /// it does not stand in the way of others. Errors that may pass change nothing.
    pub(crate) fn burn_unreadable(&mut self, stream: &StreamId, spans: &[KeySpan]) {
        let mut segments: Vec<SegmentNumber> = spans.iter().map(|span| span.segment).collect();
        segments.dedup();
        for number in segments {
            let Some(segment) = self.segment(stream, number) else {
                continue;
            };
            let rest = KeySpan {
                segment: number,
                offset_bytes: segment.mark_bytes,
                len_bytes: segment.remaining_bytes(),
            };
            let lost = match self.read_all(stream, &[rest]) {
                Ok(_) | Err(ReadError::Memory(_) | ReadError::NoSuchBits) => false,
                Err(ReadError::Get(error)) => !matches!(error, GetError::Vault { .. }),
            };
            if lost && rest.len_bytes > 0 {
                tracing::error!(%stream, segment = %number, "stored segment cannot be read; burned");
                let burn = Purpose::Burn(BurnReason::Unreadable);
                self.take(stream, &[rest], burn);
            }
        }
    }

    /// Binds bits just taken to a key ID, for `destination`.
    pub(crate) fn bind(&mut self, destination: &NodeId, binding: Binding) {
        let peers = &self.state.peers;
        let sequence = peers.get(destination).map_or(0, |p| p.bindings_sent);
        self.record(Record::Bound {
            destination: destination.clone(),
            sequence,
            binding,
        });
    }
}
