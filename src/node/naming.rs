//! What QKD-keys are called from the driver on: the generation of their module pair's numbering.

use qkd_keyfile::{Generation, ModulePairId, QkdKeyId, QkdKeyName};
use tokio::sync::{mpsc, watch};

use super::agent::Request;

/// What the agent says of a module pair's numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named {
    /// Of QKD-keys that are read now.
    pub(crate) generation: Generation,
    /// The session of the module that it holds for, if the module told one.
    pub(crate) session: Option<u64>,
}

/// The names that one module's QKD-keys are given.
///
/// When the module begins a session, nothing is read from it until both ends have agreed on a
/// generation: no QKD-key of one numbering is called as one of another.
#[derive(Debug)]
pub(crate) struct Naming {
    named: watch::Receiver<Option<Named>>,
    requests: mpsc::Sender<Request>,
    session: Option<u64>,
    /// The generation in which the module's session began here: what is settled of earlier ones
    /// means nothing to the module any more.
    began: Generation,
}

impl Naming {
    pub(crate) fn new(
        named: watch::Receiver<Option<Named>>,
        requests: mpsc::Sender<Request>,
    ) -> Self {
        Self {
            named,
            requests,
            session: None,
            began: Generation::default(),
        }
    }

    /// The name of a QKD-key that was read now.
    pub(crate) fn name(&self, module_pair: &ModulePairId, id: QkdKeyId) -> QkdKeyName {
        QkdKeyName {
            module_pair: module_pair.clone(),
            // Nothing is read before it is known.
            generation: self
                .named
                .borrow()
                .map_or_else(Generation::default, |named| named.generation),
            id,
        }
    }

    /// Whether the module knows of a QKD-key by this name.
    pub(crate) fn is_of_session(&self, name: &QkdKeyName) -> bool {
        name.generation >= self.began
    }

    /// The module tells its session; whether it is another one than before. Then
    /// [`Naming::agreed`] has to be waited for.
    pub(crate) async fn attached(&mut self, module_pair: &ModulePairId, session: u64) -> bool {
        if self.session == Some(session) {
            return false;
        }
        self.session = Some(session);
        let module_pair = module_pair.clone();
        let request = Request::Session {
            module_pair,
            session,
        };
        // Nobody listens only when the node is stopping.
        self.requests.send(request).await.is_ok()
    }

    /// Waits until the agent has a generation, for the module's session if it told one.
    pub(crate) async fn agreed(&mut self) {
        let session = self.session;
        let fits = |named: &Option<Named>| {
            named.is_some_and(|named| session.is_none() || named.session == session)
        };
        let named = self.named.wait_for(fits).await.map(|named| *named);
        match named {
            Ok(Some(named)) if session.is_some() => self.began = named.generation,
            Ok(_) => {}
            // The agent has ended, and the node with it.
            Err(_) => std::future::pending::<()>().await,
        }
    }
}
