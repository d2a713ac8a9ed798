//! Blocks of a numbered stream that were delivered and are not settled.

use std::collections::VecDeque;

use qkd_keyfile::QkdKeyId;

/// Turns settlements, which come in any order, into the one position that a stream acknowledges: up
/// to where everything is settled.
#[derive(Debug)]
pub(crate) struct Outstanding<P>(VecDeque<Block<P>>);

#[derive(Debug)]
struct Block<P> {
    position: P,
    /// `None` once it is settled.
    id: Option<QkdKeyId>,
}

impl<P> Default for Outstanding<P> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<P> Outstanding<P> {
    /// A block was delivered. Positions ascend.
    pub(crate) fn push(&mut self, position: P, id: QkdKeyId) {
        self.0.push_back(Block {
            position,
            id: Some(id),
        });
    }

    /// A position went by that the layer above has nothing to settle about. Returns as
    /// [`settle`](Self::settle).
    pub(crate) fn pass(&mut self, position: P) -> Option<P> {
        self.0.push_back(Block { position, id: None });
        self.settled_up_to()
    }

    /// Returns up to where everything is settled now, if that has moved.
    pub(crate) fn settle(&mut self, id: &QkdKeyId) -> Option<P> {
        let block = self
            .0
            .iter_mut()
            .find(|block| block.id.as_ref() == Some(id))?;
        block.id = None;
        self.settled_up_to()
    }

    /// Forgets all: what they belonged to has ended.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    fn settled_up_to(&mut self) -> Option<P> {
        let mut last = None;
        while self.0.front().is_some_and(|block| block.id.is_none()) {
            last = self.0.pop_front().map(|block| block.position);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unbroken_run_is_acknowledged() {
        let id = |n: u64| n.to_string().parse::<QkdKeyId>().unwrap();
        let mut outstanding = Outstanding::default();
        for n in [5, 6, 8] {
            outstanding.push(n, id(n));
        }
        assert_eq!(outstanding.settle(&id(6)), None);
        assert_eq!(outstanding.pass(9), None);
        assert_eq!(outstanding.settle(&id(5)), Some(6));
        assert_eq!(outstanding.settle(&id(5)), None);
        assert_eq!(outstanding.settle(&id(8)), Some(9));
        assert_eq!(outstanding.pass(10), Some(10));
    }
}
