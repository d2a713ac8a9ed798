//! Both halves over one memory, a producer that breaks every rule, and the orderings under loom.

#[cfg(not(loom))]
mod in_file;
#[cfg(loom)]
mod orderings;

#[cfg(not(loom))]
mod mapped {
    use std::{num::NonZeroU64, os::fd::AsFd};

    use proptest::prelude::*;

    use super::super::{greeting::Greeting, memory::Memory, *};
    use crate::{
        block::{BlockError, BlockHeader},
        status::{ModuleState, Status},
    };

    const CAPACITY: usize = 8192;
    const GENERATION: u64 = 9;
    const SESSION: NonZeroU64 = NonZeroU64::new(0x5e).unwrap();

    fn ring() -> (Consumer, Producer, Memory) {
        let (consumer, fd) = Consumer::create(CAPACITY, GENERATION, 0xd0).unwrap();
        let greeting = Greeting {
            generation: GENERATION,
            last_durable: None,
            session: 0,
        };
        let producer = Producer::attach(fd.as_fd(), &greeting, SESSION).unwrap();
        let (memory, capacity) = Memory::open(fd.as_fd()).unwrap();
        assert_eq!(capacity, CAPACITY);
        (consumer, producer, memory)
    }

    fn block(number: u64, key: &[u8]) -> BlockHeader {
        BlockHeader {
            number,
            generated_at: None,
            key_bits: u32::try_from(key.len() * 8).unwrap(),
            qber_ppm: None,
        }
    }

    fn word(memory: &Memory, offset: usize) -> &sync::AtomicU64 {
        match offset.checked_sub(HEADER_BYTES) {
            None => memory.word(offset),
            Some(offset) => &memory.data(CAPACITY / 8)[offset / 8],
        }
    }

    fn set(memory: &Memory, offset: usize, value: u64) {
        word(memory, offset).store(value, sync::Ordering::SeqCst);
    }

    fn get(memory: &Memory, offset: usize) -> u64 {
        word(memory, offset).load(sync::Ordering::SeqCst)
    }

    #[test]
    fn records_arrive_in_order_and_leave_nothing_behind() {
        let (mut consumer, mut producer, memory) = ring();
        let status = Status {
            state: Some(ModuleState::Running),
            ..Status::default()
        };
        producer
            .write_block(&block(5, &[0xa5; 100]), &[0xa5; 100])
            .unwrap();
        producer.write_status(&status).unwrap();
        producer.write_status(&Status::default()).unwrap();
        producer.write_block(&block(6, &[]), &[]).unwrap();
        producer.write_end().unwrap();
        assert_eq!(producer.is_drained(), Ok(false));

        let mut key = [0; 200];
        let header = block(5, &[0; 100]);
        assert_eq!(consumer.read(&mut key), Ok(Some(Record::Block(header))));
        assert_eq!(key[..100], [0xa5; 100]);
        assert_eq!(consumer.read(&mut key), Ok(Some(Record::Status(status))));
        let silent = Record::Status(Status::default());
        assert_eq!(consumer.read(&mut key), Ok(Some(silent)));
        assert_eq!(
            consumer.read(&mut key),
            Ok(Some(Record::Block(block(6, &[]))))
        );
        assert_eq!(consumer.read(&mut key), Ok(Some(Record::End)));
        assert_eq!(consumer.read(&mut key), Ok(None));
        assert_eq!(producer.is_drained(), Ok(true));
        for place in (HEADER_BYTES..HEADER_BYTES + CAPACITY).step_by(8) {
            assert_eq!(get(&memory, place), 0, "key left at {place:#x}");
        }
    }

    #[test]
    fn the_header_has_the_documented_bytes() {
        let (mut consumer, mut producer, memory) = ring();
        consumer.begin_session(SESSION, Some(77));
        producer.beat(11, Some(ModuleState::Fault), 12);
        assert!(consumer.prepare_wait());
        let mut bytes = [0; 0x188];
        for (i, word) in bytes.chunks_mut(8).enumerate() {
            word.copy_from_slice(&get(&memory, 8 * i).to_le_bytes());
        }
        let mut expected = [0; 0x188];
        expected[..8].copy_from_slice(b"QKDRING1");
        for (at, byte) in [
            (0x008, 1),
            (0x00d, 0x10),
            (0x011, 0x20),
            (0x018, 9),
            (0x020, 0xd0),
            (0x088, 11),
            (0x090, 3),
            (0x098, 12),
            (0x0a0, 0x5e),
            (0x110, 77),
            (0x118, 0x5e),
            (0x180, 1),
        ] {
            expected[at] = byte;
        }
        assert_eq!(bytes, expected);
        assert_eq!(producer.durable(), Some(77));
        assert_eq!(
            consumer.producer_status(),
            Ok(ProducerStatus {
                heartbeat_ns: 11,
                state: Some(ModuleState::Fault),
                dropped_blocks: 12
            })
        );
    }

    #[test]
    fn a_full_ring_takes_nothing_until_something_was_read() {
        let (mut consumer, mut producer, _) = ring();
        let key = [1; 2000];
        let header = block(1, &key);
        for _ in 0..3 {
            producer.write_block(&header, &key).unwrap();
        }
        assert_eq!(
            producer.write_block(&header, &key),
            Err(WriteError::Full {
                need_bytes: 2112,
                free_bytes: 8192 - 3 * 2112
            })
        );
        consumer.read(&mut [0; 2000]).unwrap().unwrap();
        producer.write_block(&header, &key).unwrap();
        let long = [1; CAPACITY];
        assert_eq!(
            producer.write_block(&block(2, &long), &long),
            Err(WriteError::TooLong {
                need_bytes: 8256,
                capacity_bytes: CAPACITY
            })
        );
    }

    #[test]
    fn the_consumer_sleeps_only_when_there_is_nothing_and_is_woken() {
        let (mut consumer, mut producer, _) = ring();
        assert_eq!(producer.write_end(), Ok(false));
        assert!(!consumer.prepare_wait());
        consumer.read(&mut []).unwrap().unwrap();
        assert!(consumer.prepare_wait());
        assert_eq!(producer.write_end(), Ok(true));
        consumer.read(&mut []).unwrap().unwrap();
        assert_eq!(producer.write_end(), Ok(false));
    }

    #[test]
    fn a_buffer_that_is_too_small_costs_nothing() {
        let (mut consumer, mut producer, _) = ring();
        producer.write_block(&block(1, &[7; 9]), &[7; 9]).unwrap();
        assert_eq!(
            consumer.read(&mut [0; 8]),
            Err(ReadError::BufferTooSmall { have: 8, need: 9 })
        );
        let mut key = [0; 9];
        assert!(consumer.read(&mut key).unwrap().is_some());
        assert_eq!(key, [7; 9]);
    }

    #[test]
    fn a_write_position_that_no_producer_can_have_ends_the_ring() {
        for position in [32, CAPACITY as u64 + 64, u64::MAX, u64::MAX - 63, 1 << 63] {
            let (mut consumer, _, memory) = ring();
            set(&memory, at::WRITE_POS, position);
            let error = consumer.read(&mut [0; 64]).unwrap_err();
            assert!(
                matches!(
                    error,
                    ReadError::Corrupt(RingFault::WritePosition { write_pos, .. })
                        if write_pos == position
                ),
                "{error:?}"
            );
            assert!(!consumer.prepare_wait(), "asleep over a fault");
            // Latched, even when the position is put right again.
            set(&memory, at::WRITE_POS, 0);
            assert_eq!(consumer.read(&mut [0; 64]), Err(error));
        }
    }

    #[test]
    fn a_write_position_that_goes_back_ends_the_ring() {
        let (mut consumer, mut producer, memory) = ring();
        producer.write_end().unwrap();
        producer.write_end().unwrap();
        consumer.read(&mut []).unwrap().unwrap();
        set(&memory, at::WRITE_POS, 64);
        // What was there when the consumer looked is read.
        consumer.read(&mut []).unwrap().unwrap();
        assert!(matches!(
            consumer.read(&mut []),
            Err(ReadError::Corrupt(RingFault::WritePosition {
                seen: 128,
                ..
            }))
        ));
    }

    #[test]
    fn a_damaged_record_ends_the_ring_and_gives_no_key() {
        // Offset of a word in the record, what to flip there, what is found.
        type IsExpected = fn(RingFault) -> bool;
        let cases: [(usize, u64, IsExpected); 10] = [
            (0, 0xffff_ffff, |f| matches!(f, RingFault::Length { .. })),
            (0, 100, |f| matches!(f, RingFault::Length { len: 0, .. })),
            (0, 1 << 31, |f| matches!(f, RingFault::Length { .. })),
            (0, 128, |f| matches!(f, RingFault::Length { len: 228, .. })),
            (0, 1, |f| matches!(f, RingFault::Checksum { .. })),
            (0, 8 << 32, |f| matches!(f, RingFault::Kind { kind: 9, .. })),
            (8, 1, |f| {
                matches!(f, RingFault::Sequence { got: 1, want: 0 })
            }),
            (16, 1, |f| {
                matches!(f, RingFault::Generation { got: 8, want: 9 })
            }),
            (24, 1, |f| matches!(f, RingFault::Checksum { .. })),
            (56, 1, |f| matches!(f, RingFault::Checksum { .. })),
        ];
        for (i, (offset, flip, is_expected)) in cases.into_iter().enumerate() {
            let (mut consumer, mut producer, memory) = ring();
            producer.write_block(&block(1, &[7; 76]), &[7; 76]).unwrap();
            let place = HEADER_BYTES + offset;
            set(&memory, place, get(&memory, place) ^ flip);
            let mut key = [1; 100];
            let Err(ReadError::Corrupt(fault)) = consumer.read(&mut key) else {
                panic!("case {i} went unnoticed");
            };
            assert!(is_expected(fault), "case {i}: {fault:?}");
            assert_eq!(key, [0; 100]);
            assert_eq!(consumer.read(&mut key), Err(ReadError::Corrupt(fault)));
        }
    }

    #[test]
    fn an_intact_record_with_an_impossible_block_is_dropped_alone() {
        let (mut consumer, mut producer, memory) = ring();
        producer.write_block(&block(1, &[7; 8]), &[7; 8]).unwrap();
        producer.write_block(&block(2, &[8; 8]), &[8; 8]).unwrap();
        // 63 bits where there are 64, with the check sequence to match.
        let place = HEADER_BYTES + RECORD_HEADER_BYTES + 16;
        set(&memory, place, get(&memory, place) & !0xffff_ffff | 63);
        let mut record = [0; 64];
        memory.copy_out(CAPACITY, 0, &mut record);
        let crc = crate::check::crc32c(&[&record[..24], &record[32..]]);
        set(&memory, HEADER_BYTES + 24, u64::from(crc));
        let mut key = [0; 8];
        assert_eq!(
            consumer.read(&mut key),
            Err(ReadError::Block(BlockError::Padding { number: 1 }))
        );
        assert_eq!(key, [0; 8]);
        assert_eq!(
            consumer.read(&mut key),
            Ok(Some(Record::Block(block(2, &key))))
        );
    }

    #[test]
    fn a_read_position_that_no_consumer_can_have_is_refused() {
        let (_consumer, mut producer, memory) = ring();
        producer.write_end().unwrap();
        set(&memory, at::READ_POS, 128);
        let error = WriteError::ReadPosition {
            read_pos: 128,
            write_pos: 64,
        };
        assert_eq!(producer.is_drained(), Err(error));
    }

    #[test]
    fn a_session_is_told_before_the_first_record_and_does_not_change() {
        let (mut consumer, mut producer, memory) = ring();
        assert_eq!(consumer.session(), Ok(Some(SESSION)));
        producer.write_end().unwrap();
        set(&memory, at::SESSION, 0x5f);
        let (got, want) = (0x5f, 0x5e);
        let fault = ReadError::Corrupt(RingFault::Session { got, want });
        assert_eq!(consumer.read(&mut []), Err(fault.clone()));
        assert_eq!(consumer.session(), Err(fault), "latched");

        let (mut consumer, mut producer, memory) = ring();
        set(&memory, at::SESSION, 0);
        assert_eq!(consumer.session(), Ok(None), "not told yet");
        producer.write_end().unwrap();
        let fault = ReadError::Corrupt(RingFault::Session { got: 0, want: 0 });
        assert_eq!(consumer.read(&mut []), Err(fault));
    }

    #[test]
    fn what_is_durable_is_said_to_the_session_that_it_belongs_to() {
        let (mut consumer, producer, _) = ring();
        assert_eq!(producer.durable(), None);
        let another = NonZeroU64::new(1).unwrap();
        consumer.begin_session(another, Some(4));
        consumer.set_durable(7);
        assert_eq!(
            producer.durable(),
            None,
            "those were blocks of another session"
        );
        consumer.begin_session(SESSION, None);
        assert_eq!(producer.durable(), None);
        consumer.set_durable(2);
        assert_eq!(producer.durable(), Some(2));
    }

    #[test]
    fn memory_that_is_not_sealed_or_not_this_ring_is_refused() {
        let (consumer, fd) = Consumer::create(CAPACITY, 1, 0).unwrap();
        let greeting = |generation| Greeting {
            generation,
            last_durable: None,
            session: 0,
        };
        assert_eq!(
            Producer::attach(fd.as_fd(), &greeting(2), SESSION).unwrap_err(),
            AttachError::Header {
                field: "generation"
            }
        );
        assert!(nix::unistd::ftruncate(&fd, 0).is_err());
        let file = tempfile::tempfile().unwrap();
        file.set_len(12_288).unwrap();
        assert_eq!(
            Producer::attach(file.as_fd(), &greeting(1), SESSION).unwrap_err(),
            AttachError::Map(MapError::NotSealed)
        );
        for capacity_bytes in [0, 2048, 4097, MAX_CAPACITY_BYTES * 2] {
            assert_eq!(
                Consumer::create(capacity_bytes, 1, 0).unwrap_err(),
                MapError::Capacity { capacity_bytes }
            );
        }
        drop(consumer);
    }

    #[test]
    fn two_threads_pass_many_blocks_through_a_small_ring() {
        let (mut consumer, mut producer, _) = ring();
        let key_of = |number: u64| {
            let byte = number.to_le_bytes()[0];
            vec![byte; usize::from(byte) * 7 % 1500]
        };
        let writer = std::thread::spawn(move || {
            for number in 0..20_000 {
                let key = key_of(number);
                while let Err(error) = producer.write_block(&block(number, &key), &key) {
                    assert!(matches!(error, WriteError::Full { .. }), "{error:?}");
                    std::thread::yield_now();
                }
            }
        });
        let mut out = [0; 1500];
        for number in 0..20_000 {
            let key = key_of(number);
            let record = loop {
                match consumer.read(&mut out).unwrap() {
                    Some(record) => break record,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!(record, Record::Block(block(number, &key)));
            assert_eq!(out[..key.len()], key);
        }
        writer.join().unwrap();
    }

    proptest! {
        #[test]
        fn the_ring_is_a_queue(lengths in prop::collection::vec((0..3000_usize, any::<bool>()), 1..60)) {
            let (mut consumer, mut producer, _) = ring();
            let mut oracle = std::collections::VecDeque::new();
            let mut out = vec![0; 3000];
            for (number, (len, read_after)) in lengths.into_iter().enumerate() {
                let key = vec![number.to_le_bytes()[0] | 1; len];
                let header = block(number as u64, &key);
                if producer.write_block(&header, &key).is_ok() {
                    oracle.push_back((header, key));
                } else {
                    prop_assert!(!oracle.is_empty());
                }
                if read_after && let Some((header, key)) = oracle.pop_front() {
                    prop_assert_eq!(consumer.read(&mut out), Ok(Some(Record::Block(header))));
                    prop_assert_eq!(&out[..key.len()], &key[..]);
                }
            }
            for (header, key) in oracle {
                prop_assert_eq!(consumer.read(&mut out), Ok(Some(Record::Block(header))));
                prop_assert_eq!(&out[..key.len()], &key[..]);
            }
            prop_assert_eq!(consumer.read(&mut out), Ok(None));
        }

        #[test]
        fn whatever_a_hostile_producer_writes_is_survived(
            words in prop::collection::vec((0..80_usize, prop_oneof![any::<u64>(), 0..200_u64]), 0..40),
            records in 0..3,
        ) {
            let (mut consumer, mut producer, memory) = ring();
            for number in 0..records {
                producer.write_block(&block(number.try_into().unwrap(), &[3; 70]), &[3; 70]).unwrap();
            }
            let mut key = [0; 5000];
            for (place, value) in words {
                // The producer's line and the first records.
                let offset = if place < 4 { at::WRITE_POS + 8 * place } else { HEADER_BYTES + 8 * (place - 4) };
                set(&memory, offset, value);
                for _ in 0..3 {
                    let before = consumer.read(&mut key);
                    if let Err(ReadError::Corrupt(_)) = before {
                        prop_assert_eq!(consumer.read(&mut key), before);
                    }
                }
            }
        }
    }
}
