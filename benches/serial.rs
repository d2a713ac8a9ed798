//! `serial`: key blocks over a pseudo-terminal.
//!
//! Question: what does the driver cost beyond reading the line? `raw_pty` reads the same number of
//! bytes, 64 KiB at a time, and throws them away. `driver` is the real exchange with the device's half
//! in another thread: frames found (COBS), checked (CRC), acknowledged, key delivered.
//!
//! Blocks of 8 KiB: what the simulated devices send, some 0.1 s of a fast module's key.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod support;

use std::{
    num::NonZeroU32,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qkd_drivers::{DriverConfig, Event, SerialConfig, Settlement, next_event};
use qkd_handover::{
    block::BlockHeader,
    serial::{Decoder, Sender},
};
use qkd_keyfile::Mono;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, fcntl_setfl, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};
use support::{fixed_amounts, is_trial, noise};

const BLOCK_BYTES: usize = 8 << 10;

const KEY_BITS: u32 = 8 * (8 << 10);

/// What is read or written at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Time after which the device sends again: longer than a sample, for nothing is lost here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Fewer than elsewhere: a pseudo-terminal is slow.
fn amount_bytes() -> usize {
    if is_trial() { 1 << 20 } else { 64 << 20 }
}

fn serial(c: &mut Criterion) {
    let mut group = c.benchmark_group("serial");
    fixed_amounts(&mut group);
    group.throughput(Throughput::Bytes(amount_bytes() as u64));
    let key = noise(amount_bytes(), 1);
    group.bench_function("raw_pty", |b| {
        b.iter_custom(|samples| (0..samples).map(|_| raw_pty(&key)).sum());
    });
    group.bench_function("driver", |b| {
        b.iter_custom(|samples| (0..samples).map(|_| driver(&key)).sum());
    });
    group.finish();
}

fn raw_pty(key: &[u8]) -> Duration {
    let (master, host) = pair();
    let host = open_raw(&host);
    // As the driver and its device do: neither end waits in a read or a write.
    for end in [&master, &host] {
        fcntl_setfl(end, OFlags::NONBLOCK).unwrap();
    }
    thread::scope(|scope| {
        let start = Instant::now();
        scope.spawn(|| {
            let mut at = 0;
            while at < key.len() {
                let piece = &key[at..key.len().min(at + PIECE_BYTES)];
                at += rustix::io::write(&master, piece).unwrap_or(0);
                wait_for(&master, PollFlags::OUT);
            }
        });
        let mut piece = vec![0; PIECE_BYTES];
        let mut at = 0;
        while at < key.len() {
            wait_for(&host, PollFlags::IN);
            let read = rustix::io::read(&host, &mut piece[..]).unwrap_or(0);
            // Enough to see that nothing is lost, and next to nothing to do.
            assert!(read == 0 || piece[0] == key[at]);
            at += read;
        }
        start.elapsed()
    })
}

fn driver(key: &[u8]) -> Duration {
    let (master, host) = pair();
    drop(open_raw(&host));
    fcntl_setfl(&master, OFlags::NONBLOCK).unwrap();
    let session = NonZeroU32::new(1).unwrap();
    let mut sender = Sender::new(session, "tx-1", usize::MAX, PATIENCE).unwrap();
    for (number, key) in (0..).zip(key.chunks(BLOCK_BYTES)) {
        let header = BlockHeader {
            number,
            generated_at: None,
            key_bits: KEY_BITS,
            qber_ppm: None,
        };
        sender.offer(header, key).unwrap();
    }
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let config = SerialConfig {
                rts_cts: false,
                ..SerialConfig::new(host)
            };
            let mut source = DriverConfig::Serial(config).open().unwrap();
            let mut block = vec![0; source.max_block_bytes()];
            let start = Instant::now();
            scope.spawn(|| talk(&master, sender, &is_over));
            source.grant(u32::try_from(key.len() / BLOCK_BYTES).unwrap());
            for expected in key.chunks(BLOCK_BYTES) {
                let delivered = loop {
                    match next_event(&mut *source, &mut block).await.unwrap() {
                        Event::Key(delivered) => break delivered,
                        Event::Attached { .. } => {}
                        other => panic!("{other:?}"),
                    }
                };
                assert_eq!(block[0], expected[0]);
                source.settle(&delivered.metadata.qkd_key_id, Settlement::Stored);
            }
            let time = start.elapsed();
            // ORDERING: Relaxed; the word stands by itself.
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(block[..BLOCK_BYTES], key[key.len() - BLOCK_BYTES..]);
            time
        })
    })
}

/// The device: writes what its half of the exchange has to say.
fn talk(master: &OwnedFd, mut sender: Sender, is_over: &AtomicBool) {
    let began = Instant::now();
    let mut decoder = Decoder::new();
    let (mut output, mut input) = (Vec::new(), vec![0; PIECE_BYTES]);
    let mut at = 0;
    // ORDERING: Relaxed; the word stands by itself.
    while !is_over.load(Ordering::Relaxed) {
        let now = Mono(began.elapsed());
        if at == output.len() {
            output.clear();
            at = 0;
            while output.len() < PIECE_BYTES && sender.poll_transmit(now, &mut output) {}
        }
        at += rustix::io::write(master, &output[at..]).unwrap_or(0);
        let read = rustix::io::read(master, &mut input[..]).unwrap_or(0);
        let mut unread = &input[..read];
        while let Some(frame) = decoder.next_frame(&mut unread) {
            sender.receive(now, &frame.unwrap());
        }
        let out = match at == output.len() {
            true => PollFlags::empty(),
            false => PollFlags::OUT,
        };
        if read == 0 {
            wait_for(master, PollFlags::IN | out);
        }
    }
}

/// A millisecond at most.
fn wait_for(end: &OwnedFd, what: PollFlags) {
    let millisecond = Timespec {
        tv_sec: 0,
        tv_nsec: 1_000_000,
    };
    let _ = poll(&mut [PollFd::new(end, what)], Some(&millisecond));
}

/// A raw pseudo-terminal: the device's end, and the path of the host's.
fn pair() -> (OwnedFd, PathBuf) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    (master, PathBuf::from(name.to_str().unwrap()))
}

fn open_raw(path: &Path) -> OwnedFd {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let host = open(path, flags, Mode::empty()).unwrap();
    let mut modes = tcgetattr(&host).unwrap();
    modes.make_raw();
    tcsetattr(host.as_fd(), OptionalActions::Now, &modes).unwrap();
    host
}

criterion_group!(benches, serial);
criterion_main!(benches);
