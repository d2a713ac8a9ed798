//! The producer against a consumer that comes, goes and forgets.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use qkd_handover::ring::{Consumer, Record, greeting::Greeting};
use qkd_sim_device::{
    FaultConfig, ModulePair, Pace, PairConfig, Role, SimConfig, Snapshot, Stats, TransportConfig,
    ring::RingConfig, run,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType, accept, bind, listen, sendmsg, socket_with,
    },
};

const CAPACITY_BYTES: usize = 1 << 16;
const BLOCKS: u64 = 300;

fn pair() -> PairConfig {
    PairConfig {
        qber_ppm: 20_000,
        first_number: 10,
        blocks: Some(BLOCKS),
        faults: FaultConfig {
            one_sided_per_million: 50_000,
            differing_per_million: 50_000,
            empty_per_million: 50_000,
            ..FaultConfig::default()
        },
        ..PairConfig::new("5a".repeat(32).parse().unwrap(), 7637, Pace::Max)
    }
}

struct Host {
    listener: OwnedFd,
    wakeup: OwnedFd,
    /// Numbers and keys, as durable storage would hold them.
    durable: Vec<(u64, Vec<u8>)>,
    /// The device's, once it has said it.
    session: u64,
    saw_status: bool,
    slept: u32,
}

impl Host {
    fn listen(path: &Path) -> Self {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        Self {
            listener,
            wakeup: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            durable: Vec::new(),
            session: 0,
            saw_status: false,
            slept: 0,
        }
    }

    fn accept(&self, generation: u64) -> (Consumer, OwnedFd) {
        let connection = accept(&self.listener).unwrap();
        let (consumer, memory) = Consumer::create(CAPACITY_BYTES, generation, 1).unwrap();
        let greeting = Greeting {
            generation,
            last_durable: self.durable.last().map(|(number, _)| *number),
            session: self.session,
        };
        let fds = [memory.as_fd(), self.wakeup.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = greeting.encode();
        sendmsg(
            &connection,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        (consumer, connection)
    }

    /// Reads until `blocks` more have come or the end was announced; stores all but the last
    /// `forget`, as a host that dies before it has written them.
    fn take(&mut self, consumer: &mut Consumer, blocks: usize, forget: usize) {
        let mut key = vec![0; 1 << 12];
        let mut taken = Vec::new();
        let patience = Instant::now() + Duration::from_secs(60);
        while taken.len() < blocks {
            assert!(Instant::now() < patience, "no record comes");
            match consumer.read(&mut key).unwrap() {
                Some(Record::Block(header)) => {
                    let bytes = header.key_bits.div_ceil(8) as usize;
                    taken.push((header.number, key[..bytes].to_vec()));
                }
                Some(Record::Status(status)) => {
                    assert_eq!(status.qber_ppm, Some(20_000));
                    self.saw_status = true;
                }
                Some(Record::End) => break,
                None if consumer.prepare_wait() => {
                    self.slept += 1;
                    let mut fds = [PollFd::new(&self.wakeup, PollFlags::IN)];
                    let wait = Timespec {
                        tv_sec: 30,
                        tv_nsec: 0,
                    };
                    assert_eq!(poll(&mut fds, Some(&wait)), Ok(1), "nobody woke us");
                    rustix::io::read(&self.wakeup, &mut [0; 8]).unwrap();
                }
                None => {}
            }
        }
        let session = consumer.session().unwrap().unwrap();
        assert!(
            [0, session.get()].contains(&self.session),
            "it numbers anew"
        );
        self.session = session.get();
        consumer.begin_session(session, self.durable.last().map(|(number, _)| *number));
        taken.truncate(taken.len() - forget);
        self.durable.append(&mut taken);
    }

    fn settle(&self, consumer: &mut Consumer) {
        consumer.set_durable(self.durable.last().unwrap().0);
    }
}

fn play(host: impl FnOnce(Host), pair: PairConfig, role: Role) -> Snapshot {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("ring.sock");
    let config = SimConfig {
        role,
        pair,
        transport: TransportConfig::Ring(RingConfig::Socket(socket.clone())),
    };
    let (stop, stats) = (AtomicBool::new(false), Stats::default());
    std::thread::scope(|scope| {
        // It waits for a bridge that is not there yet.
        let running = scope.spawn(|| run(&config, &stop, &stats));
        std::thread::sleep(Duration::from_millis(20));
        host(Host::listen(&socket));
        let patience = Instant::now() + Duration::from_secs(60);
        while !running.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        running.join().unwrap().unwrap();
    });
    stats.snapshot()
}

fn assert_all_there(durable: &[(u64, Vec<u8>)], pair: &PairConfig, role: Role) {
    let half = ModulePair::new(pair).unwrap().half(role);
    let expected: Vec<_> = (pair.first_number..pair.first_number + BLOCKS)
        .filter_map(|number| half.block(number))
        .map(|block| (block.number, block.key().to_vec()))
        .collect();
    assert!(expected.len() < BLOCKS.try_into().unwrap());
    assert!(durable == expected, "blocks differ from those made");
}

#[test]
fn every_block_arrives_once_though_the_consumer_dies_twice() {
    for role in [Role::Transmitter, Role::Receiver] {
        let stats = play(
            |mut host| {
                let (mut consumer, connection) = host.accept(1);
                host.take(&mut consumer, 50, 20);
                drop((consumer, connection));
                let (mut consumer, connection) = host.accept(2);
                host.take(&mut consumer, 40, 1);
                host.settle(&mut consumer);
                drop((consumer, connection));
                let (mut consumer, _connection) = host.accept(3);
                host.take(&mut consumer, usize::MAX, 0);
                host.settle(&mut consumer);
                assert_all_there(&host.durable, &pair(), role);
                assert!(host.saw_status);
                // The module looks at `durable` while the connection lasts.
                std::thread::sleep(Duration::from_millis(300));
            },
            pair(),
            role,
        );
        let withheld = stats.withheld;
        assert_eq!(stats.made + withheld, BLOCKS);
        assert_eq!(stats.delivered, stats.made);
        assert_eq!(stats.connections, 3);
        assert!(stats.sent_again >= 21, "{stats:?}");
    }
}

#[test]
fn a_consumer_that_sleeps_is_woken_by_a_slow_module() {
    let mut slow = pair();
    (slow.pace, slow.blocks) = (Pace::PerSecond(50.0), Some(10));
    slow.faults = FaultConfig::default();
    let stats = play(
        |mut host| {
            let (mut consumer, _connection) = host.accept(1);
            host.take(&mut consumer, usize::MAX, 0);
            host.settle(&mut consumer);
            assert_eq!(host.durable.len(), 10);
            assert!(host.slept > 0);
            std::thread::sleep(Duration::from_millis(300));
        },
        slow,
        Role::Transmitter,
    );
    assert_eq!((stats.delivered, stats.delivered_bits), (10, 76_370));
}
