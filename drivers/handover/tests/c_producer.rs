//! The C header: a producer in C, in a process of its own, against the consumer.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    num::NonZeroU64,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use qkd_handover::{
    block::BlockHeader,
    ring::{Consumer, Record, greeting::Greeting},
    status::ModuleState,
};
use qkd_keyfile::UnixTime;

const BLOCKS: u64 = 2000;

const SESSION: NonZeroU64 = NonZeroU64::new(0x5e55).unwrap();

/// Builds the C producer; `None` on a machine without a C compiler.
fn build(directory: &Path) -> Option<std::path::PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = directory.join("producer");
    let status = Command::new("cc")
        .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(here.join("include"))
        .arg("-o")
        .arg(&program)
        .arg(here.join("tests/producer.c"))
        .status()
        .ok()?;
    assert!(status.success(), "the C producer does not compile");
    Some(program)
}

fn next(consumer: &mut Consumer, key: &mut [u8], child: &mut Child) -> Record {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(record) = consumer.read(key).unwrap() {
            return record;
        }
        assert_eq!(child.try_wait().unwrap(), None, "the producer is gone");
        assert!(Instant::now() < patience, "no record comes");
        std::thread::yield_now();
    }
}

#[test]
fn a_producer_in_c_is_understood() {
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = build(directory.path()) else {
        println!("no C compiler here");
        return;
    };
    let (mut consumer, memory) = Consumer::create(1 << 14, 7, 0).unwrap();
    let greeting = Greeting {
        generation: 7,
        last_durable: None,
        session: 0,
    };
    let text: String = (greeting.encode().iter())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut child = Command::new(program)
        .arg(text)
        .stdin(memory)
        .spawn()
        .unwrap();

    let mut key = [0; 512];
    consumer.begin_session(SESSION, None);
    let Record::Status(status) = next(&mut consumer, &mut key, &mut child) else {
        panic!("a status comes first");
    };
    assert_eq!(status.state, Some(ModuleState::Running));
    assert_eq!(consumer.session(), Ok(Some(SESSION)));
    assert_eq!(consumer.producer_status().unwrap().heartbeat_ns, 42);
    for number in 0..BLOCKS {
        let key_bytes = number % 400;
        let header = BlockHeader {
            number,
            generated_at: Some(UnixTime(-1)),
            key_bits: u32::try_from(8 * key_bytes).unwrap(),
            qber_ppm: None,
        };
        assert_eq!(
            next(&mut consumer, &mut key, &mut child),
            Record::Block(header)
        );
        let byte = number.to_le_bytes()[0];
        assert!(
            key[..usize::try_from(key_bytes).unwrap()]
                .iter()
                .all(|&b| b == byte)
        );
    }
    assert_eq!(next(&mut consumer, &mut key, &mut child), Record::End);
    consumer.set_durable(BLOCKS - 1);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
