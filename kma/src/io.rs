//! What goes into the KMA and what comes out of it.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use qkd_kernels::Backend;
use qkd_keyfile::{
    AppId, Composition, Generation, KeyBits, KsaKeyId, ModulePairId, NodeId, Now, QkdKeyId,
    QkdKeyName, SegmentNumber, StreamId,
    metadata::{QkdKeyMetadata, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use serde::{Deserialize, Serialize};

use crate::{
    operator::{OperatorAnswer, OperatorOrder},
    policy::RelayPolicies,
    record::StopReason,
    store::Store,
    vault::VaultError,
    wire::Message,
};

/// How a KMA is set up; constant while it runs.
#[derive(Debug, Clone)]
pub struct KmaConfig {
    /// This node.
    pub node: NodeId,
    /// KMAs that this node shares a link with.
    pub neighbours: BTreeMap<NodeId, LinkConfig>,
    /// KMAs for which end-to-end stock is kept.
    pub remotes: BTreeMap<NodeId, RemoteConfig>,
    /// How keys are relayed, per pair of nodes.
    pub relay: RelayPolicies,
    /// Length over which unit digests are taken, in bytes; the proposer's value counts.
    pub digest_unit_bytes: u32,
}

/// A link to a matching KMA.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The module pairs that feed it.
    pub module_pairs: Vec<ModulePairId>,
    /// Pad per direction that serves only tags and hash keys, in bytes (64 Kibit by default).
    pub floor_bytes: u64,
    /// Most bytes in stock; a full store takes no new segment.
    pub capacity_bytes: u64,
    /// QKD-keys are gathered until a segment has this many bytes, 64 KiB by default; a longer QKD-key
    /// makes a longer one. The proposer's value counts.
    pub segment_bytes: u32,
    /// How long they are gathered before a shorter segment is made; ten times as long while there is
    /// less than 1 KiB. The proposer's value counts.
    pub gather: Duration,
    /// A module pair is stopped when so many of its QKD-keys have differed; 64 that agree make up
    /// for one. 0: never.
    pub mismatch_limit: u32,
}

/// End-to-end stock with a KMA, for applications here that ask for keys shared with applications
/// there.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// How much of it to keep.
    pub stock: StockLimits,
    /// Key data of one relayed unit, in bytes.
    pub unit_bytes: u32,
    /// The route that was set by hand: all KMAs from here to there. Without it the controller is
    /// asked ([`Output::WantRoute`]).
    pub route: Option<Vec<NodeId>>,
}

/// The least and the greatest stock to keep with a KMA; between them it follows what applications
/// ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StockLimits {
    /// In stock also while nobody asks, in bytes.
    pub min_bytes: u64,
    /// In stock at most, in bytes, however much is asked for; counts only above `min_bytes`.
    pub max_bytes: u64,
}

impl StockLimits {
    /// The same stock always.
    #[must_use]
    pub const fn fixed(bytes: u64) -> Self {
        Self {
            min_bytes: bytes,
            max_bytes: bytes,
        }
    }
}

/// Something that happened outside.
#[derive(Debug)]
pub enum Input {
    /// The connection to another node is there, and fresh.
    PeerUp(NodeId),
    /// The connection to another node is gone.
    PeerDown(NodeId),
    /// A whole message from another node.
    Message {
        /// The node, as its certificate says.
        peer: NodeId,
        /// The message.
        bytes: Vec<u8>,
    },
    /// A link is fed by one more module pair from now on. One that it has already changes nothing.
    ModulePair {
        /// The matching KMA; nothing happens if there is no link to it.
        peer: NodeId,
        /// The module pair.
        module_pair: ModulePairId,
    },
    /// A QKD-key waits in the pipeline.
    Held {
        /// Its name.
        name: QkdKeyName,
        /// Its length.
        key_bits: u32,
        /// What its module said about it.
        metadata: QkdKeyMetadata,
    },
    /// The pipeline lost a QKD-key that it held.
    Lost(QkdKeyName),
    /// The pipeline refused a QKD-key: it must not be used at either end.
    Quarantined {
        /// Its name.
        name: QkdKeyName,
        /// Why.
        reason: QuarantineReason,
    },
    /// A module tells its session: another one than before means that it numbers its QKD-keys anew.
    /// Answered by [`Output::Numbering`] with the same session, once both ends have agreed on it; no
    /// QKD-key of the session may come in before.
    Session {
        /// The module pair.
        module_pair: ModulePairId,
        /// The session.
        session: u64,
    },
    /// The pipeline has carried out [`Output::Format`].
    Formatted {
        /// The order's ticket.
        ticket: FormatTicket,
        /// The segment, unless it could not be made.
        segment: Option<FormattedSegment>,
    },
    /// An application asks for keys.
    Supply(SupplyOrder),
    /// An application asks for keys by ID.
    SupplyById(SupplyByIdOrder),
    /// The controller has answered [`Output::WantRoute`].
    Route {
        /// The destination that was asked for.
        destination: NodeId,
        /// All KMAs from here to there; `None` if there is no way.
        route: Option<Vec<NodeId>>,
    },
    /// Bits of the registered physical generator, tested, after [`Output::WantRandom`].
    Random(KeyBuf),
    /// An operator orders something; answered by [`Output::Ordered`].
    Order(OperatorOrder),
    /// Time has passed.
    Tick,
}

/// Something to do outside. All of it rests on durable state once [`Kma::commit`] has returned, and
/// none of it may be done before.
///
/// [`Kma::commit`]: crate::Kma::commit
#[derive(Debug)]
pub enum Output {
    /// Send a message to another node; it may get lost.
    Send {
        /// The node.
        peer: NodeId,
        /// The message. What may have to be sent again shares it.
        bytes: Bytes,
    },
    /// Make a segment of QKD-keys that wait in the pipeline: its bits, and SHA-256 of every
    /// `unit_bytes` after the first 32 bytes.
    Format {
        /// Comes back with [`Input::Formatted`].
        ticket: FormatTicket,
        /// What to make it of.
        composition: Composition,
        /// Length of a unit.
        unit_bytes: u32,
    },
    /// QKD-keys that are read from now on are of this generation. Those of an earlier one that still
    /// come in are dropped.
    Numbering {
        /// The module pair.
        module_pair: ModulePairId,
        /// The generation.
        generation: Generation,
        /// The session that it holds for, if the module told one.
        session: Option<u64>,
    },
    /// The peer holds QKD-keys that are not here. A driver that fetches keys by their IDs is to fetch
    /// them; said again for as long as it is so.
    Elsewhere {
        /// The module pair.
        module_pair: ModulePairId,
        /// The QKD-keys, of the present generation.
        ids: Vec<QkdKeyId>,
    },
    /// A QKD-key is settled: the pipeline forgets it, and its driver is told.
    Settle {
        /// The QKD-key.
        name: QkdKeyName,
        /// What became of it.
        outcome: Settlement,
    },
    /// The answer to [`Input::Supply`] or [`Input::SupplyById`].
    Supplied {
        /// The order's number.
        order: u64,
        /// The keys, or why there are none.
        result: Result<Vec<SuppliedKey>, SupplyError>,
    },
    /// The answer to [`Input::Order`].
    Ordered {
        /// The order's number.
        order: u64,
        /// What came of it.
        answer: OperatorAnswer,
    },
    /// A route is needed: ask the controller and answer with [`Input::Route`].
    WantRoute {
        /// From here to this KMA.
        destination: NodeId,
    },
    /// Bits of the registered physical generator are wanted: bring as many with [`Input::Random`],
    /// in whatever pieces, as soon as they are there. Not asked again before they are.
    WantRandom {
        /// How many, in bytes.
        bytes: usize,
    },
    /// Something that an operator should know.
    Alarm(Alarm),
}

/// Names a format order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FormatTicket {
    /// The matching KMA.
    pub peer: NodeId,
    /// The segment's number.
    pub segment: SegmentNumber,
    /// Counts the orders of this process: a segment number may be given out again by a peer whose
    /// store was replaced.
    pub order: u64,
}

/// A segment that the pipeline made.
#[derive(Debug)]
pub struct FormattedSegment {
    /// Its bits, in whole bytes; the first 32 are the masks of the comparison.
    pub bits: KeyBuf,
    /// SHA-256 of every unit after the masks; the last unit may be shorter.
    pub digests: Vec<[u8; 32]>,
}

/// What became of a QKD-key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// Its bits are stored, agreed or to be agreed with the matching KMA.
    Stored,
    /// It is gone at both ends.
    Dropped,
    /// It is gone at both ends, and should be kept aside at its origin where that is possible.
    Quarantined,
}

/// Why a QKD-key must not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QuarantineReason {
    /// It failed a health test.
    Unhealthy,
    /// Its bits came before, under another name.
    Repeated,
}

/// An application's request for keys.
#[derive(Debug, Clone)]
pub struct SupplyOrder {
    /// Comes back with the answer.
    pub order: u64,
    /// The application that asks.
    pub master: AppId,
    /// The node of the applications that will fetch the keys by ID.
    pub destination: NodeId,
    /// Those applications.
    pub applications: Vec<AppId>,
    /// Keys asked for.
    pub number: u32,
    /// Length of each.
    pub size: KeyBits,
    /// The weakest level that will do.
    pub level: SecurityLevel,
}

/// An application's request for keys by ID.
#[derive(Debug, Clone)]
pub struct SupplyByIdOrder {
    /// Comes back with the answer.
    pub order: u64,
    /// The application that asks.
    pub application: AppId,
    /// The application that got the IDs.
    pub master: AppId,
    /// The node of that application.
    pub source: NodeId,
    /// The keys asked for: all or none.
    pub key_ids: Vec<KsaKeyId>,
}

/// A key for an application.
#[derive(Debug)]
pub struct SuppliedKey {
    /// Its ID.
    pub key_id: KsaKeyId,
    /// Its bytes.
    pub key: KeyBuf,
}

/// Why an order for keys was refused. Nothing was consumed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SupplyError {
    /// Not enough key with that node, at that level. Try again later.
    #[error("not enough key in stock with {destination}")]
    NotEnoughKey {
        /// The node.
        destination: NodeId,
    },
    /// No key is shared with that node, nor will be.
    #[error("no key is shared with {destination}")]
    UnknownDestination {
        /// The node.
        destination: NodeId,
    },
    /// A key ID is not known here, for this application.
    #[error("a key ID is unknown")]
    UnknownKeyId,
    /// A key exists, but not for this application.
    #[error("a key is not for this application")]
    NotForYou,
    /// The node that would know is out of reach, or has yet to vouch for this node's marks since it
    /// was started. Try again later.
    #[error("the node that gave the key ID is out of reach")]
    Unreachable,
    /// The key cannot be read now (key memory full, or the store failed).
    #[error("the key cannot be read")]
    Unreadable,
    /// No application or no key in the order, or more of them than one order may have.
    #[error("an order for none, or for too many")]
    BadOrder,
}

/// What an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Alarm {
    /// The two ends of a module pair hold different bits for one QKD-key.
    Mismatch {
        /// The matching KMA.
        peer: NodeId,
        /// The module pair.
        module_pair: ModulePairId,
        /// The QKD-keys.
        qkd_keys: Vec<QkdKeyId>,
    },
    /// A module pair was stopped, here or at the other end: no key is made of it until an operator
    /// starts it there.
    ModulePairStopped {
        /// The matching KMA.
        peer: NodeId,
        /// The module pair.
        module_pair: ModulePairId,
        /// Why.
        reason: StopReason,
        /// Whether the other end stopped it.
        at_peer: bool,
    },
    /// A module pair that was stopped was started, here or at the other end.
    ModulePairStarted {
        /// The matching KMA.
        peer: NodeId,
        /// The module pair.
        module_pair: ModulePairId,
        /// Whether the other end started it.
        at_peer: bool,
    },
    /// A QKD-key must not be used, and is quarantined at both ends.
    Quarantined {
        /// The matching KMA.
        peer: NodeId,
        /// The module pair.
        module_pair: ModulePairId,
        /// The QKD-key.
        qkd_key: QkdKeyId,
        /// Why.
        reason: QuarantineReason,
        /// Whether the other end found it.
        at_peer: bool,
    },
    /// A relayed unit was not the same at both ends.
    UnitMismatch {
        /// The stream.
        stream: StreamId,
        /// The unit.
        segment: SegmentNumber,
    },
    /// A message's tag does not fit: it was altered, or its sender lies.
    BadTag {
        /// The sender.
        peer: NodeId,
    },
    /// The peer named bits that it may not use.
    PadMisuse {
        /// The sender.
        peer: NodeId,
    },
    /// The peer's store was replaced; everything shared with it is void.
    PeerStoreReplaced {
        /// The peer.
        peer: NodeId,
    },
    /// The peer's marks are behind what it used, or this node's: one of the two stores was restored
    /// from a copy, or cloned. Nothing is taken from the other or used towards it until an operator
    /// has voided the link, by replacing that store.
    PeerRolledBack {
        /// The peer.
        peer: NodeId,
    },
    /// The ledgers of both ends have link sessions with each other, and none of the last two in common:
    /// one of the two stores was restored from a copy of before them, or cloned. To be mended as
    /// [`Alarm::PeerRolledBack`], which holds here too.
    SessionsApart {
        /// The peer.
        peer: NodeId,
    },
}

impl Alarm {
    /// The peer with which nothing goes on any more until the older one of the two stores is replaced.
    #[must_use]
    pub const fn quarantined_peer(&self) -> Option<&NodeId> {
        match self {
            Self::PeerRolledBack { peer } | Self::SessionsApart { peer } => Some(peer),
            _ => None,
        }
    }
}

/// What the parts of the KMA work with while they handle one input.
pub(crate) struct Cx<'a> {
    pub(crate) now: Now,
    pub(crate) me: &'a NodeId,
    pub(crate) store: &'a mut Store,
    pub(crate) out: &'a mut Vec<Output>,
    pub(crate) backend: Backend,
    /// A store that failed; the next commit reports it.
    pub(crate) failed: &'a mut Option<VaultError>,
}

impl Cx<'_> {
    pub(crate) fn send(&mut self, peer: &NodeId, message: &Message) {
        self.send_bytes(peer, message.encode());
    }

    pub(crate) fn send_bytes(&mut self, peer: &NodeId, bytes: impl Into<Bytes>) {
        self.out.push(Output::Send {
            peer: peer.clone(),
            bytes: bytes.into(),
        });
    }

    /// A store that is of no use any more fails the next commit; one that is full does not.
    pub(crate) fn fail_if_final(&mut self, error: VaultError) {
        if error.is_final() {
            self.failed.get_or_insert(error);
        }
    }

    pub(crate) fn alarm(&mut self, alarm: Alarm) {
        self.out.push(Output::Alarm(alarm));
    }

    pub(crate) fn settle(&mut self, name: QkdKeyName, outcome: Settlement) {
        self.store.forget_received(&name);
        self.out.push(Output::Settle { name, outcome });
    }
}
