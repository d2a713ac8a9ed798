//! Frames against damage, and both halves in one loop over a link that loses and alters bytes.

use std::{collections::VecDeque, num::NonZeroU32, time::Duration};

use proptest::prelude::*;
use qkd_keyfile::Mono;

use super::*;

const RETRY: Duration = Duration::from_millis(100);
const SESSION: NonZeroU32 = NonZeroU32::new(7).unwrap();

fn block(number: u64, key: &[u8]) -> BlockHeader {
    BlockHeader {
        number,
        generated_at: None,
        key_bits: u32::try_from(key.len() * 8).unwrap(),
        qber_ppm: Some(20_000),
    }
}

fn key_frame(seq: u64, key: &[u8]) -> Frame<'_> {
    Frame {
        session: SESSION.get(),
        seq,
        body: Body::Key {
            header: block(seq, key),
            key,
        },
    }
}

fn encoded(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    encode(frame, &mut out).unwrap();
    out
}

#[test]
fn every_kind_of_frame_reads_back() {
    let key = [0, 1, 0, 0xff, 0];
    let bodies = [
        Body::Hello { device: "sim-1" },
        Body::Key {
            header: block(3, &key),
            key: &key,
        },
        Body::Status(Status {
            qber_ppm: Some(1),
            ..Status::default()
        }),
        Body::Credit(Credit {
            durable: 1,
            received: 2,
            window_blocks: 3,
            resend: true,
            greet: false,
            end: true,
        }),
        Body::End,
    ];
    let frames = bodies.map(|body| Frame {
        session: 7,
        seq: u64::MAX,
        body,
    });
    let line: Vec<u8> = frames.iter().flat_map(encoded).collect();
    let mut decoder = Decoder::new();
    let mut input = &line[..];
    for frame in frames {
        assert_eq!(decoder.next_frame(&mut input), Some(Ok(frame)));
    }
    assert_eq!(decoder.next_frame(&mut input), None);
    assert_eq!(decoder.counters().frames, 5);
}

#[test]
fn an_end_frame_has_the_documented_bytes() {
    let end = Frame {
        session: 0x0102_0304,
        seq: 5,
        body: Body::End,
    };
    let mut raw = [0_u8; 24];
    raw[..9].copy_from_slice(&[1, 5, 0, 0, 4, 3, 2, 1, 5]);
    let crc = ::crc32c::crc32c(&raw[..20]);
    raw[20..].copy_from_slice(&crc.to_le_bytes());
    let line = encoded(&end);
    assert_eq!((line[0], line[line.len() - 1]), (0, 0));
    assert_eq!(::cobs::decode_vec(&line[1..line.len() - 1]).unwrap(), raw);
}

#[test]
fn crc32c_has_its_check_value() {
    assert_eq!(::crc32c::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn the_longest_key_fits_and_one_byte_more_does_not() {
    let key = vec![0xa5; MAX_KEY_BITS as usize / 8];
    let line = encoded(&key_frame(1, &key));
    assert!(line.len() <= MAX_ENCODED_BYTES);
    let mut decoder = Decoder::new();
    let frame = decoder.next_frame(&mut &line[..]).unwrap().unwrap();
    assert_eq!(frame, key_frame(1, &key));

    let key = vec![0xa5; key.len() + 1];
    let error = encode(&key_frame(1, &key), &mut Vec::new()).unwrap_err();
    assert_eq!(error, EncodeError::TooLong { bytes: 65_537 });
}

#[test]
fn a_flood_without_a_zero_is_dropped_and_the_next_frame_is_found() {
    let mut line = vec![1; 3 * MAX_ENCODED_BYTES];
    line.extend(encoded(&key_frame(1, &[9; 32])));
    let mut decoder = Decoder::new();
    let mut results = Vec::new();
    for mut piece in line.chunks(1000) {
        while let Some(result) = decoder.next_frame(&mut piece) {
            results.push(result.map(|frame| frame.seq));
        }
    }
    assert_eq!(results, [Err(FrameError::Oversize), Ok(1)]);
    assert_eq!(decoder.counters().oversize, 1);
}

#[test]
fn debug_of_a_frame_withholds_the_key() {
    let text = format!("{:?}", key_frame(1, &[0xab; 4]));
    assert!(text.contains("withheld") && !text.contains("171"), "{text}");
}

proptest! {
    #[test]
    fn frames_are_found_however_the_line_cuts_them(
        keys in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 1..8),
        piece_bytes in 1..700_usize,
    ) {
        let line: Vec<u8> = keys.iter().enumerate()
            .flat_map(|(i, key)| encoded(&key_frame(i as u64, key)))
            .collect();
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for mut piece in line.chunks(piece_bytes) {
            while let Some(frame) = decoder.next_frame(&mut piece) {
                let Body::Key { key, .. } = frame.unwrap().body else { panic!("not a key frame") };
                found.push(key.to_vec());
            }
        }
        prop_assert_eq!(found, keys);
    }

    #[test]
    fn no_damage_to_one_byte_goes_unnoticed(
        key in prop::collection::vec(any::<u8>(), 32), at: prop::sample::Index, change in 1..=255_u8,
    ) {
        let mut line = encoded(&key_frame(1, &key));
        let at = 1 + at.index(line.len() - 2);
        line[at] ^= change;
        line.extend(encoded(&key_frame(2, &key)));
        let mut decoder = Decoder::new();
        let mut input = &line[..];
        let mut good = Vec::new();
        while let Some(result) = decoder.next_frame(&mut input) {
            good.extend(result.ok().map(|frame| frame.seq));
        }
        prop_assert_eq!(good, [2]);
    }

    #[test]
    fn any_bytes_at_all_are_survived(line: Vec<u8>) {
        let mut decoder = Decoder::new();
        let mut input = &line[..];
        while decoder.next_frame(&mut input).is_some() {}
        let DecoderCounters { frames, .. } = decoder.counters();
        prop_assert_eq!(frames, 0);
    }

    #[test]
    fn over_a_lossy_link_every_block_arrives_once_in_order_and_unaltered(
        seed: u64, fault_per_mille in 0..150_u32, restarts in 0..3_u32,
    ) {
        let mut link = Link::new(seed);
        link.fault_per_mille = fault_per_mille;
        for _ in 0..restarts {
            link.run(60);
            link.restart_host();
        }
        link.run(200);
        link.fault_per_mille = 0;
        link.run(400);
        prop_assert!(link.sender.is_done(), "{:?} {:?}", link.sender, link.receiver);
        let numbers: Vec<u64> = link.durable.iter().map(|(number, _)| *number).collect();
        prop_assert_eq!(numbers, (1..=BLOCKS).collect::<Vec<_>>());
        for (number, key) in &link.durable {
            prop_assert_eq!(key, &key_of(*number));
        }
        prop_assert_eq!(link.receiver.counters().missing, 0);
        // Restarts and faults cost duplicates, never a block.
        if fault_per_mille == 0 && restarts == 0 {
            prop_assert_eq!(link.sender.counters().resent, 0);
            prop_assert_eq!(link.receiver.counters().duplicates, 0);
        }
    }
}

const BLOCKS: u64 = 40;

fn key_of(number: u64) -> Vec<u8> {
    let byte = number.to_le_bytes()[0];
    vec![byte; 1 + usize::from(byte) % 50]
}

/// A device and a host with a line between them, and the host's disk.
struct Link {
    sender: Sender,
    receiver: Receiver,
    at_host: Decoder,
    at_device: Decoder,
    to_host: VecDeque<u8>,
    to_device: VecDeque<u8>,
    now: Mono,
    rng: u64,
    fault_per_mille: u32,
    offered: u64,
    /// Taken, not durable yet: lost when the host restarts.
    volatile: Vec<(Position, u64, Vec<u8>)>,
    durable: Vec<(u64, Vec<u8>)>,
    position: Option<Position>,
}

impl Link {
    fn new(seed: u64) -> Self {
        let mut receiver = Receiver::new(RETRY, None);
        receiver.grant(5);
        Self {
            sender: Sender::new(SESSION, "sim", 8, RETRY).unwrap(),
            receiver,
            at_host: Decoder::new(),
            at_device: Decoder::new(),
            to_host: VecDeque::new(),
            to_device: VecDeque::new(),
            now: Mono::default(),
            rng: seed | 1,
            fault_per_mille: 0,
            offered: 0,
            volatile: Vec::new(),
            durable: Vec::new(),
            position: None,
        }
    }

    fn random(&mut self, below: u32) -> u32 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 33) as u32 % below
    }

    fn restart_host(&mut self) {
        self.volatile.clear();
        self.at_host = Decoder::new();
        self.receiver = Receiver::new(RETRY, self.position);
        self.receiver.grant(5);
    }

    fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.step();
        }
    }

    fn step(&mut self) {
        self.now = self.now.after(Duration::from_millis(20));
        while self.offered < BLOCKS {
            let key = key_of(self.offered + 1);
            match self.sender.offer(block(self.offered + 1, &key), &key) {
                Ok(_) => self.offered += 1,
                Err(error) => {
                    assert_eq!(error, OfferError::Full { kept: 8 });
                    break;
                }
            }
        }
        if self.offered == BLOCKS {
            self.sender.finish();
        }
        self.sender.handle_timeout(self.now);
        self.receiver.handle_timeout(self.now);
        let (mut down, mut up) = (Vec::new(), Vec::new());
        while self.sender.poll_transmit(self.now, &mut down) {}
        while self.receiver.poll_transmit(self.now, &mut up) {}
        let (down, up) = (self.damage(down), self.damage(up));
        self.to_host.extend(down);
        self.to_device.extend(up);
        self.deliver_to_host();
        self.deliver_to_device();
        if self.random(3) == 0 {
            self.commit();
        }
    }

    /// Drops, doubles, flips or invents bytes.
    fn damage(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if self.random(20_000) >= self.fault_per_mille * 2 {
                out.push(byte);
                continue;
            }
            match self.random(4) {
                0 => {}
                1 => out.extend([byte, byte]),
                2 => out.push(byte ^ (1 << self.random(8))),
                _ => out.extend([byte, self.random(256).to_le_bytes()[0]]),
            }
        }
        out
    }

    fn deliver_to_host(&mut self) {
        let bytes: Vec<u8> = self.to_host.drain(..).collect();
        let mut input = &bytes[..];
        while let Some(frame) = self.at_host.next_frame(&mut input) {
            let Ok(frame) = frame else { continue };
            if let Event::Block {
                position,
                header,
                key,
            } = self.receiver.receive(&frame)
            {
                self.volatile.push((position, header.number, key.to_vec()));
            }
        }
    }

    fn deliver_to_device(&mut self) {
        let bytes: Vec<u8> = self.to_device.drain(..).collect();
        let mut input = &bytes[..];
        while let Some(frame) = self.at_device.next_frame(&mut input) {
            if let Ok(frame) = frame {
                self.sender.receive(self.now, &frame);
            }
        }
    }

    fn commit(&mut self) {
        for (position, number, key) in std::mem::take(&mut self.volatile) {
            self.durable.push((number, key));
            self.position = Some(position);
            self.receiver.settle(position);
            self.receiver.grant(1);
        }
    }
}

#[test]
fn a_host_that_went_back_in_time_is_told_what_is_gone() {
    let mut link = Link::new(1);
    link.run(400);
    assert!(link.sender.is_done());
    link.position = Some(Position {
        session: SESSION.get(),
        seq: 10,
    });
    link.restart_host();
    link.run(20);
    assert_eq!(link.receiver.counters().missing, BLOCKS - 10);
    assert_eq!(link.durable.len() as u64, BLOCKS);
}

#[test]
fn blocks_received_by_a_host_that_died_come_again_though_its_first_credit_is_lost() {
    let mut link = Link::new(1);
    while link.sender.counters().sent == 0 || link.volatile.is_empty() {
        link.step();
    }
    // The device knows that its blocks were received.
    link.step();
    link.restart_host();
    let mut lost = Vec::new();
    assert!(link.receiver.poll_transmit(link.now, &mut lost));
    link.receiver.receive(&Frame {
        session: SESSION.get(),
        seq: link.sender.durable_seq() + 1,
        body: Body::Hello { device: "sim" },
    });
    assert!(link.receiver.poll_transmit(link.now, &mut lost));
    link.run(400);
    assert!(link.sender.is_done(), "{:?}", link.sender);
    assert_eq!(link.durable.len() as u64, BLOCKS);
}

#[test]
fn a_host_that_forgot_everything_is_not_given_settled_blocks_again() {
    let mut link = Link::new(1);
    link.run(400);
    link.position = None;
    link.restart_host();
    link.run(20);
    assert_eq!(link.durable.len() as u64, BLOCKS);
    assert_eq!(link.receiver.counters().sessions, 1);
}

#[test]
fn settling_a_block_of_a_session_that_is_over_changes_nothing() {
    let mut receiver = Receiver::new(RETRY, None);
    receiver.grant(10);
    let hello = |session| Frame {
        session,
        seq: 1,
        body: Body::Hello { device: "sim" },
    };
    receiver.receive(&hello(7));
    receiver.receive(&key_frame(1, &[1]));
    receiver.receive(&hello(8));
    receiver.receive(&Frame {
        session: 8,
        ..key_frame(1, &[2])
    });
    receiver.settle(Position { session: 7, seq: 1 });
    assert_eq!(receiver.position(), Some(Position { session: 8, seq: 0 }));
}

#[test]
fn a_host_without_room_is_sent_nothing() {
    let mut link = Link::new(1);
    link.receiver = Receiver::new(RETRY, None);
    link.run(50);
    assert_eq!(link.sender.counters().sent, 0);
    assert_eq!(link.sender.kept_blocks(), 8);
    link.receiver.grant(1);
    // The credit itself is lost: the device asks again.
    let mut lost = Vec::new();
    assert!(link.receiver.poll_transmit(link.now, &mut lost));
    link.run(20);
    assert_eq!(link.receiver.counters().beyond_window, 0);
    assert!(link.receiver.counters().blocks >= 1);
}

#[test]
fn a_credit_for_blocks_never_sent_is_refused() {
    let mut sender = Sender::new(SESSION, "sim", 8, RETRY).unwrap();
    sender.offer(block(1, &[1]), &[1]).unwrap();
    for (durable, received) in [(0, 1), (1, 0), (u64::MAX, u64::MAX)] {
        let credit = Credit {
            durable,
            received,
            window_blocks: 1,
            ..Credit::default()
        };
        sender.receive(
            Mono::default(),
            &Frame {
                session: SESSION.get(),
                seq: 0,
                body: Body::Credit(credit),
            },
        );
    }
    assert_eq!((sender.counters().refused, sender.kept_blocks()), (3, 1));
}

#[test]
fn impossible_numbers_from_a_device_are_refused() {
    let mut receiver = Receiver::new(RETRY, None);
    receiver.grant(1);
    for (session, seq) in [(0, 1), (7, 0), (7, u64::MAX)] {
        let frame = Frame {
            session,
            seq,
            body: Body::Hello { device: "sim" },
        };
        assert_eq!(receiver.receive(&frame), Event::Dropped);
    }
    assert_eq!(receiver.receive(&key_frame(u64::MAX, &[1])), Event::Dropped);
    assert_eq!(receiver.counters().refused, 3);
    assert_eq!(receiver.counters().foreign, 1);
}
