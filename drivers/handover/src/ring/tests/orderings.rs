//! Every pair of the ordering table, over all interleavings that loom finds. Weaken one of the
//! orderings and one of these fails.

use std::num::NonZeroU64;

use loom::{sync::Arc, thread};

use super::super::{memory::Memory, reach::Reach, *};
use crate::block::BlockHeader;

/// Two records.
const CAPACITY: usize = 128;
const GENERATION: u64 = 1;

fn ring() -> (Consumer, Producer) {
    let memory = Memory::model(CAPACITY);
    let consumer = Consumer::over(Reach::Sealed(memory.clone()), CAPACITY, GENERATION, 0).unwrap();
    let producer = Producer::over(memory, CAPACITY, GENERATION, NonZeroU64::MIN).unwrap();
    (consumer, producer)
}

fn block(number: u64) -> BlockHeader {
    BlockHeader {
        number,
        generated_at: None,
        key_bits: 64,
        qber_ppm: None,
    }
}

fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

#[test]
fn loom_what_is_read_is_what_was_written() {
    model(|| {
        let (mut consumer, mut producer) = ring();
        let writer = thread::spawn(move || {
            producer.write_block(&block(1), &[1; 8]).unwrap();
            producer.write_block(&block(2), &[2; 8]).unwrap();
        });
        let mut expected = 1;
        for _ in 0..2 {
            let mut key = [0; 8];
            if let Some(record) = consumer.read(&mut key).unwrap() {
                assert_eq!(record, Record::Block(block(expected)));
                assert_eq!(u64::from(key[7]), expected);
                expected += 1;
            }
        }
        writer.join().unwrap();
    });
}

#[test]
fn loom_room_is_wiped_before_it_is_written_again() {
    model(|| {
        let (mut consumer, mut producer) = ring();
        producer.write_block(&block(1), &[1; 8]).unwrap();
        producer.write_block(&block(2), &[2; 8]).unwrap();
        let reader = thread::spawn(move || {
            assert!(consumer.read(&mut [0; 8]).unwrap().is_some());
            consumer
        });
        // Takes the first record's room as soon as it is given back.
        let written = producer.write_block(&block(3), &[3; 8]).is_ok();
        let mut consumer = reader.join().unwrap();
        let mut key = [0; 8];
        assert_eq!(consumer.read(&mut key), Ok(Some(Record::Block(block(2)))));
        let last = written.then_some(Record::Block(block(3)));
        assert_eq!(consumer.read(&mut key), Ok(last));
    });
}

#[test]
fn loom_no_record_is_left_to_a_sleeper() {
    model(|| {
        let (mut consumer, mut producer) = ring();
        let woken = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let wake = woken.clone();
        let writer = thread::spawn(move || {
            let sleeps = producer.write_block(&block(1), &[1; 8]).unwrap();
            wake.store(sleeps, std::sync::atomic::Ordering::SeqCst);
        });
        let sleeps = consumer.prepare_wait();
        writer.join().unwrap();
        let woken = woken.load(std::sync::atomic::Ordering::SeqCst);
        assert!(!sleeps || woken, "asleep over a record");
    });
}

#[test]
fn loom_a_durable_number_of_another_session_is_not_believed() {
    model(|| {
        let (mut consumer, producer) = ring();
        let before = NonZeroU64::new(7).unwrap();
        consumer.begin_session(before, Some(9));
        let reader = thread::spawn(move || {
            consumer.begin_session(NonZeroU64::MIN, None);
            consumer
        });
        assert_eq!(producer.durable(), None);
        drop(reader.join().unwrap());
    });
}
