//! A ring in a file, which its producer may cut off.

use std::{fs::File, io::ErrorKind, num::NonZeroU64, os::fd::AsFd, os::unix::fs::FileExt};

use super::super::*;
use crate::block::BlockHeader;

const CAPACITY: usize = 8192;
const SESSION: NonZeroU64 = NonZeroU64::new(0x5e).unwrap();

fn ring() -> (Consumer, File) {
    let file = tempfile::tempfile().unwrap();
    let consumer = Consumer::in_file(file.try_clone().unwrap(), CAPACITY, 9, 0xd0).unwrap();
    (consumer, file)
}

fn attach(file: &File) -> Producer {
    Producer::attach_file(file.as_fd(), SESSION).unwrap().0
}

fn block(number: u64) -> (BlockHeader, Vec<u8>) {
    let key = vec![number.to_le_bytes()[0] | 1; 700];
    let header = BlockHeader {
        number,
        generated_at: None,
        key_bits: 5600,
        qber_ppm: None,
    };
    (header, key)
}

fn write(producer: &mut Producer, number: u64) -> bool {
    let (header, key) = block(number);
    producer.write_block(&header, &key).unwrap()
}

fn assert_reads(consumer: &mut Consumer, number: u64) {
    let (header, key) = block(number);
    let mut out = [0; 700];
    assert_eq!(consumer.read(&mut out), Ok(Some(Record::Block(header))));
    assert!(out[..] == key);
}

fn cut_off() -> ReadError {
    let error = ErrorKind::UnexpectedEof;
    ReadError::Corrupt(RingFault::Memory { error })
}

#[test]
fn records_go_round_and_round_and_leave_nothing_behind() {
    let (mut consumer, file) = ring();
    let mut producer = attach(&file);
    for number in 0..100 {
        write(&mut producer, number);
        assert_reads(&mut consumer, number);
    }
    assert_eq!(producer.is_drained(), Ok(true));
    assert_eq!(consumer.read(&mut []), Ok(None));
    assert!(consumer.prepare_wait());
    assert!(write(&mut producer, 100), "it is told that nobody reads");
    drop(consumer);
    let mut data = [1; CAPACITY];
    file.read_exact_at(&mut data, HEADER_BYTES as u64).unwrap();
    assert_eq!(data, [0; CAPACITY]);
}

#[test]
fn the_header_greets_and_says_what_is_durable() {
    let (mut consumer, file) = ring();
    consumer.begin_session(SESSION, Some(41));
    let (mut producer, greeting) = Producer::attach_file(file.as_fd(), SESSION).unwrap();
    assert_eq!(
        (greeting.generation, greeting.durable_in(SESSION)),
        (9, Some(41))
    );
    consumer.set_durable(42);
    assert_eq!(producer.durable(), Some(42));
    // The kernel was in the middle of a word.
    for at in [at::DURABLE, at::DURABLE_SESSION, at::READ_POS] {
        file.write_all_at(&[0x7f], (at + 3) as u64).unwrap();
        assert_eq!(producer.is_drained(), Ok(true), "what was seen before");
        assert!(at == at::READ_POS || producer.durable().is_none());
        file.write_all_at(&[0], (at + 3) as u64).unwrap();
        assert_eq!(producer.durable(), Some(42));
    }
    assert_eq!(
        Producer::attach_file(file.as_fd(), SESSION).unwrap_err(),
        AttachError::Header { field: "session" },
        "a ring is used once"
    );
}

#[test]
fn a_file_that_is_cut_off_ends_the_ring_whatever_the_consumer_does_next() {
    type Looks = fn(&mut Consumer) -> Result<(), ReadError>;
    let looks: [Looks; 4] = [
        |consumer| consumer.read(&mut [0; 700]).map(drop),
        |consumer| consumer.producer_status().map(drop),
        |consumer| {
            assert!(!consumer.prepare_wait(), "asleep over a fault");
            Ok(())
        },
        |consumer| consumer.session().map(drop),
    ];
    for len in [0, 0x90, HEADER_BYTES as u64 + 700] {
        for (i, look) in looks.into_iter().enumerate() {
            let (mut consumer, file) = ring();
            let mut producer = attach(&file);
            write(&mut producer, 0);
            write(&mut producer, 1);
            // Without this, some would look no further than what they know.
            assert_reads(&mut consumer, 0);
            drop(producer);
            file.set_len(len).unwrap();
            if let Err(error) = look(&mut consumer) {
                assert_eq!(error, cut_off(), "{len} {i}");
            }
            consumer.set_durable(0);
            let mut out = [1; 700];
            let error = consumer.read(&mut out).unwrap_err();
            assert_eq!(error, cut_off(), "{len} {i}");
            // Wiped, or not touched because the fault was known.
            assert!([[0; 700], [1; 700]].contains(&out), "{len} {i}");
        }
    }
}

#[test]
fn a_consumer_that_ends_does_not_make_a_file_longer_that_was_cut_off() {
    let (consumer, file) = ring();
    file.set_len(100).unwrap();
    drop(consumer);
    assert_eq!(file.metadata().unwrap().len(), 100);
}

#[test]
fn a_file_that_was_cut_off_and_made_long_again_ends_the_ring() {
    let (mut consumer, file) = ring();
    let mut producer = attach(&file);
    write(&mut producer, 0);
    write(&mut producer, 1);
    assert_reads(&mut consumer, 0);
    drop(producer);
    file.set_len(0).unwrap();
    file.set_len((HEADER_BYTES + CAPACITY) as u64).unwrap();
    let read = consumer.read(&mut [0; 700]);
    assert!(matches!(read, Err(ReadError::Corrupt(_))), "{read:?}");
}
