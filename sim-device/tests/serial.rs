//! The device over a pseudo-terminal, against a host that comes, goes and forgets.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use qkd_handover::serial::{Decoder, Event, Position, Receiver};
use qkd_keyfile::Mono;
use qkd_sim_device::{
    FaultConfig, ModulePair, Pace, PairConfig, Role, SimConfig, Snapshot, Stats, TransportConfig,
    run, serial::SerialConfig,
};
use rustix::{
    fs::OFlags,
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

const BLOCKS: u64 = 120;

fn pair() -> PairConfig {
    PairConfig {
        qber_ppm: 31_000,
        first_number: 1,
        blocks: Some(BLOCKS),
        faults: FaultConfig {
            one_sided_per_million: 50_000,
            differing_per_million: 0,
            empty_per_million: 50_000,
            ..FaultConfig::default()
        },
        ..PairConfig::new("c3".repeat(32).parse().unwrap(), 20_001, Pace::Max)
    }
}

#[derive(Default)]
struct Host {
    durable: Vec<(u64, Vec<u8>)>,
    position: Option<Position>,
    sessions: u64,
    saw_status: bool,
}

impl Host {
    /// Opens the port, takes so many blocks or all up to the end, stores all but the last `forget`
    /// and closes the port, as a host that dies.
    fn live(&mut self, path: &Path, blocks: usize, forget: usize) {
        let mut port = open(path);
        let mut receiver = Receiver::new(Duration::from_millis(50), self.position);
        receiver.grant(20);
        let mut decoder = Decoder::new();
        let start = Instant::now();
        let (mut taken, mut has_ended) = (Vec::new(), false);
        while taken.len() < blocks && !has_ended {
            assert!(start.elapsed() < Duration::from_secs(60), "{receiver:?}");
            let mut bytes = [0; 4096];
            let count = match port.read(&mut bytes) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                    0
                }
                Err(error) => panic!("{error}"),
            };
            let mut input = &bytes[..count];
            while let Some(frame) = decoder.next_frame(&mut input) {
                let Ok(frame) = frame else { continue };
                match receiver.receive(&frame) {
                    Event::Block {
                        position,
                        header,
                        key,
                    } => {
                        taken.push((position, header.number, key.to_vec()));
                        receiver.grant(1);
                    }
                    Event::Hello { device, .. } => assert_eq!(device, "tx-sim"),
                    Event::Status(status) => {
                        assert_eq!(status.qber_ppm, Some(31_000));
                        self.saw_status = true;
                    }
                    Event::End { missing_blocks } => has_ended |= missing_blocks == 0,
                    Event::Dropped => {}
                }
                if forget == 0
                    && let Some((position, ..)) = taken.last()
                {
                    receiver.settle(*position);
                }
            }
            let now = Mono(start.elapsed());
            receiver.handle_timeout(now);
            send(&mut port, &mut receiver, now);
        }
        taken.truncate(taken.len().saturating_sub(forget));
        if let Some((position, ..)) = taken.last() {
            self.position = Some(*position);
            receiver.settle(*position);
            send(&mut port, &mut receiver, Mono(start.elapsed()));
        }
        self.durable
            .extend(taken.into_iter().map(|(_, number, key)| (number, key)));
        self.sessions += receiver.counters().sessions;
        assert_eq!(receiver.counters().missing, 0);
        // The last credit gets through before the line is cut.
        std::thread::sleep(Duration::from_millis(if forget == 0 { 500 } else { 0 }));
    }
}

fn send(port: &mut File, receiver: &mut Receiver, now: Mono) {
    let mut out = Vec::new();
    while receiver.poll_transmit(now, &mut out) {}
    port.write_all(&out).unwrap();
}

fn open(path: &Path) -> File {
    let patience = Instant::now() + Duration::from_secs(30);
    let flags = OFlags::NOCTTY | OFlags::NONBLOCK;
    loop {
        let port = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path);
        match port {
            Ok(port) => {
                let mut modes = tcgetattr(port.as_fd()).unwrap();
                modes.make_raw();
                tcsetattr(port.as_fd(), OptionalActions::Now, &modes).unwrap();
                return port;
            }
            Err(error) => assert!(Instant::now() < patience, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn play(pair: PairConfig, host: impl FnOnce(&Path)) -> Snapshot {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tty-sim");
    let config = SimConfig {
        role: Role::Transmitter,
        pair,
        transport: TransportConfig::Serial(SerialConfig {
            path: path.clone(),
            make_pty: true,
            baud: 3_000_000,
            device: "tx-sim".to_owned(),
            capacity_blocks: 32,
            retry_ms: 50,
        }),
    };
    let (stop, stats) = (AtomicBool::new(false), Stats::default());
    std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&config, &stop, &stats));
        host(&path);
        let patience = Instant::now() + Duration::from_secs(60);
        while !running.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        running.join().unwrap().unwrap();
    });
    assert!(!path.exists(), "the link stays");
    stats.snapshot()
}

#[test]
fn every_block_arrives_once_though_the_host_dies_twice() {
    let mut host = Host::default();
    let stats = play(pair(), |path| {
        // Once so fast that the device does not see the line go, once slowly.
        host.live(path, 30, 10);
        host.live(path, 25, 3);
        std::thread::sleep(Duration::from_millis(200));
        host.live(path, usize::MAX, 0);
    });
    let half = ModulePair::new(&pair()).unwrap().half(Role::Transmitter);
    let expected: Vec<_> = (1..=BLOCKS)
        .filter_map(|number| half.block(number))
        .map(|block| (block.number, block.key().to_vec()))
        .collect();
    assert!(host.durable == expected, "blocks differ from those made");
    assert!(host.saw_status);
    assert_eq!(host.sessions, 1);
    assert_eq!(stats.made + stats.withheld, BLOCKS);
    assert_eq!(stats.delivered, stats.made);
    assert!(
        stats.connections >= 2 && stats.sent_again >= 13,
        "{stats:?}"
    );
}

#[test]
fn a_module_stops_when_it_is_asked_to_though_nobody_listens() {
    let mut endless = pair();
    endless.blocks = None;
    let directory = tempfile::tempdir().unwrap();
    for make_pty in [true, false] {
        let config = SimConfig {
            role: Role::Receiver,
            pair: endless.clone(),
            transport: TransportConfig::Serial(SerialConfig {
                path: directory.path().join("tty"),
                make_pty,
                baud: 115_200,
                device: "sim".to_owned(),
                capacity_blocks: 4,
                retry_ms: 50,
            }),
        };
        let (stop, stats) = (AtomicBool::new(false), Stats::default());
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(&config, &stop, &stats));
            std::thread::sleep(Duration::from_millis(150));
            assert!(!running.is_finished());
            stop.store(true, Ordering::Relaxed);
            running.join().unwrap().unwrap();
        });
        assert_eq!(stats.snapshot().delivered, 0);
    }
}
