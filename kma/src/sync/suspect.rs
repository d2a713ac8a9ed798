//! QKD-keys and proposals that others may know, while they are on their way into the store. What is
//! stored already is the store's.

use qkd_keyfile::{Composition, QkdKeyName, SegmentNumber, StreamId};

use super::LinkSync;
use crate::{io::Cx, wire::DropReason};

impl LinkSync {
    /// Nothing is made of a QKD-key any more, at either end; comparisons that it is in come to nothing.
    pub(crate) fn suspect_qkd_key(&mut self, cx: &mut Cx<'_>, name: &QkdKeyName) {
        let (module_pair, id) = (&name.module_pair, &name.id);
        if name.generation != cx.store.generation(module_pair) {
            return;
        }
        let names_it = |composition: &Composition| {
            let mut pieces = composition.pieces.iter();
            composition.module_pair == *module_pair && pieces.any(|piece| piece.qkd_key == *id)
        };
        let proposed = self.proposals.iter();
        let proposed = proposed.filter(|(_, proposal)| names_it(&proposal.composition));
        for number in proposed.map(|(&number, _)| number).collect::<Vec<_>>() {
            self.abandon(cx, number, std::slice::from_ref(id));
        }
        let compared = self.comparing.iter();
        let compared = compared.filter(|(_, comparing)| names_it(&comparing.propose.composition));
        for number in compared.map(|(&number, _)| number).collect::<Vec<_>>() {
            if let Some(comparing) = self.comparing.remove(&number) {
                self.release(cx, &comparing.propose.composition);
                self.refuse(cx, &comparing.propose, vec![id.clone()]);
            }
        }
        self.drop_free(cx, module_pair, id, DropReason::Gone);
    }

    /// Gives up a proposal, with all that it is made of.
    pub(crate) fn suspect_proposal(
        &mut self,
        cx: &mut Cx<'_>,
        stream: &StreamId,
        segment: SegmentNumber,
    ) {
        if self.stream == *stream {
            self.abandon(cx, segment, &[]);
        }
    }
}
