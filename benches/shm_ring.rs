//! `shm_ring`: records of 4 KiB from one process to another.
//!
//! Question: what does a hand-over through shared memory cost beyond the copies? `memcpy` copies in
//! and out of a buffer as large as the ring, in one thread. `pipe` is what one would use else: frames
//! with a CRC, written and read 64 KiB at a time, through the largest pipe that a user may have.
//! `ring` is the hardware's half in a child process and the bridge's in this one: validated copies,
//! CRC, and wiping of what was read.
//!
//! Records of 4 KiB: what fast modules hand over at a time, and where the cost of a record still
//! shows. The ring of 4 MiB is the default.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod support;

use std::{
    hint::black_box,
    io::{self, BufRead, BufReader, Read, Write},
    num::NonZeroU64,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput};
use nix::fcntl::{FcntlArg, fcntl};
use qkd_handover::{
    block::BlockHeader,
    ring::{Consumer, Producer, Record, WriteError, greeting::Greeting},
};
use support::{fixed_amounts, is_trial, noise};

const RECORD_BYTES: usize = 4 << 10;

const KEY_BITS: u32 = 8 * (4 << 10);

const RING_BYTES: usize = 4 << 20;

/// A CRC before each record.
const FRAME_BYTES: usize = 4 + RECORD_BYTES;

/// Frames in one write: as much as a pipe passes on at a time.
const FRAMES_AT_ONCE: usize = 16;

const GENERATION: u64 = 1;

/// Different keys: what a child repeats.
const KEYS: usize = 1024;

fn amount_bytes() -> usize {
    if is_trial() { 4 << 20 } else { 256 << 20 }
}

fn records() -> usize {
    amount_bytes() / RECORD_BYTES
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "--pipe", count] => return write_pipe(count.parse().unwrap()),
        [_, "--ring", count, memory] => return write_ring(count.parse().unwrap(), memory.as_ref()),
        _ => {}
    }
    let mut criterion = Criterion::default().configure_from_args();
    shm_ring(&mut criterion);
    criterion.final_summary();
}

fn shm_ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("shm_ring");
    fixed_amounts(&mut group);
    group.throughput(Throughput::Bytes(amount_bytes() as u64));
    for (name, run) in [
        ("memcpy", memcpy as fn(&[u8]) -> Duration),
        ("pipe", read_pipe),
        ("ring", read_ring),
    ] {
        let keys = keys();
        group.bench_function(name, |b| {
            b.iter_custom(|samples| (0..samples).map(|_| run(&keys)).sum());
        });
    }
    group.finish();
}

fn keys() -> Vec<u8> {
    noise(KEYS * RECORD_BYTES, 1)
}

fn key(keys: &[u8], number: usize) -> &[u8] {
    &keys[number % KEYS * RECORD_BYTES..][..RECORD_BYTES]
}

fn memcpy(keys: &[u8]) -> Duration {
    let (mut ring, mut out) = (vec![0; RING_BYTES], vec![0; RECORD_BYTES]);
    let start = Instant::now();
    for number in 0..records() {
        let place = &mut ring[number * RECORD_BYTES % RING_BYTES..][..RECORD_BYTES];
        place.copy_from_slice(key(keys, number));
        out.copy_from_slice(black_box(place));
        black_box(&out);
    }
    let time = start.elapsed();
    assert_eq!(out, key(keys, records() - 1));
    time
}

/// A process of this program, ready to write.
struct Writer {
    child: Child,
    go: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Writer {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut this = Self {
            go: child.stdin.take().unwrap(),
            output: BufReader::with_capacity(1, child.stdout.take().unwrap()),
            child,
        };
        let mut ready = String::new();
        this.output.read_line(&mut ready).unwrap();
        this
    }

    fn go(&mut self) {
        self.go.write_all(b"g").unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the child: says that it is ready, and waits.
fn wait_for_go() -> impl Write {
    let mut output = io::stdout().lock();
    output.write_all(b"\n").unwrap();
    output.flush().unwrap();
    let _ = io::stdin().read_exact(&mut [0]);
    // Standard output has a buffer that would copy once more.
    std::fs::File::from(output.as_fd().try_clone_to_owned().unwrap())
}

fn write_pipe(count: usize) {
    let mut frames = Vec::new();
    let keys = keys();
    // The CRC is taken anew of every frame: a device's keys are new.
    let mut output = wait_for_go();
    for first in (0..count).step_by(FRAMES_AT_ONCE) {
        frames.clear();
        for number in first..count.min(first + FRAMES_AT_ONCE) {
            let key = key(&keys, number);
            frames.extend_from_slice(&crc32c::crc32c(key).to_le_bytes());
            frames.extend_from_slice(key);
        }
        output.write_all(&frames).unwrap();
    }
}

fn read_pipe(keys: &[u8]) -> Duration {
    let mut writer = Writer::start(&["--pipe", &records().to_string()]);
    let pipe = writer.output.get_ref().as_fd();
    // A user may have 1 MiB.
    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(1 << 20));
    let mut frames = vec![0; FRAMES_AT_ONCE * FRAME_BYTES];
    let mut left = records();
    let start = Instant::now();
    writer.go();
    while left > 0 {
        let count = left.min(FRAMES_AT_ONCE);
        let frames = &mut frames[..count * FRAME_BYTES];
        writer.output.get_mut().read_exact(frames).unwrap();
        for frame in frames.chunks(FRAME_BYTES) {
            let (crc, key) = frame.split_at(4);
            assert_eq!(crc32c::crc32c(key).to_le_bytes(), crc);
        }
        left -= count;
    }
    let time = start.elapsed();
    assert!(frames.ends_with(key(keys, records() - 1)));
    time
}

fn write_ring(count: usize, memory: &Path) {
    let keys = keys();
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .open(memory)
        .unwrap();
    let greeting = Greeting {
        generation: GENERATION,
        last_durable: None,
        session: 0,
    };
    let mut producer = Producer::attach(memory.as_fd(), &greeting, NonZeroU64::MIN).unwrap();
    let _output = wait_for_go();
    for number in 0..count {
        let header = BlockHeader {
            number: number as u64,
            generated_at: None,
            key_bits: KEY_BITS,
            qber_ppm: None,
        };
        while let Err(error) = producer.write_block(&header, key(&keys, number)) {
            assert!(matches!(error, WriteError::Full { .. }), "{error}");
            thread::yield_now();
        }
    }
}

fn read_ring(keys: &[u8]) -> Duration {
    let (mut consumer, memory) = Consumer::create(RING_BYTES, GENERATION, 0).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
    let mut writer = Writer::start(&["--ring", &records().to_string(), &path]);
    let mut out = vec![0; RECORD_BYTES];
    let mut read = 0;
    let start = Instant::now();
    writer.go();
    while read < records() {
        match consumer.read(&mut out).unwrap() {
            Some(Record::Block(header)) => {
                assert_eq!(header.number, read as u64);
                read += 1;
            }
            Some(other) => panic!("{other:?}"),
            None => thread::yield_now(),
        }
    }
    let time = start.elapsed();
    assert_eq!(out, key(keys, records() - 1));
    time
}
