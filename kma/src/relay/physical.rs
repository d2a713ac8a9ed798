//! Bits of a registered physical generator, in stock for the units that are made of them.

use std::collections::VecDeque;

use qkd_keyfile::Mono;
use qkd_secmem::KeyBuf;

use crate::io::{Cx, Output};

/// Bytes that are asked for at least: a slow device is read ahead of need.
const ASK_BYTES: usize = 4096;

/// What is asked for and does not come is asked for again after this time.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// The bits, each given out once and wiped.
#[derive(Debug, Default)]
pub(super) struct Physical {
    pieces: VecDeque<Piece>,
    /// Bytes asked for that have not come, and since when.
    asked: Option<(usize, Mono)>,
}

#[derive(Debug)]
struct Piece {
    bits: KeyBuf,
    /// Bytes given out.
    used: usize,
}

impl Physical {
    pub(super) fn add(&mut self, bits: KeyBuf) {
        self.asked = self.asked.and_then(|(bytes, since)| {
            let left = bytes.saturating_sub(bits.len_bytes());
            (left > 0).then_some((left, since))
        });
        self.pieces.push_back(Piece { bits, used: 0 });
    }

    /// Whether so many bytes are there. If not, they are asked for.
    pub(super) fn has(&mut self, cx: &mut Cx<'_>, bytes: usize) -> bool {
        let pieces = self.pieces.iter();
        let have: usize = pieces.map(|p| p.bits.len_bytes() - p.used).sum();
        let overdue = |since| cx.now.mono.since(since) >= PATIENCE;
        if have < bytes && self.asked.is_none_or(|(_, since)| overdue(since)) {
            let bytes = (bytes - have).max(ASK_BYTES);
            self.asked = Some((bytes, cx.now.mono));
            cx.out.push(Output::WantRandom { bytes });
        }
        have >= bytes
    }

    /// Moves bits into `out`, if there are enough.
    pub(super) fn fill(&mut self, cx: &mut Cx<'_>, out: &mut [u8]) -> bool {
        if !self.has(cx, out.len()) {
            return false;
        }
        let mut at = 0;
        while at < out.len() {
            let Some(piece) = self.pieces.front_mut() else {
                return false;
            };
            let rest = &mut piece.bits.expose_mut()[piece.used..];
            let len = rest.len().min(out.len() - at);
            out[at..at + len].copy_from_slice(&rest[..len]);
            qkd_kernels::wipe(&mut rest[..len]);
            at += len;
            piece.used += len;
            if piece.used == piece.bits.len_bytes() {
                self.pieces.pop_front();
            }
        }
        true
    }
}
