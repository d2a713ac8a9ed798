//! A vendor's key manager over ETSI GS QKD 014 V1.1.1, with the bridge as its application.
//!
//! One end of the module pair *pulls* new keys (`enc_keys`), as the master SAE; the other *fetches* the
//! same keys by their IDs (`dec_keys`), as the slave SAE, once it has heard of them
//! ([`KeySource::request`]). The key's UUID is the QKD-key ID.
//!
//! A key manager hands a key out once and forgets it, so there is nothing to settle, and what was pulled
//! and not stored when the bridge stops is lost: the other end drops it too. Keys are pulled only for
//! credit. Those of an answer that did not arrive, or was of no use, may be lost too, and are told as a gap
//! with the next answer; at the other end, a key that is gone is told as empty.

mod client;
mod container;
mod http;

use std::{
    collections::VecDeque,
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use qkd_keyfile::{AppId, ModuleId, QkdKeyId, metadata::QkdKeyMetadata};
use qkd_net::Reloadable;
use serde::Deserialize;

pub use self::container::ContainerError;
use self::{
    client::{Client, Outcome},
    container::Pulled,
};
pub use crate::wanted::Role;
use crate::{
    config::OpenError,
    event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event, KeyBlock, Severity},
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
    wanted::Wanted,
};

/// Which key manager, and as whom.
///
/// ```toml
/// kind = "etsi014"
/// host = "kme-a.example"
/// port = 443
/// role = "pull"               # "fetch" at the other end
/// peer_sae = "bridge-bob"     # SAE ID of the bridge at the other end
/// ca = "kme-ca.pem"           # whom to trust
/// certificate = "sae.pem"     # who to be: the vendor's SAE certificate
/// key = "sae.key"
/// key_bits = 256              # length of a key; equal at both ends
/// keys_per_request = 16
/// poll_interval_ms = 1000     # pause when there is no key
/// timeout_ms = 10000          # for a connection, and for an answer
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Etsi014Config {
    /// Host name or address of the key manager; it must be in its certificate.
    pub host: String,
    /// Its port.
    #[serde(default = "default_port")]
    pub port: u16,
    /// Which end this is.
    pub role: Role,
    /// SAE ID of the bridge at the other end.
    pub peer_sae: AppId,
    /// The authority of the key manager's certificate, in PEM.
    pub ca: PathBuf,
    /// Our certificate, by which the key manager knows our SAE ID, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Length of a key, in bits: a multiple of 8.
    #[serde(default = "default_key_bits")]
    pub key_bits: u32,
    /// Most keys in a request.
    #[serde(default = "default_keys_per_request")]
    pub keys_per_request: u32,
    /// Pause after an answer without keys, in milliseconds.
    #[serde(default = "default_poll_interval_ms")]
    pub poll_interval_ms: u64,
    /// Longest time for a connection, and for an answer, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// QKD module ID for the metadata; may be left out.
    #[serde(default)]
    pub module: Option<ModuleId>,
    /// Matching QKD module ID for the metadata; may be left out.
    #[serde(default)]
    pub matching_module: Option<ModuleId>,
}

impl Etsi014Config {
    fn check(&self) -> Result<(), OpenError> {
        let refuse = |setting, value, expected| {
            Err(OpenError::Setting {
                setting,
                value,
                expected,
            })
        };
        if !(8..=MAX_KEY_BITS).contains(&self.key_bits) || !self.key_bits.is_multiple_of(8) {
            let value = u64::from(self.key_bits);
            return refuse("key_bits", value, "a multiple of 8, 8 to 524288");
        }
        if !(1..=MAX_KEYS).contains(&self.keys_per_request) {
            let value = u64::from(self.keys_per_request);
            return refuse("keys_per_request", value, "1 to 128");
        }
        if !(10..=3_600_000).contains(&self.poll_interval_ms) {
            return refuse("poll_interval_ms", self.poll_interval_ms, "10 to 3600000");
        }
        if !(100..=600_000).contains(&self.timeout_ms) {
            return refuse("timeout_ms", self.timeout_ms, "100 to 600000");
        }
        Ok(())
    }
}

type Task = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// The key manager at one end.
pub struct Etsi014Source {
    config: Etsi014Config,
    client: Option<Client>,
    task: Option<Task>,
    /// What the task has asked for; empty for new keys.
    asked: Vec<QkdKeyId>,
    /// How many the task has asked for.
    asked_keys: usize,
    /// How many to ask for at most: fewer after a shortage, for some key managers give all or none.
    most_keys: u32,
    /// New keys that were asked for and did not come though they may have been handed out, since the
    /// last gap.
    missed_keys: u64,
    pulled: VecDeque<Pulled>,
    wanted: Wanted,
    events: VecDeque<Event>,
    attached: bool,
    /// The last status that an alarm told of.
    refused: Option<u16>,
    backoff: Duration,
    credit_blocks: u32,
    waiting: Waiting,
}

impl std::fmt::Debug for Etsi014Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etsi014Source")
            .field("config", &self.config)
            .field("pulled_keys", &self.pulled.len())
            .finish_non_exhaustive()
    }
}

impl Etsi014Source {
    /// Reads the certificates. The key manager is connected to when the source is polled with credit.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: a certificate cannot be used, or a setting is out of range.
    pub fn open(config: &Etsi014Config) -> Result<Self, OpenError> {
        config.check()?;
        let credentials = Reloadable::load(&config.ca, &config.certificate, &config.key)
            .map_err(|error| OpenError::Credentials(Box::new(error)))?;
        Ok(Self {
            client: Some(Client::new(config, credentials)),
            task: None,
            asked: Vec::new(),
            asked_keys: 0,
            most_keys: config.keys_per_request,
            missed_keys: 0,
            pulled: VecDeque::new(),
            wanted: Wanted::default(),
            events: VecDeque::new(),
            attached: false,
            refused: None,
            backoff: BACKOFF_FIRST,
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    /// Asks for as many keys as there is credit for.
    fn begin(&mut self) -> bool {
        if self.credit_blocks == 0 {
            return false;
        }
        let most = self.most_keys.min(self.credit_blocks) as usize;
        self.asked = match self.config.role {
            Role::Pull => Vec::new(),
            Role::Fetch => self.wanted.next(most),
        };
        if self.config.role == Role::Fetch && self.asked.is_empty() {
            return false;
        }
        let Some(client) = self.client.take() else {
            return false;
        };
        let (ids, number) = (self.asked.clone(), most);
        self.asked_keys = number;
        self.task = Some(Box::pin(client.ask(ids, number)));
        true
    }

    fn rest(&mut self, client: Client, pause: Duration) {
        self.task = Some(Box::pin(async move {
            tokio::time::sleep(pause).await;
            Outcome::Rested(client)
        }));
    }

    fn take(&mut self, outcome: Outcome) {
        let pause = Duration::from_millis(self.config.poll_interval_ms);
        match outcome {
            Outcome::Rested(client) => self.client = Some(client),
            Outcome::Keys(client, pulled) => {
                self.attach();
                let asked = std::mem::take(&mut self.asked);
                let (came, missing): (Vec<_>, Vec<_>) = asked
                    .into_iter()
                    .partition(|id| pulled.iter().any(|one| one.id == *id));
                came.into_iter().for_each(|id| self.wanted.done(id));
                self.wanted.failed(missing.into_iter(), &mut self.events);
                self.refused = None;
                self.most_keys = (self.most_keys * 2).min(self.config.keys_per_request);
                let is_empty = pulled.is_empty();
                self.pulled.extend(pulled);
                if is_empty {
                    self.rest(client, pause);
                } else {
                    self.client = Some(client);
                }
            }
            Outcome::Refused(client, status) => {
                self.attach();
                self.tell_refusal(status);
                if self.config.role == Role::Pull && status == 503 {
                    self.most_keys = u32::try_from(self.asked_keys / 2).unwrap_or(1).max(1);
                }
                let asked = std::mem::take(&mut self.asked);
                self.wanted.failed(asked.into_iter(), &mut self.events);
                self.rest(client, pause);
            }
            Outcome::Nonsense(client, error) => {
                self.attach();
                self.miss();
                let reason = CorruptReason::Container(error);
                self.events.push_back(Event::Corrupt { id: None, reason });
                let asked = std::mem::take(&mut self.asked);
                self.wanted.failed(asked.into_iter(), &mut self.events);
                self.rest(client, pause);
            }
            Outcome::Unreached(client, error) => self.detach(client, error),
            Outcome::Unanswered(client, error) => {
                self.miss();
                self.detach(client, error);
            }
        }
    }

    /// New keys that were asked for may have been handed out, and are not here.
    fn miss(&mut self) {
        if self.config.role == Role::Pull {
            self.missed_keys += self.asked_keys as u64;
        }
    }

    /// Asks again later; of keys by ID that does no harm.
    fn detach(&mut self, client: Client, error: io::ErrorKind) {
        self.wanted.again(std::mem::take(&mut self.asked));
        if std::mem::take(&mut self.attached) || self.backoff == BACKOFF_FIRST {
            let reason = DetachReason::Io { error };
            self.events.push_back(Event::Detached { reason });
        }
        let pause = self.backoff;
        self.backoff = (pause * 2).min(BACKOFF_LAST);
        self.rest(client, pause);
    }

    /// That there is no key is no alarm: 503 says so of new ones, and 400 or 404 of those by ID.
    fn tell_refusal(&mut self, status: u16) {
        let is_shortage = match self.config.role {
            Role::Pull => status == 503,
            Role::Fetch => matches!(status, 400 | 404 | 503),
        };
        if !is_shortage && self.refused != Some(status) {
            self.refused = Some(status);
            self.events.push_back(Event::Alarm(Alarm {
                code: AlarmCode::KeyManagerRefuses { status },
                severity: Severity::Error,
            }));
        }
    }

    fn attach(&mut self) {
        self.backoff = BACKOFF_FIRST;
        if !std::mem::replace(&mut self.attached, true) {
            let Etsi014Config { host, port, .. } = &self.config;
            self.events.push_back(Event::Attached {
                device: format!("{host}:{port}"),
                session: None,
            });
        }
        let blocks = std::mem::take(&mut self.missed_keys);
        if blocks > 0 {
            self.events.push_back(Event::Gap { blocks });
        }
    }

    fn deliver(&mut self, pulled: Pulled, out: &mut [u8]) -> Event {
        let Pulled { id, key } = pulled;
        out[..key.len()].copy_from_slice(&key);
        self.credit_blocks -= 1;
        let key_bits = self.config.key_bits;
        Event::Key(KeyBlock {
            metadata: QkdKeyMetadata {
                key_bits: Some(key_bits),
                module: self.config.module.clone(),
                matching_module: self.config.matching_module.clone(),
                ..QkdKeyMetadata::new(id)
            },
            key_bits,
            qber_ppm: None,
        })
    }
}

impl KeySource for Etsi014Source {
    fn max_block_bytes(&self) -> usize {
        self.config.key_bits as usize / 8
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            if self.credit_blocks > 0
                && let Some(pulled) = self.pulled.pop_front()
            {
                return Poll::Ready(Ok(self.deliver(pulled, out)));
            }
            self.waiting.register(cx);
            if self.task.is_none() && !self.begin() {
                return Poll::Pending;
            }
            let Some(task) = &mut self.task else {
                return Poll::Pending;
            };
            let outcome = ready!(task.as_mut().poll(cx));
            self.task = None;
            self.take(outcome);
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.credit_blocks = self.credit_blocks.saturating_add(blocks);
        self.waiting.wake();
    }

    /// The key manager has forgotten the key already.
    fn settle(&mut self, _: &QkdKeyId, _: Settlement) {}

    fn request(&mut self, ids: &[QkdKeyId]) {
        if self.config.role == Role::Fetch {
            self.wanted.add(ids);
            self.waiting.wake();
        }
    }
}

/// 64 KiB of key.
const MAX_KEY_BITS: u32 = 1 << 19;

const MAX_KEYS: u32 = 128;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

const fn default_port() -> u16 {
    443
}

const fn default_key_bits() -> u32 {
    256
}

const fn default_keys_per_request() -> u32 {
    16
}

const fn default_poll_interval_ms() -> u64 {
    1000
}

const fn default_timeout_ms() -> u64 {
    10_000
}
