//! A vendor's key manager over ETSI GS QKD 014 V1.1.1, with the bridge as its application.
//!
//! One end of the module pair *pulls* new keys (`enc_keys`), as the master SAE; the other *fetches* the
//! same keys by their IDs (`dec_keys`), as the slave SAE, once it has heard of them
//! ([`KeySource::request`]). The key's UUID is the QKD-key ID.
//!
//! A key manager hands a key out once and forgets it, so there is nothing to settle, and what was pulled
//! and not stored when the bridge stops is lost: the other end drops it too. Keys are pulled only for
//! credit.

mod container;
mod http;

use std::{
    collections::VecDeque,
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use qkd_keyfile::{AppId, ModuleId, QkdKeyId, metadata::QkdKeyMetadata};
use qkd_net::{
    Reloadable,
    tls::{ClientStream, connect_to_host},
};
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};

pub use self::container::ContainerError;
use self::container::Pulled;
pub use crate::wanted::Role;
use crate::{
    config::OpenError,
    event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event, KeyBlock, Severity},
    scratch::Scratch,
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

    /// Bytes of the longest answer: keys in base64 with their IDs, and extensions.
    fn answer_bytes(&self) -> usize {
        let key_bytes = self.key_bits as usize / 8;
        8192 + self.keys_per_request as usize * (key_bytes.div_ceil(3) * 5 + 512)
    }
}

type Task = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// What became of a request.
enum Outcome {
    Keys(Client, Vec<Pulled>),
    /// The key manager has answered, and has no key now, or not for us.
    Refused(Client, u16),
    /// It has answered what cannot be; the connection is closed.
    Nonsense(Client, ContainerError),
    Failed(Client, io::ErrorKind),
    /// A pause is over.
    Rested(Client),
}

/// A connection that can be made again.
struct Client {
    config: Etsi014Config,
    credentials: Arc<Reloadable>,
    stream: Option<Box<ClientStream>>,
}

/// The key manager at one end.
pub struct Etsi014Source {
    config: Etsi014Config,
    client: Option<Client>,
    task: Option<Task>,
    /// What the task has asked for; empty for new keys.
    asked: Vec<QkdKeyId>,
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
            client: Some(Client {
                config: config.clone(),
                credentials: Arc::new(credentials),
                stream: None,
            }),
            task: None,
            asked: Vec::new(),
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
        let most = self.config.keys_per_request.min(self.credit_blocks) as usize;
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
                let asked = std::mem::take(&mut self.asked);
                self.wanted.failed(asked.into_iter(), &mut self.events);
                self.rest(client, pause);
            }
            Outcome::Nonsense(client, error) => {
                self.attach();
                let reason = CorruptReason::Container(error);
                self.events.push_back(Event::Corrupt { id: None, reason });
                let asked = std::mem::take(&mut self.asked);
                self.wanted.failed(asked.into_iter(), &mut self.events);
                self.rest(client, pause);
            }
            Outcome::Failed(client, error) => {
                // Whether the keys were handed out is not known; asking again does no harm.
                self.wanted.again(std::mem::take(&mut self.asked));
                if std::mem::take(&mut self.attached) || self.backoff == BACKOFF_FIRST {
                    let reason = DetachReason::Io { error };
                    self.events.push_back(Event::Detached { reason });
                }
                let pause = self.backoff;
                self.backoff = (pause * 2).min(BACKOFF_LAST);
                self.rest(client, pause);
            }
        }
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

impl Client {
    async fn ask(mut self, ids: Vec<QkdKeyId>, number: usize) -> Outcome {
        let within = Duration::from_millis(self.config.timeout_ms);
        let mut buffer = Scratch::new(self.config.answer_bytes());
        let request = self.request(&ids, number);
        let was_open = self.stream.is_some();
        let mut answer = self.exchange(&request, &mut buffer, within).await;
        // A key manager may close a connection that was idle at any time, before it has read anything.
        if was_open && answer.is_err() && ids.is_empty() {
            answer = self.exchange(&request, &mut buffer, within).await;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Outcome::Failed(self, error.kind()),
        };
        if !answer.stays_open {
            self.stream = None;
        }
        if answer.status != 200 {
            return Outcome::Refused(self, answer.status);
        }
        let body = &mut buffer[answer.body];
        match container::parse(body, number, self.config.key_bits) {
            Ok(pulled) if !ids.is_empty() && pulled.iter().any(|one| !ids.contains(&one.id)) => {
                Outcome::Nonsense(self, ContainerError::Id)
            }
            Ok(pulled) => Outcome::Keys(self, pulled),
            Err(error) => Outcome::Nonsense(self, error),
        }
    }

    async fn exchange(
        &mut self,
        request: &[u8],
        buffer: &mut Scratch,
        within: Duration,
    ) -> io::Result<http::Answer> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => Box::new(self.connect(within).await?),
        };
        let answer = timeout(within, http::exchange(&mut *stream, request, buffer)).await;
        let answer = answer.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        self.stream = Some(stream);
        Ok(answer)
    }

    async fn connect(&self, within: Duration) -> io::Result<ClientStream> {
        let Etsi014Config { host, port, .. } = &self.config;
        // New certificates count from the next connection on; what cannot be read changes nothing.
        let _ = self.credentials.reload();
        let tcp = timeout(within, TcpStream::connect((host.as_str(), *port))).await;
        let tcp = tcp.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let config = self.credentials.current().web_client_config(&[b"http/1.1"]);
        let stream = connect_to_host(tcp, config, host, within).await;
        stream.map_err(|error| io::Error::new(io::ErrorKind::ConnectionRefused, error))
    }

    /// Clause 5: Get key, or Get key with key IDs.
    fn request(&self, ids: &[QkdKeyId], number: usize) -> Vec<u8> {
        let Etsi014Config {
            host,
            port,
            peer_sae,
            key_bits,
            ..
        } = &self.config;
        let sae = percent_encoded(peer_sae.as_str());
        let (method, path, body) = if ids.is_empty() {
            let path = format!("enc_keys?number={number}&size={key_bits}");
            ("GET", path, String::new())
        } else {
            let each = ids
                .iter()
                .map(|id| format!(r#"{{"key_ID":{}}}"#, serde_json::json!(id.as_str())));
            let list = each.collect::<Vec<_>>().join(",");
            let body = format!(r#"{{"key_IDs":[{list}]}}"#);
            ("POST", "dec_keys".to_owned(), body)
        };
        let content = if body.is_empty() {
            String::new()
        } else {
            let len = body.len();
            format!("content-type: application/json\r\ncontent-length: {len}\r\n")
        };
        format!(
            "{method} /api/v1/keys/{sae}/{path} HTTP/1.1\r\nhost: {host}:{port}\r\n\
             accept: application/json\r\n{content}\r\n{body}"
        )
        .into_bytes()
    }
}

/// All but the unreserved characters (RFC 3986, clause 2.3).
fn percent_encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
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
