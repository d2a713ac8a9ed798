//! Credit, and the task that waits for it.

use std::task::{Context, Waker};

/// How many key blocks may still be delivered.
#[derive(Debug, Default)]
pub(crate) struct Credit {
    blocks: u32,
    waiting: Option<Waker>,
}

impl Credit {
    pub(crate) fn grant(&mut self, blocks: u32) {
        self.blocks = self.blocks.saturating_add(blocks);
        self.wake();
    }

    pub(crate) const fn is_there(&self) -> bool {
        self.blocks > 0
    }

    pub(crate) const fn spend(&mut self) {
        self.blocks = self.blocks.saturating_sub(1);
    }

    /// Has the task woken by the next [`grant`](Self::grant) or [`wake`](Self::wake).
    pub(crate) fn wait(&mut self, cx: &Context<'_>) {
        self.waiting = Some(cx.waker().clone());
    }

    /// Wakes the task: something that it waits for may have come.
    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }
}
