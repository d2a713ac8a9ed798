//! What the end that does not own bits may do with them: follow the owner, each bit once.

use qkd_keyfile::{KeySpan, NodeId, SegmentNumber, StreamId, metadata::KeyType};

use super::Store;
use crate::record::{Binding, BurnReason, Purpose, Record, Stage};

/// Bindings of one node that wait for their applications, at most. The oldest make room.
const UNDELIVERED_MAX: usize = if cfg!(test) { 256 } else { 1 << 17 };

/// Why bits that the matching KMA named may not be used. Nothing was burned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// No such segment, or the span lies outside it.
    #[error("the bits are not in stock")]
    NoSuchBits,
    /// This end owns the segment: the other may not name its bits.
    #[error("the bits belong to this end")]
    NotTheirs,
    /// Some of the bits were used or burned already.
    #[error("the bits were used before")]
    Used,
    /// The segment is not confirmed yet.
    #[error("the segment is not confirmed")]
    Unconfirmed,
}

impl Store {
    /// Whether the matching KMA may name these bits now. `spans` must not overlap one another.
    ///
    /// # Errors
    ///
    /// See [`FollowError`].
    pub(crate) fn check_follow(
        &self,
        stream: &StreamId,
        spans: &[KeySpan],
    ) -> Result<(), FollowError> {
        let mut sorted: Vec<&KeySpan> = spans.iter().collect();
        sorted.sort();
        let apart = sorted.windows(2).all(|pair| {
            pair[0].segment != pair[1].segment
                || pair[0]
                    .end_bytes()
                    .is_some_and(|end| end <= pair[1].offset_bytes)
        });
        if !apart {
            return Err(FollowError::Used);
        }
        for span in spans {
            let segment = self
                .segment(stream, span.segment)
                .ok_or(FollowError::NoSuchBits)?;
            if segment.key_type != KeyType::Decrypting {
                return Err(FollowError::NotTheirs);
            }
            let end = span
                .end_bytes()
                .filter(|&end| end <= segment.len_bytes && span.len_bytes > 0)
                .ok_or(FollowError::NoSuchBits)?;
            if segment
                .followed
                .overlap(u64::from(span.offset_bytes), u64::from(end))
                != 0
            {
                return Err(FollowError::Used);
            }
            if segment.stage != Stage::Confirmed {
                return Err(FollowError::Unconfirmed);
            }
        }
        Ok(())
    }

    /// Burns bits that the matching KMA used, or reserved, once and for all.
    ///
    /// # Errors
    ///
    /// See [`FollowError`]; nothing was burned.
    pub(crate) fn follow(
        &mut self,
        stream: &StreamId,
        spans: &[KeySpan],
        purpose: Purpose,
    ) -> Result<(), FollowError> {
        self.check_follow(stream, spans)?;
        for &span in spans {
            self.record(Record::Followed {
                stream: stream.clone(),
                span,
                purpose,
            });
        }
        Ok(())
    }

    /// Burns what lies below the owner's mark and was never used; bytes that it has bound are
    /// above `mark_bytes` or known here already.
    pub(crate) fn burn_below(
        &mut self,
        stream: &StreamId,
        number: SegmentNumber,
        mark_bytes: u32,
        reason: BurnReason,
    ) {
        let Some(segment) = self.segment(stream, number) else {
            return;
        };
        let mark = u64::from(mark_bytes.min(segment.len_bytes));
        if segment.key_type != KeyType::Decrypting {
            return;
        }
        for (start, end) in segment.followed.missing(0, mark) {
            let (Ok(offset_bytes), Ok(len_bytes)) =
                (u32::try_from(start), u32::try_from(end - start))
            else {
                continue;
            };
            self.record(Record::Followed {
                stream: stream.clone(),
                span: KeySpan {
                    segment: number,
                    offset_bytes,
                    len_bytes,
                },
                purpose: Purpose::Burn(reason),
            });
        }
    }

    /// Takes in a binding, in sequence; says whether it was new.
    ///
    /// # Errors
    ///
    /// [`FollowError`]: the bits are not free to be bound. Nothing was recorded.
    pub(crate) fn receive_binding(
        &mut self,
        source: &NodeId,
        sequence: u64,
        binding: Binding,
    ) -> Result<(), FollowError> {
        match self.check_follow(&binding.stream, &[binding.span]) {
            Ok(()) | Err(FollowError::Unconfirmed) => {}
            Err(error) => return Err(error),
        }
        let peer = self.state.peers.get(source);
        let oldest = peer
            .filter(|peer| peer.undelivered.len() >= UNDELIVERED_MAX)
            .and_then(|peer| peer.undelivered.first_key_value());
        if let Some((_, &key_id)) = oldest {
            self.record(Record::Forgotten {
                source: source.clone(),
                key_id,
            });
        }
        let (key_id, segment) = (binding.key_id, binding.span.segment);
        let is_void = self
            .segment(&binding.stream, segment)
            .is_some_and(|segment| segment.is_suspected);
        self.record(Record::BindingReceived {
            source: source.clone(),
            sequence,
            binding,
        });
        // Nobody is given the key, so nobody ends its wait.
        if is_void {
            let source = source.clone();
            self.record(Record::Forgotten { source, key_id });
        }
        Ok(())
    }
}
