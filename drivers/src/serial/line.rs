//! The conversation with a device, whatever becomes of the port in between.

use std::{collections::VecDeque, time::Duration};

use qkd_handover::{
    block::BlockHeader,
    serial::{Body, Decoder, Event as Received, Frame, Position, Receiver},
};
use qkd_keyfile::{Mono, QkdKeyId};
use tokio::time::Instant;

use super::SerialConfig;
use crate::{
    event::{DetachReason, Event},
    outstanding::Outstanding,
    records::{key_block, tell_status},
};

/// Frames in, events and credit frames out.
#[derive(Debug)]
pub(super) struct Line {
    decoder: Decoder,
    talk: Talk,
    began: Instant,
}

/// What frames are told to.
#[derive(Debug)]
struct Talk {
    config: SerialConfig,
    receiver: Receiver,
    outstanding: Outstanding<Position>,
    /// Name of the device that said hello last.
    device: Option<String>,
    /// Whether the layer above was told that the device is there, or that it is not.
    told_attached: Option<bool>,
    /// Why it was told last that the device is not there.
    told_reason: Option<DetachReason>,
    events: VecDeque<Event>,
}

impl Line {
    pub(super) fn new(config: &SerialConfig) -> Self {
        Self {
            decoder: Decoder::new(),
            talk: Talk {
                receiver: new_receiver(config),
                outstanding: Outstanding::default(),
                device: None,
                told_attached: None,
                told_reason: None,
                events: VecDeque::new(),
                config: config.clone(),
            },
            began: Instant::now(),
        }
    }

    pub(super) fn has_event(&self) -> bool {
        !self.talk.events.is_empty()
    }

    pub(super) fn next_event(&mut self) -> Option<Event> {
        self.talk.events.pop_front()
    }

    pub(super) fn grant(&mut self, blocks: u32) {
        self.talk.receiver.grant(blocks);
    }

    pub(super) fn settle(&mut self, id: &QkdKeyId) {
        if let Some(position) = self.talk.outstanding.settle(id) {
            self.talk.receiver.settle(position);
        }
    }

    /// Appends the credit frame that is due, if one is.
    pub(super) fn transmit(&mut self, out: &mut Vec<u8>) {
        let now = self.now();
        while self.talk.receiver.poll_transmit(now, out) {}
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if at all.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let at = self.talk.receiver.poll_timeout()?;
        Some(self.began + at.0)
    }

    pub(super) fn handle_timeout(&mut self) {
        let now = self.now();
        self.talk.receiver.handle_timeout(now);
    }

    /// The port was opened again.
    pub(super) fn reopened(&mut self) {
        self.talk.receiver.reopened();
    }

    /// The port was closed. Tells so once, and once more if it is for another device that answered;
    /// returns whether the device was within reach.
    pub(super) fn closed(&mut self, reason: DetachReason) -> bool {
        self.decoder.reset();
        let talk = &mut self.talk;
        let before = talk.told_attached.replace(false);
        let is_news = matches!(reason, DetachReason::OtherDevice { .. })
            && talk.told_reason.as_ref() != Some(&reason);
        if before != Some(false) || is_news {
            talk.told_reason = Some(reason.clone());
            talk.events.push_back(Event::Detached { reason });
        }
        before == Some(true)
    }

    /// Decodes up to the next key block, which goes to `out`, or up to other events.
    ///
    /// # Errors
    ///
    /// This device is not to be talked to.
    pub(super) fn decode(
        &mut self,
        unread: &mut &[u8],
        out: &mut [u8],
    ) -> Result<Option<Event>, DetachReason> {
        while let Some(frame) = self.decoder.next_frame(unread) {
            match frame {
                Ok(frame) => {
                    let key = self.talk.take(&frame, out)?;
                    if key.is_some() {
                        return Ok(key);
                    }
                }
                // Before the first hello there may be anything on the line.
                Err(_) if self.talk.told_attached != Some(true) => {}
                Err(error) => self.talk.events.push_back(Event::Corrupt {
                    id: None,
                    reason: error.into(),
                }),
            }
            if self.has_event() {
                break;
            }
        }
        Ok(None)
    }

    fn now(&self) -> Mono {
        Mono(self.began.elapsed())
    }
}

impl Talk {
    fn take(&mut self, frame: &Frame<'_>, out: &mut [u8]) -> Result<Option<Event>, DetachReason> {
        if let Body::Hello { device } = frame.body {
            self.meet(device)?;
        }
        match self.receiver.receive(frame) {
            Received::Hello {
                device,
                new_session,
                missing_blocks,
            } => self.tell_hello(device, frame.session, new_session, missing_blocks),
            Received::Block {
                position,
                header,
                key,
            } => {
                out[..key.len()].copy_from_slice(key);
                return Ok(self.tell_block(position, &header));
            }
            Received::Status(status) => {
                tell_status(&status, &self.config.limits, &mut self.events);
            }
            // Blocks that are missing before the end come again, and after it nothing does.
            Received::End { .. } | Received::Dropped => {}
        }
        Ok(None)
    }

    /// Compares who says hello with who is expected, and with who said it before: numbers of another
    /// device mean nothing in this one's sessions.
    fn meet(&mut self, found: &str) -> Result<(), DetachReason> {
        let expected = self.config.device.as_deref();
        if let Some(expected) = expected.filter(|&expected| expected != found) {
            return Err(DetachReason::OtherDevice {
                expected: expected.to_owned(),
                found: printable(found),
            });
        }
        if self.device.as_deref() != Some(found) && self.device.replace(found.to_owned()).is_some()
        {
            let window_blocks = self.receiver.window_blocks();
            self.receiver = new_receiver(&self.config);
            self.receiver.grant(window_blocks);
        }
        Ok(())
    }

    fn tell_hello(&mut self, device: &str, session: u32, new_session: bool, missing_blocks: u64) {
        if new_session {
            self.outstanding.clear();
        }
        if self.told_attached.replace(true) != Some(true) || new_session {
            self.events.push_back(Event::Attached {
                device: printable(device),
                session: Some(u64::from(session)),
            });
        }
        if missing_blocks > 0 {
            self.events.push_back(Event::Gap {
                blocks: missing_blocks,
            });
        }
    }

    /// A block is in the caller's buffer, unless it is empty.
    fn tell_block(&mut self, position: Position, header: &BlockHeader) -> Option<Event> {
        let id = header.qkd_key_id();
        if header.key_bits == 0 {
            // No key came, so no credit is spent.
            self.receiver.grant(1);
            if let Some(position) = self.outstanding.pass(position) {
                self.receiver.settle(position);
            }
            self.events.push_back(Event::Empty { id });
            return None;
        }
        self.outstanding.push(position, id);
        let qber = header.qber_ppm.map(|ppm| self.config.limits.qber(ppm));
        self.events.extend(qber);
        let matching = self.config.matching_module.as_ref();
        let block = key_block(header, self.device.as_deref(), matching);
        Some(Event::Key(block))
    }
}

fn new_receiver(config: &SerialConfig) -> Receiver {
    Receiver::new(Duration::from_millis(config.answer_timeout_ms), None)
}

/// A device may call itself anything; a name must not break a line of a log.
fn printable(name: &str) -> String {
    name.escape_debug().to_string()
}
