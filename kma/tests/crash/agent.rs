//! One agent behind a door through which orders and replies go: in this process, or in one of its own
//! that can be killed.

use std::{
    collections::BTreeMap,
    io::{BufReader, BufWriter, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use qkd_kernels::Backend;
use qkd_keyfile::{
    Entropy, KeyBits, KsaKeyId, Mono, NodeId, Now, QkdKeyName, UnixTime,
    metadata::{QkdKeyMetadata, SecurityLevel},
};
use qkd_kma::{
    FormattedSegment, Input, Kma, KmaConfig, Output, Settlement, SupplyByIdOrder, SupplyOrder,
    store::{Retention, Store},
    vault::{KekSource, LmdbOptions, Vault, open_lmdb},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::common::{Random, app};

/// What goes in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    Up(NodeId),
    Down(NodeId),
    Message(NodeId, Vec<u8>),
    Deliver(QkdKeyName, Vec<u8>),
    Supply(u64, NodeId, u32),
    Fetch(u64, NodeId, Vec<KsaKeyId>),
    Tick(u64),
    /// Die as kill -9 does, at a fail point: operation, step, how many times it is passed.
    FailAt(String, String, u32),
    Report,
}

/// What comes out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Send(NodeId, Vec<u8>),
    Supplied(u64, Result<Vec<(KsaKeyId, Vec<u8>)>, String>),
    Settled(QkdKeyName, bool),
    Alarm(String),
    /// Whether the books balance.
    Report(bool),
    /// Everything that the order brought about has been told.
    Done,
}

/// An agent with its pipeline.
pub struct Agent {
    kma: Kma,
    waiting: BTreeMap<QkdKeyName, Vec<u8>>,
    pool: Pool,
    random: Random,
    now: Now,
    config: KmaConfig,
}

/// Journals of this length are compacted, so that compactions are killed too.
const JOURNAL_LIMIT_BYTES: u64 = 48 << 10;

pub fn open_vault(dir: &Path) -> Box<dyn Vault> {
    let kek = KekSource::Raw(Zeroizing::new([1; 32]));
    let options = LmdbOptions {
        max_bytes: 32 << 20,
    };
    Box::new(open_lmdb(dir, &kek, options).unwrap())
}

impl Agent {
    pub fn new(config: KmaConfig, vault: Box<dyn Vault>, seed: u64) -> Self {
        let mut random = Random(seed);
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 8 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
        let mut boot = [0; 16];
        random.fill(&mut boot);
        let retention = Retention {
            preserve_for: Some(Duration::from_secs(20)),
            ..Retention::default()
        };
        let store = Store::open(vault, pool.clone(), boot).unwrap();
        assert_eq!(store.inconsistencies(), 0);
        let store = store.with_retention(retention);
        let kma = Kma::new(config.clone(), store, boot, Backend::PORTABLE)
            .with_journal_limit(JOURNAL_LIMIT_BYTES)
            .with_epoch_period(Duration::from_secs(5));
        Self {
            kma,
            waiting: BTreeMap::new(),
            pool,
            random,
            now: Now::default(),
            config,
        }
    }

    /// Stock and peers, for whoever looks into a failure.
    pub fn describe(&self) -> String {
        let status = self.kma.status();
        format!("{:?} {:?}", status.peers, status.streams)
    }

    /// One order is one batch.
    pub fn take(&mut self, order: Order, tell: &mut dyn FnMut(Reply)) {
        let input = match order {
            Order::Up(peer) => Input::PeerUp(peer),
            Order::Down(peer) => Input::PeerDown(peer),
            Order::Message(peer, bytes) => Input::Message { peer, bytes },
            Order::Deliver(name, key) => {
                let key_bits = u32::try_from(key.len() * 8).unwrap();
                self.waiting.insert(name.clone(), key);
                let metadata = QkdKeyMetadata::new(name.id.clone());
                Input::Held {
                    name,
                    key_bits,
                    metadata,
                }
            }
            Order::Supply(order, destination, number) => Input::Supply(SupplyOrder {
                order,
                master: app(&format!("app-{}", self.config.node)),
                applications: vec![app(&format!("app-{destination}"))],
                destination,
                number,
                size: KeyBits::try_from(256).unwrap(),
                level: SecurityLevel::Any,
            }),
            Order::Fetch(order, source, key_ids) => Input::SupplyById(SupplyByIdOrder {
                order,
                application: app(&format!("app-{}", self.config.node)),
                master: app(&format!("app-{source}")),
                source,
                key_ids,
            }),
            Order::Tick(ms) => {
                self.now = Now {
                    mono: Mono(Duration::from_millis(ms)),
                    unix: UnixTime(i64::try_from(ms).unwrap() * 1_000_000),
                };
                Input::Tick
            }
            #[cfg(debug_assertions)]
            Order::FailAt(operation, step, nth) => {
                qkd_kma::fail_point::arm(&operation, &step, nth);
                return tell(Reply::Done);
            }
            #[cfg(not(debug_assertions))]
            Order::FailAt(..) => return tell(Reply::Done),
            Order::Report => {
                let status = self.kma.status();
                let balanced = status.streams.iter().all(|s| s.imbalance_bits == 0);
                tell(Reply::Report(balanced && status.inconsistencies == 0));
                return tell(Reply::Done);
            }
        };
        self.input(input, tell);
        tell(Reply::Done);
    }

    fn input(&mut self, input: Input, tell: &mut dyn FnMut(Reply)) {
        self.kma.handle(self.now, &mut self.random, input);
        let outputs = self.kma.commit().unwrap();
        #[cfg(debug_assertions)]
        qkd_kma::fail_point::reached("told");
        for output in outputs {
            match output {
                Output::Send { peer, bytes } => tell(Reply::Send(peer, bytes.into())),
                Output::Format {
                    ticket,
                    composition,
                    unit_bytes,
                } => {
                    let segment = self.format(&composition, unit_bytes as usize);
                    self.input(Input::Formatted { ticket, segment }, tell);
                }
                Output::Settle { name, outcome } => {
                    self.waiting.remove(&name);
                    tell(Reply::Settled(name, outcome == Settlement::Stored));
                }
                Output::Supplied { order, result } => {
                    let keys = result.map_err(|error| error.to_string()).map(|keys| {
                        let key =
                            |key: &qkd_kma::SuppliedKey| (key.key_id, key.key.expose().to_vec());
                        keys.iter().map(key).collect()
                    });
                    tell(Reply::Supplied(order, keys));
                }
                Output::Alarm(alarm) => tell(Reply::Alarm(format!("{alarm:?}"))),
                _ => {}
            }
        }
    }

    fn format(
        &self,
        composition: &qkd_keyfile::Composition,
        unit: usize,
    ) -> Option<FormattedSegment> {
        let mut bits = Vec::new();
        for piece in &composition.pieces {
            let name = QkdKeyName {
                module_pair: composition.module_pair.clone(),
                generation: composition.generation,
                id: piece.qkd_key.clone(),
            };
            let key = self.waiting.get(&name)?;
            let (from, to) = (
                piece.offset_bits / 8,
                (piece.offset_bits + piece.len_bits) / 8,
            );
            bits.extend_from_slice(key.get(from as usize..to as usize)?);
        }
        let digests = bits[32..].chunks(unit).map(|u| Sha256::digest(u).into());
        Some(FormattedSegment {
            digests: digests.collect(),
            bits: self.pool.copy_of(&bits).unwrap(),
        })
    }
}

/// Serves an agent over a socket until the other end is gone.
pub fn serve(config: KmaConfig, dir: &Path, socket: &Path, seed: u64) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut agent = Agent::new(config, open_vault(dir), seed);
    let mut orders = BufReader::new(stream.try_clone().unwrap());
    let mut replies = BufWriter::new(stream);
    write(&mut replies, &Reply::Done).unwrap();
    replies.flush().unwrap();
    while let Ok(order) = read(&mut orders) {
        agent.take(order, &mut |reply| write(&mut replies, &reply).unwrap());
        replies.flush().unwrap();
    }
}

pub fn write(to: &mut impl Write, what: &impl Serialize) -> std::io::Result<()> {
    let bytes = postcard::to_allocvec(what).unwrap();
    to.write_all(&u32::try_from(bytes.len()).unwrap().to_le_bytes())?;
    to.write_all(&bytes)
}

pub fn read<T: for<'de> Deserialize<'de>>(from: &mut impl Read) -> std::io::Result<T> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
    from.read_exact(&mut bytes)?;
    Ok(postcard::from_bytes(&bytes).unwrap())
}
