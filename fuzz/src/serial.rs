//! The serial line: a stream of bytes in pieces of any size, to frames, to blocks.
//!
//! - Where the stream is cut into pieces changes nothing: same frames, same errors, same counters.
//! - Every item is in exactly one counter.
//! - A frame that is taken encodes, and that decodes to the same frame.
//! - The receiver hands out blocks with ascending numbers, each once per session, never more than it
//!   gave credit for; its credits never call durable what has not arrived.
//!
//! The stream is made by steps: bytes as they are, good frames, frames with a right check sequence
//! around anything, damage.

use std::time::Duration;

use qkd_handover::{
    block::BlockHeader,
    serial::{
        Body, Credit, Decoder, Event, Frame, MAX_ENCODED_BYTES, Position, Receiver, VERSION, encode,
    },
    status::Status,
};
use qkd_keyfile::{Mono, units::bytes_for_bits};

use super::input::{Input, crc32c};

/// See the module.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let piece_bytes = 1 + usize::from(input.byte());
    let stream = stream(&mut input);
    let mut receiver = Host::new();
    let whole = decode(&mut Decoder::new(), &[&stream], |frame| {
        check_frame(frame);
        receiver.take(frame);
    });
    let pieces: Vec<&[u8]> = stream.chunks(piece_bytes).collect();
    assert_eq!(decode(&mut Decoder::new(), &pieces, |_| ()), whole);
}

/// What came out, as text (no key is in it), and the counters.
fn decode(
    decoder: &mut Decoder,
    pieces: &[&[u8]],
    mut each: impl FnMut(&Frame<'_>),
) -> (Vec<String>, String) {
    let mut seen = Vec::new();
    for mut piece in pieces.iter().copied() {
        while let Some(item) = decoder.next_frame(&mut piece) {
            if let Ok(frame) = &item {
                each(frame);
            }
            seen.push(match item {
                Ok(Frame {
                    body: Body::Key { key, .. },
                    ..
                }) => format!("key {key:?}"),
                other => format!("{other:?}"),
            });
        }
        assert!(piece.is_empty());
    }
    let counters = decoder.counters();
    let counted = counters.frames + counters.bad_crc + counters.oversize + counters.garbage;
    assert_eq!(counted, seen.len() as u64);
    (seen, format!("{counters:?}"))
}

fn check_frame(frame: &Frame<'_>) {
    let mut bytes = Vec::new();
    encode(frame, &mut bytes).unwrap();
    assert!(bytes.len() <= MAX_ENCODED_BYTES);
    let mut decoder = Decoder::new();
    let again = decoder.next_frame(&mut &bytes[..]);
    assert_eq!(again, Some(Ok(frame.clone())));
}

const CREDIT_BLOCKS: u32 = 4;

/// A receiver and what it has handed out.
struct Host {
    receiver: Receiver,
    last: Position,
    blocks: u32,
}

impl Host {
    fn new() -> Self {
        let mut receiver = Receiver::new(Duration::from_secs(1), None);
        receiver.grant(CREDIT_BLOCKS);
        Self {
            receiver,
            last: Position { session: 0, seq: 0 },
            blocks: 0,
        }
    }

    fn take(&mut self, frame: &Frame<'_>) {
        match self.receiver.receive(frame) {
            Event::Block { position, .. } => {
                let Position { session, seq } = self.last;
                assert!(position.session != session || position.seq > seq);
                self.last = position;
                self.blocks += 1;
                assert!(self.blocks <= CREDIT_BLOCKS);
                if position.seq % 2 == 0 {
                    self.receiver.settle(position);
                }
            }
            Event::Hello { device, .. } => assert!(!device.is_empty()),
            Event::Status(_) | Event::End { .. } | Event::Dropped => {}
        }
        let mut out = Vec::new();
        while self.receiver.poll_transmit(Mono::default(), &mut out) {}
        self.receiver.handle_timeout(Mono(Duration::from_secs(2)));
        let mut said = &out[..];
        let mut decoder = Decoder::new();
        while let Some(frame) = decoder.next_frame(&mut said) {
            let Body::Credit(credit) = frame.unwrap().body else {
                panic!("a host says credits only");
            };
            assert!(credit.durable <= credit.received);
            assert_eq!(credit.window_blocks, self.receiver.window_blocks());
        }
    }
}

fn stream(input: &mut Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    while !input.is_empty() && out.len() < 2 * MAX_ENCODED_BYTES {
        match input.byte() % 6 {
            0 => out.extend_from_slice(input.short()),
            1 => good_frame(input, &mut out),
            2 => {
                let raw = checked_frame(input);
                out.push(0);
                push_cobs(&raw, &mut out);
                out.push(0);
            }
            3 => {
                let (back, flip) = (usize::from(input.u16()), input.byte());
                let at = out.len().checked_sub(1 + back);
                if let Some(byte) = at.and_then(|at| out.get_mut(at)) {
                    *byte ^= flip;
                }
            }
            4 => out.truncate(out.len() - usize::from(input.byte()).min(out.len())),
            _ => {
                let run = usize::from(input.u16()) + usize::from(input.byte());
                out.resize(out.len() + run, 1 + input.byte() % 255);
            }
        }
    }
    out
}

/// A frame that a device or a host might send; none if the values do not make one.
fn good_frame(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let (kind, session, seq) = (
        input.byte() % 5,
        u32::from(input.byte()),
        u64::from(input.byte()),
    );
    let mut text = String::new();
    let mut key = Vec::new();
    let body = match kind {
        0 => {
            text.push_str(&String::from_utf8_lossy(input.short()));
            Body::Hello { device: &text }
        }
        1 => {
            let header = BlockHeader {
                number: input.u64(),
                generated_at: None,
                key_bits: u32::from(input.u16()),
                qber_ppm: None,
            };
            key.extend_from_slice(input.take(bytes_for_bits(header.key_bits)));
            key.resize(bytes_for_bits(header.key_bits), 0);
            Body::Key { header, key: &key }
        }
        2 => Body::Status(Status {
            qber_ppm: Some(input.u32()),
            ..Status::default()
        }),
        3 => Body::Credit(Credit {
            received: input.u64(),
            end: true,
            ..Credit::default()
        }),
        _ => Body::End,
    };
    let before = out.len();
    if encode(&Frame { session, seq, body }, out).is_err() {
        assert_eq!(out.len(), before);
    }
}

/// Any version, kind, flags, numbers, length and payload, behind a right check sequence.
fn checked_frame(input: &mut Input<'_>) -> Vec<u8> {
    let version = match input.byte() {
        0 => VERSION,
        other => other,
    };
    let mut raw = vec![version];
    let head = input.take(1 + 2 + 4 + 8);
    raw.extend_from_slice(head);
    raw.resize(16, 0);
    let wrong_by = u32::from(input.byte() / 128);
    let payload = input.short();
    let claimed = u32::try_from(payload.len()).unwrap() + wrong_by;
    raw.extend_from_slice(&claimed.to_le_bytes());
    raw.extend_from_slice(payload);
    let crc = crc32c(&raw);
    raw.extend_from_slice(&crc.to_le_bytes());
    raw
}

/// COBS, as its authors describe it.
fn push_cobs(raw: &[u8], out: &mut Vec<u8>) {
    for piece in raw.split(|&byte| byte == 0) {
        let mut chunks = piece.chunks(254).peekable();
        if chunks.peek().is_none() {
            out.push(1);
        }
        while let Some(chunk) = chunks.next() {
            out.push(u8::try_from(chunk.len() + 1).unwrap());
            out.extend_from_slice(chunk);
            // A full group stands for itself; the zero after it needs a group of its own.
            if chunk.len() == 254 && chunks.peek().is_none() {
                out.push(1);
            }
        }
    }
}
