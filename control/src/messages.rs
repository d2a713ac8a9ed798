//! The messages of Ck.
//!
//! Code, direction and parameters follow the draft of Q.4164, clauses 7 and 8 and Annex A; the
//! framing is [`qkd_keyfile::signal`], the payload one JSON object in snake_case.
//!
//! | code | message | from | answered by |
//! |---|---|---|---|
//! | 0x0001 | key relay next hop request | KM | 0x0002 |
//! | 0x0002 | response to it | controller | |
//! | 0x0003 | notify key relay request | KM | 0x0004 |
//! | 0x0004 | key relay request | controller | 0x0005 |
//! | 0x0005 | response to it | KM | |
//! | 0x8001 | status report (private) | KM | 0x8002 |
//! | 0x8002 | response to a report (private) | controller | |
//! | 0x8003 | alarm report (private) | KM | 0x8002 |
//!
//! An answer repeats the message ID of what it answers.

use std::fmt;

use qkd_keyfile::{AppId, IdError, NodeId, signal};
use qkd_net::json::{JsonError, MemberError};

mod decode;
mod encode;

pub use decode::{BadPayload, Fault, Received, receive};

/// The text of a result that is good.
pub const SUCCESS: &str = "success";
/// The reason when there is no way to the destination.
pub const NO_ROUTE: &str = "no-route";
/// Links in one status report at most, so that it fits a message.
pub const MAX_REPORTED_LINKS: usize = 128;
/// Longest text of an alarm or a reason, in bytes.
pub const MAX_TEXT_BYTES: usize = 256;

/// Where keys are to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A node.
    Node(NodeId),
    /// The node where this application is.
    App(AppId),
}

/// The ID that a controller gives a relay; a UUID if it is ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(AppId);

impl RequestId {
    /// The ID as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl std::str::FromStr for RequestId {
    type Err = IdError;

    /// The document gives no syntax; taken is that of every other ID.
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.parse().map(Self)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a link can carry relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It can.
    Up,
    /// It cannot.
    Down,
}

/// What a node tells about one of its links (Y.3803 clause 8.2.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkReport {
    /// The node at the other end.
    pub peer: NodeId,
    /// Key data that can still be sent towards the peer, in bits.
    pub outgoing_bits: u64,
    /// Key data that the peer can still send here, in bits.
    pub incoming_bits: u64,
    /// Rate at which the link's module pairs make keys.
    pub key_rate_bits_per_second: u64,
    /// Whether it can carry relays.
    pub state: LinkState,
}

/// An alarm on one of a node's links, raised or over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlarmReport {
    /// The node at the other end of the link.
    pub peer: NodeId,
    /// True: the link carries no relays until the alarm is over.
    pub raised: bool,
    /// What happened, for people; up to [`MAX_TEXT_BYTES`], the rest is cut off.
    pub text: String,
}

/// A message, without its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// 0x0001: where to next?
    NextHopRequest {
        /// Where the whole route begins.
        source: Option<NodeId>,
        /// Where it ends.
        destination: Destination,
    },
    /// 0x0002: the possible next hops, the best first; none: there is no route.
    NextHopResponse {
        /// Where the whole route begins.
        source: Option<NodeId>,
        /// The destination's node; mandatory where an application was asked for.
        destination: Option<NodeId>,
        /// The possible next hops.
        next: Vec<NodeId>,
        /// Why there is none.
        error: Option<String>,
    },
    /// 0x0003: which way?
    NotifyRelayRequest {
        /// Where the route begins.
        source: Option<NodeId>,
        /// Where it ends.
        destination: Destination,
    },
    /// 0x0004: this way, or no way.
    RelayRequest {
        /// Where the route begins.
        source: Option<NodeId>,
        /// Where it ends.
        destination: NodeId,
        /// The nodes between, in order; none: the destination is a neighbour.
        transit: Vec<NodeId>,
        /// The relay's ID.
        request_id: Option<RequestId>,
        /// If there is one, there is no route, whatever the rest says.
        error: Option<String>,
    },
    /// 0x0005: how the relay ended.
    RelayResponse {
        /// [`SUCCESS`] or the reason of the failure.
        response: String,
        /// The relay's ID, if it had one.
        request_id: Option<RequestId>,
    },
    /// 0x8001: the state of up to [`MAX_REPORTED_LINKS`] links.
    StatusReport {
        /// The links.
        links: Vec<LinkReport>,
    },
    /// 0x8002: whether a report was taken.
    ReportResponse {
        /// [`SUCCESS`] or the reason of the failure.
        response: String,
    },
    /// 0x8003: an alarm.
    AlarmReport(AlarmReport),
}

/// A command code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs, reason = "see the table of the module")]
pub enum Command {
    NextHopRequest = 0x0001,
    NextHopResponse = 0x0002,
    NotifyRelayRequest = 0x0003,
    RelayRequest = 0x0004,
    RelayResponse = 0x0005,
    StatusReport = 0x8001,
    ReportResponse = 0x8002,
    AlarmReport = 0x8003,
}

/// Every command code.
pub const COMMANDS: [Command; 8] = [
    Command::NextHopRequest,
    Command::NextHopResponse,
    Command::NotifyRelayRequest,
    Command::RelayRequest,
    Command::RelayResponse,
    Command::StatusReport,
    Command::ReportResponse,
    Command::AlarmReport,
];

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The key manager.
    Km,
    /// The controller.
    Controller,
}

impl Command {
    /// The command of a code, if there is one.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        COMMANDS.into_iter().find(|command| command.code() == code)
    }

    /// The code.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// Whether the code is ours and not of the document.
    #[must_use]
    pub const fn is_private(self) -> bool {
        self.code() >= 0x8000
    }

    /// Who sends it.
    #[must_use]
    pub const fn sender(self) -> End {
        match self {
            Self::NextHopRequest
            | Self::NotifyRelayRequest
            | Self::RelayResponse
            | Self::StatusReport
            | Self::AlarmReport => End::Km,
            Self::NextHopResponse | Self::RelayRequest | Self::ReportResponse => End::Controller,
        }
    }
}

impl Message {
    /// Its command.
    #[must_use]
    pub const fn command(&self) -> Command {
        match self {
            Self::NextHopRequest { .. } => Command::NextHopRequest,
            Self::NextHopResponse { .. } => Command::NextHopResponse,
            Self::NotifyRelayRequest { .. } => Command::NotifyRelayRequest,
            Self::RelayRequest { .. } => Command::RelayRequest,
            Self::RelayResponse { .. } => Command::RelayResponse,
            Self::StatusReport { .. } => Command::StatusReport,
            Self::ReportResponse { .. } => Command::ReportResponse,
            Self::AlarmReport(_) => Command::AlarmReport,
        }
    }

    /// Header and payload.
    ///
    /// # Errors
    ///
    /// The payload is longer than 65 535 bytes; nothing was written. Routes of up to 900 hops and
    /// [`MAX_REPORTED_LINKS`] links always fit.
    pub fn encode(&self, message_id: u32) -> Result<Vec<u8>, signal::PayloadTooLong> {
        let payload = encode::payload(self).to_string();
        signal::encode_message(message_id, self.command().code(), payload.as_bytes())
    }
}

/// `text`, cut to [`MAX_TEXT_BYTES`].
pub(crate) fn shortened(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
