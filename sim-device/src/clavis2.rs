//! A Clavis2's daemon: keys of 32 bytes, one in a datagram, to whoever asks
//! ([`qkd_handover::clavis2`]).
//!
//! Blocks are cut into keys. A request for a new key takes the next one; a request by ID gives the key
//! of that ID, again and again, once its time has come: so one half is asked for new keys and the other
//! by ID. A key counts as delivered when it is sent first.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{SocketAddr, UdpSocket},
    sync::atomic::AtomicBool,
    time::Duration,
};

use qkd_handover::clavis2::{MAX_KEY_BYTES, RESPONSE_BYTES, Refusal, Request, Response};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    faults::{WireFault, picked},
    feed::{self, Feed},
    is_stopped,
    pair::Block,
    stats::Stats,
};

/// Where the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clavis2Config {
    /// Address and port; the real one's port is 5323.
    pub listen: SocketAddr,
    /// Most keys that are kept; then the module pauses, and the oldest that was handed over goes.
    #[serde(default = "default_max_keys")]
    pub max_keys: usize,
}

impl Clavis2Config {
    /// At this address, with the other settings' defaults.
    #[must_use]
    pub const fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            max_keys: default_max_keys(),
        }
    }
}

const fn default_max_keys() -> usize {
    65_536
}

/// Why the daemon cannot be played.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Clavis2Error {
    /// The port cannot be had.
    #[error("cannot listen on {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Longest wait for a request.
const PATIENCE: Duration = Duration::from_millis(20);

/// Answers requests until `stop` is set: whoever has the keys of the other half may still ask when all
/// blocks are made.
///
/// # Errors
///
/// See [`Clavis2Error`].
pub(crate) fn run(
    mut feed: Feed<'_>,
    config: &Clavis2Config,
    stall: Duration,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), Clavis2Error> {
    let listen = |source| Clavis2Error::Listen {
        listen: config.listen,
        source,
    };
    let socket = UdpSocket::bind(config.listen).map_err(listen)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(listen)?;
    let mut daemon = Daemon {
        socket,
        max_keys: config.max_keys,
        stall,
        keys: BTreeMap::new(),
        fresh: VecDeque::new(),
        late: None,
    };
    while !is_stopped(stop) {
        while daemon.fresh.len() < config.max_keys
            && let Some(block) = feed.poll_next()
        {
            daemon.add(&block);
        }
        feed.status();
        let mut datagram = [0; 64];
        // A timeout, or a peer's port that is closed: there will be another request.
        let Ok((len, from)) = daemon.socket.recv_from(&mut datagram) else {
            continue;
        };
        if let Ok(request) = Request::decode(&datagram[..len]) {
            stats.set_connected(true);
            daemon.answer(&request, from, stop, stats);
        }
    }
    stats.set_connected(false);
    Ok(())
}

struct Daemon {
    socket: UdpSocket,
    max_keys: usize,
    stall: Duration,
    keys: BTreeMap<u64, Zeroizing<[u8; MAX_KEY_BYTES]>>,
    /// Keys that nobody has had, and what is to happen to the answer.
    fresh: VecDeque<(u64, Option<WireFault>)>,
    /// An answer that the next overtakes.
    late: Option<(Zeroizing<[u8; RESPONSE_BYTES]>, SocketAddr)>,
}

impl Daemon {
    fn add(&mut self, block: &Block) {
        let mut fault = block.fault;
        let (whole, _) = block.key()[..block.key_bits as usize / 8].as_chunks();
        for (index, key) in (1_u64..).zip(whole) {
            // The same at both halves, and never 0, which asks for a new key.
            let generation = u64::from(block.generation) << 56;
            let id = generation | block.number << 16 | index;
            self.keys.insert(id, Zeroizing::new(*key));
            self.fresh.push_back((id, fault.take()));
        }
        while self.keys.len() > self.max_keys.max(self.fresh.len()) {
            self.keys.pop_first();
        }
    }

    fn answer(&mut self, request: &Request, to: SocketAddr, stop: &AtomicBool, stats: &Stats) {
        let (key_id, fault, refusal) = match request.key_id {
            0 => match self.fresh.pop_front() {
                Some((id, fault)) => (id, fault, None),
                None => (0, None, Some(Refusal::NoMoreKeys)),
            },
            id if !self.keys.contains_key(&id) => (id, None, Some(Refusal::UnknownId)),
            id => {
                let at = self.fresh.iter().position(|(fresh, _)| *fresh == id);
                let fault = at
                    .and_then(|at| self.fresh.remove(at))
                    .and_then(|(_, fault)| fault);
                (id, fault, None)
            }
        };
        let response = Response {
            key_id,
            key_bytes: request.key_bytes,
            request_id: request.request_id,
            refusal,
            device: request.device,
        };
        let key = match (refusal, self.keys.get(&key_id)) {
            (None, Some(key)) => &key[..usize::from(request.key_bytes).min(MAX_KEY_BYTES)],
            _ => &[],
        };
        let mut datagram = Zeroizing::new([0; RESPONSE_BYTES]);
        if response.encode(key, &mut datagram).is_err() {
            return;
        }
        if refusal.is_none() {
            stats.add_delivered(u32::from(request.key_bytes) * 8);
        }
        self.send(&mut datagram, to, fault, stop);
    }

    fn send(
        &mut self,
        datagram: &mut Zeroizing<[u8; RESPONSE_BYTES]>,
        to: SocketAddr,
        fault: Option<WireFault>,
        stop: &AtomicBool,
    ) {
        let mut len = RESPONSE_BYTES;
        match fault {
            Some(WireFault::Drop) => return,
            Some(WireFault::Reorder) if self.late.is_none() => {
                self.late = Some((datagram.clone(), to));
                return;
            }
            Some(WireFault::Flip(pick)) => {
                let bit = picked(pick, RESPONSE_BYTES * 8);
                datagram[bit / 8] ^= 0x80 >> (bit % 8);
            }
            // A datagram has no pieces: a part of it is what comes.
            Some(WireFault::Split) => len -= 1,
            Some(WireFault::Stall | WireFault::HangUp) => {
                feed::sleep(self.stall, stop);
            }
            Some(WireFault::Duplicate | WireFault::Reorder) | None => {}
        }
        let times = if fault == Some(WireFault::Duplicate) {
            2
        } else {
            1
        };
        for _ in 0..times {
            // Who is not there any more asks again, or not.
            let _ = self.socket.send_to(&datagram[..len], to);
        }
        if let Some((late, to)) = self.late.take() {
            let _ = self.socket.send_to(&late[..], to);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::{
        Pace, PairConfig,
        config::tests::config,
        pair::{ModulePair, Role},
        script::HalfScript,
    };

    struct Client(UdpSocket);

    impl Client {
        fn ask(&self, key_id: u64) -> Option<(Response, Vec<u8>)> {
            let request = Request {
                key_id,
                key_bytes: 32,
                request_id: 77,
                device: 1,
            };
            self.0.send(&request.encode()).unwrap();
            self.take()
        }

        fn take(&self) -> Option<(Response, Vec<u8>)> {
            let mut datagram = [0; 100];
            let len = self.0.recv(&mut datagram).ok()?;
            let (response, key) = Response::decode(&datagram[..len]).ok()?;
            assert_eq!((response.request_id, response.device), (77, 1));
            Some((response, key.to_vec()))
        }
    }

    fn free_port() -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap()
    }

    /// Plays both halves while `f` asks them.
    fn with_daemons(pair: &PairConfig, f: impl FnOnce(&[Client; 2])) {
        let stop = AtomicBool::new(false);
        let pair = ModulePair::new(pair).unwrap();
        std::thread::scope(|scope| {
            let clients = [Role::Transmitter, Role::Receiver].map(|role| {
                let config = Clavis2Config {
                    listen: free_port(),
                    max_keys: 100,
                };
                let half = pair.half(role);
                let (stop, server) = (&stop, config.listen);
                scope.spawn(move || {
                    let stats = Stats::default();
                    let feed = Feed::new(Box::new(HalfScript::new(half)), &stats);
                    run(feed, &config, Duration::from_millis(10), stop, &stats).unwrap();
                });
                let client = UdpSocket::bind("127.0.0.1:0").unwrap();
                client.connect(server).unwrap();
                client
                    .set_read_timeout(Some(Duration::from_millis(300)))
                    .unwrap();
                Client(client)
            });
            // They listen when they answer at all.
            for client in &clients {
                while client.ask(1 << 40).is_none() {}
            }
            f(&clients);
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn one_half_gives_new_keys_and_the_other_the_same_by_their_ids() {
        let mut pair = config();
        (pair.block_bits, pair.blocks, pair.pace) = (1000, Some(4), Pace::Max);
        with_daemons(&pair, |[alice, bob]| {
            let mut keys = std::collections::BTreeSet::new();
            for _ in 0..12 {
                let (new, key) = alice.ask(0).unwrap();
                assert_eq!((new.refusal, key.len()), (None, 32));
                assert_eq!(bob.ask(new.key_id).unwrap().1, key);
                assert_eq!(bob.ask(new.key_id).unwrap().1, key, "once more");
                assert!(keys.insert(key));
            }
            assert_eq!(alice.ask(0).unwrap().0.refusal, Some(Refusal::NoMoreKeys));
            assert_eq!(bob.ask(99).unwrap().0.refusal, Some(Refusal::UnknownId));
        });
    }

    #[test]
    fn what_happens_to_datagrams_is_for_the_other_side_to_notice() {
        let mut pair = config();
        (pair.block_bits, pair.blocks) = (256, Some(40));
        pair.faults.flip_per_million = 300_000;
        pair.faults.split_per_million = 300_000;
        pair.faults.drop_per_million = 300_000;
        with_daemons(&pair, |[alice, bob]| {
            let (mut good, mut bad) = (0, 0);
            while good + bad < 40 {
                match alice.ask(0) {
                    Some((new, key)) if new.refusal.is_none() => {
                        good += 1;
                        let other = bob.ask(new.key_id).or_else(|| bob.ask(new.key_id));
                        assert_eq!(other.unwrap().1, key);
                    }
                    Some(_) => break,
                    None => bad += 1,
                }
            }
            assert!(good >= 8 && bad >= 8, "{good} {bad}");
        });
    }
}
