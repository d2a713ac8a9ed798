//! What happens to frames on their way.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use zeroize::{Zeroize, Zeroizing};

use crate::faults::{WireFault, picked};

/// Bytes of a split frame that go out at a time.
const PIECE_BYTES: usize = 97;

/// Plays the faults that are planned for frames, each once, when its frame is sent first.
pub(super) struct Harm {
    /// Planned: sequence number and fault.
    planned: VecDeque<(u64, WireFault)>,
    /// A frame that the next overtakes.
    held: Option<Zeroizing<Vec<u8>>>,
    /// How long a stall is.
    stall: Duration,
    silent_until: Option<Instant>,
    /// Up to here the batch goes out in pieces.
    split_until: usize,
    /// Here the port is closed.
    cut_at: Option<usize>,
}

impl Harm {
    pub(super) fn new(stall: Duration) -> Self {
        Self {
            planned: VecDeque::new(),
            held: None,
            stall,
            silent_until: None,
            split_until: 0,
            cut_at: None,
        }
    }

    pub(super) fn plan(&mut self, seq: u64, fault: Option<WireFault>) {
        self.planned.extend(fault.map(|fault| (seq, fault)));
    }

    /// Sequence numbers begin anew.
    pub(super) fn forget(&mut self) {
        self.planned.clear();
        self.begin_line();
    }

    /// The line was opened: what was on its way is gone.
    pub(super) fn begin_line(&mut self) {
        (self.held, self.silent_until) = (None, None);
        (self.split_until, self.cut_at) = (0, None);
    }

    /// A fresh frame of `seq` lies in `batch` from `start` on. Returns whether it is to be the last of
    /// the batch.
    pub(super) fn touch(&mut self, seq: u64, start: usize, batch: &mut Vec<u8>) -> bool {
        while self
            .planned
            .front()
            .is_some_and(|(planned, _)| *planned < seq)
        {
            self.planned.pop_front();
        }
        let planned = match self.planned.front() {
            Some(&(planned, fault)) if planned == seq => {
                self.planned.pop_front();
                Some(fault)
            }
            _ => None,
        };
        match planned {
            None => {
                if let Some(held) = self.held.take() {
                    batch.extend_from_slice(&held);
                }
                return false;
            }
            Some(WireFault::Drop) => cut(batch, start),
            Some(WireFault::Duplicate) => batch.extend_from_within(start..),
            Some(WireFault::Flip(pick)) => {
                // Between the zero bytes around it.
                let bit = picked(pick, (batch.len() - start - 2) * 8);
                batch[start + 1 + bit / 8] ^= 0x80 >> (bit % 8);
            }
            Some(WireFault::Reorder) => {
                self.held = Some(Zeroizing::new(batch[start..].to_vec()));
                cut(batch, start);
            }
            Some(WireFault::Split) => {
                self.split_until = batch.len();
                return true;
            }
            Some(WireFault::Stall) => {
                self.silent_until = Some(Instant::now() + self.stall);
                return true;
            }
            Some(WireFault::HangUp) => {
                self.cut_at = Some(start + (batch.len() - start) / 2);
                return true;
            }
        }
        false
    }

    /// Up to where the batch may be written now.
    pub(super) fn may_write(&mut self, written: usize, len: usize) -> usize {
        self.silent_until = self.silent_until.filter(|until| Instant::now() < *until);
        if self.silent_until.is_some() {
            return written;
        }
        if written >= self.split_until {
            self.split_until = 0;
        }
        let end = if self.split_until > 0 {
            std::thread::sleep(Duration::from_millis(1));
            (written + PIECE_BYTES).min(len)
        } else {
            len
        };
        self.cut_at.map_or(end, |cut| end.min(cut))
    }

    /// Whether the port is to be closed now.
    pub(super) fn hangs_up(&self, written: usize) -> bool {
        self.cut_at.is_some_and(|cut| written >= cut)
    }
}

/// Takes a frame, which holds key, off the batch.
fn cut(batch: &mut Vec<u8>, start: usize) {
    batch[start..].zeroize();
    batch.truncate(start);
}
