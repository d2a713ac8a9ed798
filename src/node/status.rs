//! What a running node tells its operator: one JSON document per connection to a socket in its data
//! directory.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use qkd_keyfile::NodeId;
use qkd_kma::{Accounts, ModulePairStatus, Status, StockStatus};
use serde::Serialize;
use tokio::{
    io::AsyncWriteExt,
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
};

use super::{agent::Request, intake::ModuleReport, modules::Reports};

/// A node's state. Quantities in bytes are usable key, in bits all of it; none is key.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The node.
    pub node: NodeId,
    /// The program's version.
    pub version: &'static str,
    /// Every other node, and whether it is connected.
    pub peers: BTreeMap<NodeId, bool>,
    /// Every stream of segments: links by `low--high`, end-to-end stock by `source->destination`.
    pub streams: BTreeMap<String, StreamReport>,
    /// End-to-end stock, by the node that it is shared with.
    pub stocks: BTreeMap<NodeId, StockReport>,
    /// Every module of this node, by module pair.
    pub modules: BTreeMap<String, ModuleReport>,
    /// The module pairs, as this end agrees on their keys with the other.
    pub module_pairs: BTreeMap<String, ModulePairStatus>,
    /// Bindings that no destination has acknowledged.
    pub outbox_bindings: usize,
    /// Bound keys that wait here for their applications.
    pub waiting_bindings: usize,
    /// Key memory.
    pub key_memory: MemoryReport,
    /// Journal records that did not fit; 0.
    pub inconsistencies: u64,
}

/// One end-to-end stock. Quantities are of usable key that this node owns.
#[derive(Debug, Serialize)]
pub struct StockReport {
    /// Bytes in stock.
    pub stock_bytes: u64,
    /// Bytes on their way to the other end.
    pub coming_bytes: u64,
    /// Bytes that are to be in stock now: what was asked for lately decides, between the limits.
    pub target_bytes: u64,
    /// The least target.
    pub min_bytes: u64,
    /// The greatest target.
    pub max_bytes: u64,
    /// Bytes per second that applications asked for lately.
    pub demand_bytes_per_second: u64,
    /// Bytes asked for and refused since the start, for there were not enough.
    pub refused_bytes: u64,
}

impl From<StockStatus> for StockReport {
    fn from(status: StockStatus) -> Self {
        Self {
            stock_bytes: status.stock_bytes,
            coming_bytes: status.coming_bytes,
            target_bytes: status.target_bytes,
            min_bytes: status.limits.min_bytes,
            max_bytes: status.limits.max_bytes,
            demand_bytes_per_second: status.demand_bytes_per_second,
            refused_bytes: status.refused_bytes,
        }
    }
}

/// One stream.
#[derive(Debug, Serialize)]
pub struct StreamReport {
    /// Bytes in stock that this node owns.
    pub encrypting_bytes: u64,
    /// Bytes in stock that the other end owns.
    pub decrypting_bytes: u64,
    /// The double entry.
    #[serde(flatten)]
    pub accounts: Accounts,
    /// Bits that the double entry does not explain; 0.
    pub imbalance_bits: i64,
}

/// Key memory.
#[derive(Debug, Serialize)]
pub struct MemoryReport {
    /// Bytes in blocks that are handed out.
    pub used_bytes: usize,
    /// Bytes there are.
    pub capacity_bytes: usize,
    /// Whether they are locked.
    pub locked: bool,
    /// How often a module had to wait for memory.
    pub intake_exhausted: u64,
    /// How often there was none left for anything else.
    pub exhausted: u64,
}

/// Answers on the status socket until the node stops.
pub(crate) struct StatusServer {
    pub(crate) node: NodeId,
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) modules: Reports,
    /// Key memory of the intake, and of everything else.
    pub(crate) pools: [qkd_secmem::Pool; 2],
}

/// A node that does not answer in this time is not well.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks a running node for its [`Report`], as JSON. Blocks the thread.
///
/// # Errors
///
/// The node does not answer on this socket.
pub fn ask(socket: &Path) -> io::Result<String> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Binds the socket, in place of one that a killed process has left.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl StatusServer {
    pub(crate) async fn run(self, listener: UnixListener, mut shutdown: watch::Receiver<bool>) {
        loop {
            let accepted = tokio::select! {
                () = super::until_stop(&mut shutdown) => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((mut stream, _)) = accepted else {
                continue;
            };
            let Some(report) = self.report().await else {
                return;
            };
            if let Ok(json) = serde_json::to_vec(&report) {
                let sending = async {
                    stream.write_all(&json).await?;
                    stream.shutdown().await
                };
                // A reader that does not read must not keep the next one waiting.
                let _ = tokio::time::timeout(super::agent::STOP_WITHIN, sending).await;
            }
        }
    }

    async fn report(&self) -> Option<Report> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Status(reply)).await.ok()?;
        let status: Box<Status> = answer.await.ok()?;
        let streams = status.streams.into_iter().map(|stream| {
            let report = StreamReport {
                encrypting_bytes: stream.encrypting_bytes,
                decrypting_bytes: stream.decrypting_bytes,
                accounts: stream.accounts,
                imbalance_bits: i64::try_from(stream.imbalance_bits).unwrap_or(i64::MAX),
            };
            (stream.stream.to_string(), report)
        });
        let [intake, working] = self.pools.each_ref().map(qkd_secmem::Pool::stats);
        Some(Report {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION"),
            peers: status.peers.into_iter().collect(),
            streams: streams.collect(),
            stocks: status
                .stocks
                .into_iter()
                .map(|stock| (stock.with.clone(), stock.into()))
                .collect(),
            modules: self.modules.get(),
            module_pairs: status
                .module_pairs
                .into_iter()
                .map(|(name, status)| (name.to_string(), status))
                .collect(),
            outbox_bindings: status.outbox_bindings,
            waiting_bindings: status.waiting_bindings,
            key_memory: MemoryReport {
                used_bytes: intake.in_use_bytes + working.in_use_bytes,
                capacity_bytes: intake.capacity_bytes + working.capacity_bytes,
                locked: intake.locked && working.locked,
                intake_exhausted: intake.exhausted,
                exhausted: working.exhausted,
            },
            inconsistencies: status.inconsistencies,
        })
    }
}
