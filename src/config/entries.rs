//! The entries of a node's file, with their defaults.

use std::path::{Path, PathBuf};

use qkd_drivers::DriverConfig;
use qkd_keyfile::{AppId, KeyBits, ModulePairId, NodeId};
use qkd_ksa::Profile;
use qkd_net::{CredentialsError, Reloadable};
use serde::Deserialize;
use toml::Spanned;

/// The node itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Its ID, which is the one in its certificate.
    pub id: NodeId,
    /// Its data directory, made if it is not there.
    pub data: PathBuf,
    /// Key memory, in MiB: at least 4; half of it is for what comes from hardware. It is locked, so
    /// the limit on locked memory must allow it.
    #[serde(default = "default_key_memory_mib")]
    pub key_memory_mib: Spanned<usize>,
    /// Whether key memory that cannot be locked may be used all the same.
    #[serde(default)]
    pub allow_unlocked_memory: bool,
    /// Whether key memory is made present when the node starts, all of it, instead of page by page
    /// when it is first used.
    #[serde(default)]
    pub populate_key_memory: bool,
    /// A core that the pipeline's stage stays on; without it, the system chooses.
    #[serde(default)]
    pub stage_core: Option<usize>,
    /// A core that the key management agent stays on; without it, the system chooses.
    #[serde(default)]
    pub agent_core: Option<usize>,
}

/// A certificate and whom it trusts; PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// This node's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority's revocation lists, if it has any; read again on SIGHUP, as all of these. A list
    /// that is out of date refuses everybody.
    pub crl: Option<PathBuf>,
}

impl TlsConfig {
    /// Takes relative paths from `base`.
    pub(crate) fn resolve(&mut self, base: &Path) {
        let files = [&mut self.ca, &mut self.certificate, &mut self.key];
        for path in files.into_iter().chain(&mut self.crl) {
            *path = base.join(&*path);
        }
    }

    /// Reads the files for the first time.
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] names the file at fault.
    pub fn load(&self) -> Result<Reloadable, CredentialsError> {
        Reloadable::load_with_crl(&self.ca, &self.certificate, &self.key, self.crl.as_deref())
    }
}

/// Where a port is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// `host:port`; loopback unless you say otherwise.
    pub listen: String,
}

/// Where other nodes connect, and when one of them counts as gone.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KxConfig {
    /// `host:port`.
    pub listen: String,
    /// Longest silence of a peer, in milliseconds; then its connection is closed and made anew. This
    /// node is silent for a quarter of it at most, so give all nodes about the same.
    #[serde(default = "default_dead_after_ms")]
    pub dead_after_ms: Spanned<u64>,
}

/// Where applications fetch keys (ETSI GS QKD 014), and what they may ask for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupplyConfig {
    /// `host:port`.
    pub listen: String,
    /// Size of a key that is asked for without a size, in bits.
    #[serde(default = "default_key_bits")]
    pub key_bits: KeyBits,
    /// Longest key, in bits.
    #[serde(default = "default_max_key_bits")]
    pub max_key_bits: KeyBits,
    /// Most keys in one request.
    #[serde(default = "default_max_keys")]
    pub max_keys_per_request: u32,
    /// Whether HTTP/2 is offered beside HTTP/1.1.
    #[serde(default)]
    pub http2: bool,
}

impl SupplyConfig {
    /// The limits that applications are told.
    ///
    /// # Errors
    ///
    /// They contradict each other.
    pub fn profile(&self) -> Result<Profile, qkd_ksa::ProfileError> {
        let least = KeyBits::try_from(8).unwrap_or(self.key_bits);
        Profile::new(
            self.key_bits,
            least.min(self.key_bits),
            self.max_key_bits,
            self.max_keys_per_request,
            0,
        )
    }
}

/// The controller that this node asks for routes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerLink {
    /// Its ID, which is the one in its certificate.
    pub id: NodeId,
    /// `host:port` of its Ck.
    pub address: String,
}

/// Another node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its ID.
    pub id: Spanned<NodeId>,
    /// `host:port` of its Kx.
    pub address: String,
}

/// A link to a matching KMA.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// The node at the other end.
    pub peer: Spanned<NodeId>,
    /// Pad per direction that serves only tags and hash keys, in bytes.
    #[serde(default = "default_floor_bytes")]
    pub floor_bytes: u64,
    /// Most bytes in stock; a full store takes no new segment.
    #[serde(default = "default_capacity_bytes")]
    pub capacity_bytes: u64,
    /// QKD-keys are gathered until a segment has this many KiB; a longer one makes a longer segment.
    #[serde(default = "default_segment_kib")]
    pub segment_kib: Spanned<u32>,
    /// How long they are gathered before a shorter segment is made, in milliseconds; ten times as
    /// long while there is less than 1 KiB.
    #[serde(default = "default_gather_ms")]
    pub gather_ms: u64,
    /// A module pair is stopped when so many of its QKD-keys have differed; 64 that agree make up
    /// for one. 0: never.
    #[serde(default = "default_mismatch_limit")]
    pub mismatch_limit: u32,
    /// The module pairs that feed the link.
    #[serde(default, rename = "module_pair")]
    pub module_pairs: Vec<ModulePairEntry>,
}

/// A module pair; both ends give it the same name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModulePairEntry {
    /// Its name.
    pub name: Spanned<ModulePairId>,
    /// How this node's module hands over its keys.
    pub driver: DriverConfig,
}

/// End-to-end stock with a node.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StockEntry {
    /// The node.
    pub with: Spanned<NodeId>,
    /// Stock to keep while no application asks, in KiB.
    #[serde(default = "default_min_kib")]
    pub min_kib: u64,
    /// Most stock to keep, in KiB, however much applications ask for.
    #[serde(default = "default_max_kib")]
    pub max_kib: Spanned<u64>,
    /// Key data of one relayed unit, in bytes.
    #[serde(default = "default_unit_bytes")]
    pub unit_bytes: u32,
    /// All nodes from here to there; without it the controller is asked.
    pub route: Option<Spanned<Vec<NodeId>>>,
}

/// An application.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppEntry {
    /// Its ID, which is the one in its certificate.
    pub id: Spanned<AppId>,
    /// The node where it fetches keys.
    pub node: Spanned<NodeId>,
    /// What people call it; kept with the metadata of its keys.
    pub name: Option<String>,
}

fn default_dead_after_ms() -> Spanned<u64> {
    Spanned::new(0..0, 8000)
}

fn default_key_memory_mib() -> Spanned<usize> {
    Spanned::new(0..0, 64)
}

fn default_key_bits() -> KeyBits {
    KeyBits::try_from(256).unwrap_or_else(|_| unreachable!("256 bits are 32 bytes"))
}

fn default_max_key_bits() -> KeyBits {
    KeyBits::try_from(8192).unwrap_or_else(|_| unreachable!("8192 bits are 1024 bytes"))
}

fn default_max_keys() -> u32 {
    128
}

/// 64 Kibit.
fn default_floor_bytes() -> u64 {
    8192
}

fn default_capacity_bytes() -> u64 {
    256 << 20
}

fn default_min_kib() -> u64 {
    256
}

fn default_max_kib() -> Spanned<u64> {
    Spanned::new(0..0, 16 << 10)
}

fn default_segment_kib() -> Spanned<u32> {
    Spanned::new(0..0, 64)
}

fn default_gather_ms() -> u64 {
    1000
}

fn default_mismatch_limit() -> u32 {
    8
}

fn default_unit_bytes() -> u32 {
    4096
}
