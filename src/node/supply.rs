//! Applications' requests, on their way to the agent and back.

use std::collections::BTreeMap;

use qkd_keyfile::{AppId, NodeId, StreamId};
use qkd_kma::{SupplyByIdOrder, SupplyOrder};
use qkd_ksa::{KeySupply, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError, SupplyRequest};
use tokio::sync::{mpsc, oneshot};

use super::agent::Request;

/// The node's supply for its applications.
#[derive(Debug)]
pub(crate) struct NodeSupply {
    pub(crate) me: NodeId,
    /// Where every known application fetches its keys.
    pub(crate) apps: BTreeMap<AppId, NodeId>,
    /// Stock that a node is to have with another, in bytes; the link's capacity for neighbours.
    pub(crate) capacity_bytes: BTreeMap<NodeId, u64>,
    pub(crate) key_bits: u32,
    pub(crate) requests: mpsc::Sender<Request>,
}

impl NodeSupply {
    /// An application fetches its keys at its own node only.
    fn authorise(&self, caller: &AppId) -> Result<(), SupplyError> {
        match self.apps.get(caller) {
            Some(node) if *node == self.me => Ok(()),
            _ => Err(SupplyError::Unauthorised {
                caller: caller.clone(),
            }),
        }
    }

    /// The node of an application that is another's.
    fn node_of(&self, app: &AppId) -> Result<NodeId, SupplyError> {
        let node = self.apps.get(app).filter(|node| **node != self.me);
        node.cloned().ok_or(SupplyError::UnknownDestination {
            destination: app.clone(),
        })
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, SupplyError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(request(reply)).await;
        sent.map_err(|_| SupplyError::Faulty)?;
        answer.await.map_err(|_| SupplyError::Faulty)
    }
}

impl KeySupply for NodeSupply {
    async fn status(&self, caller: &AppId, peer: &AppId) -> Result<StockStatus, SupplyError> {
        self.authorise(caller)?;
        let node = self.node_of(peer)?;
        let status = self.ask(Request::Status).await?;
        let key_bytes = u64::from(self.key_bits / 8).max(1);
        let ours = |stream: &&qkd_kma::store::StreamAccounts| match &stream.stream {
            StreamId::Link(link) => link.peer_of(&self.me) == Some(&node),
            StreamId::EndToEnd {
                source,
                destination,
            } => *source == self.me && *destination == node,
        };
        let stored: u64 = status
            .streams
            .iter()
            .filter(ours)
            .map(|stream| stream.encrypting_bytes / key_bytes)
            .sum();
        let capacity = self.capacity_bytes.get(&node).copied().unwrap_or(0) / key_bytes;
        Ok(StockStatus {
            source: self.me.clone(),
            target: node,
            stored_keys: stored,
            max_keys: capacity.max(stored),
        })
    }

    async fn supply(&self, request: SupplyRequest) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.authorise(&request.caller)?;
        let Some(first) = request.destinations.first().cloned() else {
            return Err(SupplyError::TooManyApplications { asked: 0, most: 0 });
        };
        let destination = self.node_of(&first)?;
        let key_bits = u64::from(request.size.get()) * u64::from(request.number);
        let order = SupplyOrder {
            order: 0,
            master: request.caller.clone(),
            destination,
            applications: request.destinations,
            number: request.number,
            size: request.size,
            level: request.level,
        };
        let result = self.ask(|reply| Request::Supply(order, reply)).await?;
        let number = u64::from(request.number);
        answer(result, &request.caller, &first, number, key_bits)
    }

    async fn supply_by_id(
        &self,
        request: SupplyByIdRequest,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.authorise(&request.caller)?;
        let missing = request.ids.len();
        // To an application that is unknown here, no key was ever given.
        let source = self
            .node_of(&request.master)
            .map_err(|_| SupplyError::UnknownKeys { missing })?;
        let order = SupplyByIdOrder {
            order: 0,
            application: request.caller.clone(),
            master: request.master.clone(),
            source,
            key_ids: request.ids,
        };
        let result = self.ask(|reply| Request::SupplyById(order, reply)).await?;
        match result {
            Err(qkd_kma::SupplyError::UnknownKeyId) => Err(SupplyError::UnknownKeys { missing }),
            result => answer(result, &request.caller, &request.master, missing as u64, 0),
        }
    }
}

fn answer(
    result: Result<Vec<qkd_kma::SuppliedKey>, qkd_kma::SupplyError>,
    caller: &AppId,
    other: &AppId,
    asked_keys: u64,
    asked_bits: u64,
) -> Result<Vec<SuppliedKey>, SupplyError> {
    let keys = result.map_err(|error| match error {
        qkd_kma::SupplyError::NotEnoughKey { .. } => SupplyError::NotEnoughKey {
            asked_bits,
            have_bits: 0,
        },
        qkd_kma::SupplyError::UnknownDestination { .. } => SupplyError::UnknownDestination {
            destination: other.clone(),
        },
        qkd_kma::SupplyError::UnknownKeyId => SupplyError::UnknownKeys { missing: 1 },
        qkd_kma::SupplyError::NotForYou => SupplyError::Unauthorised {
            caller: caller.clone(),
        },
        qkd_kma::SupplyError::Unreachable => SupplyError::TimedOut,
        qkd_kma::SupplyError::BadOrder => SupplyError::TooManyKeys {
            asked: asked_keys,
            most: qkd_kma::KEYS_MAX,
        },
        _ => SupplyError::Faulty,
    })?;
    let supplied = |key: qkd_kma::SuppliedKey| SuppliedKey {
        id: key.key_id,
        key: key.key,
    };
    Ok(keys.into_iter().map(supplied).collect())
}
