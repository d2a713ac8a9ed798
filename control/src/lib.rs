//! The QKDN controller: which way keys are relayed, over the Ck interface (Q.4164 draft).
//!
//! - [`messages`]: what travels, as types: codes 0x0001 to 0x0005 of the document, and private codes
//!   from 0x8001 for what it names but gives no code (status and alarms).
//! - [`topology`]: nodes, links and what is known of them; shortest routes.
//! - [`controller`]: the controller's end of a connection.
//! - [`client`]: the key manager's end.
//! - [`shell`]: both ends on TLS, with reconnect.
//!
//! It knows nothing of keys: no message carries key data (Q.4160 Table 1), and this crate has no way
//! to hold any.
//!
//! # Invariants
//!
//! - A node reports about its own links only, and asks for routes that begin at itself.
//! - The key manager takes no route on trust: it must start at a neighbour, visit nobody twice, stay
//!   under the hop limit and end where it was asked to.
//! - A question is answered, refused or timed out; it never stays open.
#![forbid(unsafe_code)]

pub mod client;
pub mod controller;
pub mod messages;
pub mod shell;
pub mod topology;

pub use client::{AskError, Client, ClientConfig, ClientEvent, QueryId, RouteFailure};
pub use controller::{Controller, ControllerCounters, Session};
pub use messages::{AlarmReport, Destination, LinkReport, LinkState, Message, RequestId};
pub use shell::{ControllerLink, ControllerLinkConfig, serve};
pub use topology::{LinkView, NetworkLink, Topology, TopologyError};
