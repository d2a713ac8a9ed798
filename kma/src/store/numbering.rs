//! Which QKD-keys may still come in, and of which module pairs.

use std::collections::BTreeMap;

use qkd_keyfile::{Generation, ModulePairId, QkdKeyName};

use super::Store;
use crate::{
    record::{Record, StopReason},
    state::Numbering,
};

/// IDs in one record.
const IDS_MAX: usize = 4096;

impl Store {
    /// The generation of a module pair's QKD-keys.
    #[must_use]
    pub fn generation(&self, module_pair: &ModulePairId) -> Generation {
        let numbering = self.state.numberings.get(module_pair);
        numbering.map_or(Generation::default(), |numbering| numbering.generation)
    }

    pub(crate) fn numbering(&self, module_pair: &ModulePairId) -> Option<&Numbering> {
        self.state.numberings.get(module_pair)
    }

    /// Raises the generation, or notes the module's session.
    pub(crate) fn set_numbering(
        &mut self,
        module_pair: &ModulePairId,
        generation: Generation,
        anew: Generation,
        session: Option<u64>,
    ) {
        self.record(Record::Numbering {
            module_pair: module_pair.clone(),
            generation,
            anew,
            session,
        });
    }

    /// Whether the QKD-key entered a composition or was dropped before, or is of an earlier
    /// generation.
    pub(crate) fn is_used(&self, name: &QkdKeyName) -> bool {
        let numbering = self.state.numberings.get(&name.module_pair);
        numbering.is_some_and(|numbering| {
            name.generation < numbering.generation
                || (name.generation == numbering.generation && numbering.used.contains(&name.id))
        })
    }

    /// Why a module pair is stopped here, if it is.
    pub(crate) fn stopped(&self, module_pair: &ModulePairId) -> Option<StopReason> {
        self.state.stopped.get(module_pair).copied()
    }

    /// Stops a module pair; says whether it was not stopped before.
    pub(crate) fn stop_module_pair(
        &mut self,
        module_pair: &ModulePairId,
        reason: StopReason,
    ) -> bool {
        let news = self.stopped(module_pair).is_none();
        if news {
            let module_pair = module_pair.clone();
            self.record(Record::ModulePairStopped {
                module_pair,
                reason,
            });
        }
        news
    }

    /// Starts a module pair; says whether it was stopped.
    pub(crate) fn start_module_pair(&mut self, module_pair: &ModulePairId) -> bool {
        let news = self.stopped(module_pair).is_some();
        if news {
            let module_pair = module_pair.clone();
            self.record(Record::ModulePairStarted { module_pair });
        }
        news
    }

    /// Others may know QKD-keys: none of them comes in any more.
    pub fn suspect_qkd_keys(&mut self, names: impl IntoIterator<Item = QkdKeyName>) {
        self.use_qkd_keys(names);
    }

    /// A QKD-key is settled: what its module said about it is with its segments.
    pub(crate) fn forget_received(&mut self, name: &QkdKeyName) {
        self.received.forget(name);
    }

    /// Settles QKD-keys: they never come in again.
    pub(crate) fn use_qkd_keys(&mut self, names: impl IntoIterator<Item = QkdKeyName>) {
        let mut by_pair: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for name in names {
            if self.is_used(&name) {
                continue;
            }
            by_pair
                .entry((name.module_pair, name.generation))
                .or_default()
                .push(name.id);
        }
        for ((module_pair, generation), ids) in by_pair {
            for ids in ids.chunks(IDS_MAX) {
                self.record(Record::QkdKeysUsed {
                    module_pair: module_pair.clone(),
                    generation,
                    ids: ids.to_vec(),
                });
            }
        }
    }
}
