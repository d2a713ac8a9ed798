//! The shared-memory ring, with a producer that scribbles.
//!
//! - Whatever is written to the memory (header, positions, records behind a right check sequence,
//!   anything anywhere), the consumer reads valid records, refuses one, or stops for good.
//! - A record of the honest producer that nobody touched comes out as it went in.
//! - After any error but a short buffer, the caller's buffer holds no key; a fault is latched.
//! - What was read is wiped from the memory, and all of it when the consumer ends.

use std::{
    collections::VecDeque,
    fs::File,
    num::NonZeroU64,
    os::{fd::AsFd, unix::fs::FileExt},
};

use qkd_handover::{
    block::BlockHeader,
    ring::{
        Consumer, HEADER_BYTES, MIN_CAPACITY_BYTES, Producer, ReadError, Record, greeting::Greeting,
    },
    status::Status,
};
use qkd_keyfile::units::bytes_for_bits;

use super::input::{Input, crc32c};

const GENERATION: u64 = 5;
const CAPACITY_BYTES: usize = MIN_CAPACITY_BYTES;

/// See the module.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let (consumer, fd) = Consumer::create(CAPACITY_BYTES, GENERATION, 9).unwrap();
    let greeting = Greeting {
        generation: GENERATION,
        last_durable: None,
        session: 0,
    };
    let producer = Producer::attach(fd.as_fd(), &greeting, NonZeroU64::MIN).unwrap();
    let mut ring = Ring {
        consumer: Some(consumer),
        producer,
        memory: File::from(fd),
        sent: VecDeque::new(),
        touched: false,
        stopped: None,
    };
    while !input.is_empty() {
        ring.step(&mut input);
    }
    // As many records as fit.
    for _ in 0..=CAPACITY_BYTES / 64 {
        ring.read(CAPACITY_BYTES);
    }
    ring.consumer = None;
    let mut data = vec![0xa5; CAPACITY_BYTES];
    ring.memory
        .read_exact_at(&mut data, HEADER_BYTES as u64)
        .unwrap();
    assert!(
        data.iter().all(|&byte| byte == 0),
        "key is left in the ring"
    );
}

struct Ring {
    consumer: Option<Consumer>,
    producer: Producer,
    memory: File,
    /// What the honest producer wrote and the consumer has not read.
    sent: VecDeque<(Record, Vec<u8>)>,
    /// Somebody else wrote to the memory.
    touched: bool,
    stopped: Option<ReadError>,
}

impl Ring {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => self.write_block(input),
            1 => {
                let status = Status {
                    qber_ppm: Some(input.u32()),
                    ..Status::default()
                };
                if self.producer.write_status(&status).is_ok() {
                    self.sent.push_back((Record::Status(status), Vec::new()));
                }
            }
            2 => {
                if self.producer.write_end().is_ok() {
                    self.sent.push_back((Record::End, Vec::new()));
                }
            }
            3 => {
                let len = usize::from(input.byte());
                self.read(len);
            }
            4 => {
                let (at, bytes) = (u64::from(input.u16()), input.short());
                self.poke(at % (HEADER_BYTES + CAPACITY_BYTES) as u64, bytes);
            }
            5 => {
                // A word of the producer's: write position, heartbeat, state, dropped blocks.
                let (word, value) = (u64::from(input.byte() % 4), input.u64());
                self.poke(0x80 + 8 * word, &value.to_le_bytes());
            }
            6 => self.forge(input),
            _ => {
                if let Some(consumer) = &mut self.consumer {
                    consumer.prepare_wait();
                    let _ = consumer.producer_status();
                    consumer.set_durable(u64::from(input.byte()));
                }
            }
        }
    }

    fn write_block(&mut self, input: &mut Input<'_>) {
        let key_bits = u32::from(input.u16() % 8192);
        let header = BlockHeader {
            number: u64::from(input.byte()),
            generated_at: None,
            key_bits,
            qber_ppm: Some(u32::from(input.byte())),
        };
        let fill = input.byte();
        let mut key = vec![fill; bytes_for_bits(key_bits)];
        if let (Some(last), 1..) = (key.last_mut(), key_bits % 8) {
            *last &= 0xff << (8 - key_bits % 8);
        }
        if self.producer.write_block(&header, &key).is_ok() {
            self.sent.push_back((Record::Block(header), key));
        }
    }

    fn read(&mut self, len_bytes: usize) {
        let Some(consumer) = &mut self.consumer else {
            return;
        };
        let mut out = vec![0; len_bytes];
        let read = consumer.read(&mut out);
        if let Some(stopped) = &self.stopped {
            assert_eq!(read.as_ref(), Err(stopped), "a fault is latched");
        }
        match read {
            Ok(None) => assert!(self.touched || self.sent.is_empty()),
            Ok(Some(record)) => {
                let key_bytes = match record {
                    Record::Block(header) => bytes_for_bits(header.key_bits),
                    Record::Status(_) | Record::End => 0,
                };
                if let Record::Block(header) = record {
                    assert!(header.encode(&out[..key_bytes]).is_ok());
                }
                let sent = self.sent.pop_front();
                if !self.touched {
                    assert_eq!(sent, Some((record, out[..key_bytes].to_vec())));
                }
            }
            Err(ReadError::BufferTooSmall { have, need }) => {
                assert!(have == len_bytes && need > have)
            }
            Err(error) => {
                assert!(self.touched, "{error}");
                assert!(
                    out.iter().all(|&byte| byte == 0),
                    "a refused record's key is left"
                );
                if matches!(error, ReadError::Corrupt(_)) {
                    self.stopped = Some(error);
                }
            }
        }
    }

    fn poke(&mut self, at: u64, bytes: &[u8]) {
        let room = (HEADER_BYTES + CAPACITY_BYTES) as u64 - at;
        let len = bytes.len().min(usize::try_from(room).unwrap());
        self.memory.write_all_at(&bytes[..len], at).unwrap();
        self.touched = true;
    }

    /// A record with any kind, length and payload, in order and behind a right check sequence.
    fn forge(&mut self, input: &mut Input<'_>) {
        let word = |at: u64| {
            let mut word = [0; 8];
            self.memory.read_exact_at(&mut word, at).unwrap();
            u64::from_le_bytes(word)
        };
        let read_pos = word(0x100);
        let (kind, more) = (u32::from(input.byte() % 5), u32::from(input.byte() / 64));
        let (seq, payload) = (u64::from(input.byte()), input.long());
        let len = u32::try_from(payload.len()).unwrap() + more;
        let mut record = Vec::new();
        record.extend_from_slice(&len.to_le_bytes());
        record.extend_from_slice(&kind.to_le_bytes());
        record.extend_from_slice(&seq.to_le_bytes());
        record.extend_from_slice(&GENERATION.to_le_bytes());
        let crc = crc32c(&[&record[..], payload].concat());
        record.extend_from_slice(&u64::from(crc).to_le_bytes());
        record.extend_from_slice(payload);
        record.resize(record.len().next_multiple_of(64), 0);
        let start = read_pos % CAPACITY_BYTES as u64;
        let to_end = CAPACITY_BYTES - usize::try_from(start).unwrap();
        let (front, back) = record.split_at(record.len().min(to_end));
        self.poke(HEADER_BYTES as u64 + start, front);
        self.poke(HEADER_BYTES as u64, back);
        let write_pos = read_pos.wrapping_add(record.len() as u64);
        self.poke(0x80, &write_pos.to_le_bytes());
    }
}
