//! The store's operations by themselves, for the bench that sets their cost against the stock. Whoever
//! uses keys goes through [`Kma`](crate::Kma), which keeps the rules between these.

use qkd_keyfile::{
    KeySpan, KmaKeyId, LinkId, NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::Pool;

use super::{NewSegment, Store};
use crate::{
    record::{Purpose, Stage},
    vault::{Vault, VaultError},
};

/// Segments that are stored in one commit while a stock is made.
const AT_ONCE: u64 = 512;

/// A stock of one link, of segments of one length; every other one is owned by this end.
#[derive(Debug)]
pub struct Bench {
    store: Store,
    stream: StreamId,
    segment_bytes: u32,
    stored: u64,
    confirmed: u64,
    /// Those before are the stock, or were used.
    made: u64,
    /// Where the other end is with its segments.
    followed: (u64, u32),
}

impl Bench {
    /// Makes a stock of so many segments; `progress` is told how many are stored, now and then.
    ///
    /// # Errors
    ///
    /// The vault's.
    pub fn new(
        vault: Box<dyn Vault>,
        pool: Pool,
        segments: u64,
        segment_bytes: u32,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, VaultError> {
        let name = |text: &str| {
            let id = text.parse::<NodeId>();
            id.unwrap_or_else(|_| unreachable!("a good name"))
        };
        let link = LinkId::between(&name("alice"), &name("bob"));
        let link = link.unwrap_or_else(|| unreachable!("two nodes"));
        let mut bench = Self {
            store: Store::open(vault, pool, [7; 16])?,
            stream: StreamId::Link(link),
            segment_bytes,
            stored: 0,
            confirmed: 0,
            made: 0,
            followed: (1, 0),
        };
        for at in 0..segments {
            bench.answer()?;
            bench.confirm();
            if at % AT_ONCE == AT_ONCE - 1 {
                bench.commit()?;
                progress(at + 1);
            }
        }
        bench.commit()?;
        bench.made = bench.confirmed;
        Ok(bench)
    }

    /// Stores a segment that the other end has yet to confirm.
    ///
    /// # Errors
    ///
    /// As [`Store`]'s.
    pub fn answer(&mut self) -> Result<(), VaultError> {
        let number = self.stored;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        let mut key = self.store.pool().take(self.segment_bytes as usize)?;
        key.expose_mut().fill(0x5A);
        self.stored += 1;
        self.store.store(NewSegment {
            stream: self.stream.clone(),
            number: SegmentNumber(number),
            stage: Stage::Answered,
            key_type: if number.is_multiple_of(2) {
                KeyType::Encrypting
            } else {
                KeyType::Decrypting
            },
            total_bits: self.segment_bytes * 8,
            head_bytes: 0,
            level: SecurityLevel::Qkd,
            kma_key_id: KmaKeyId(id),
            composition: None,
            key,
            relayed: None,
        })
    }

    /// Confirms the oldest of those.
    pub fn confirm(&mut self) {
        let segment = SegmentNumber(self.confirmed);
        assert!(self.store.confirm(&self.stream, segment), "one waits");
        self.confirmed += 1;
    }

    /// Takes a key of this end's.
    pub fn take(&mut self, len_bytes: u32) {
        let spans = self.store.plan_pad(&self.stream, len_bytes, 0);
        let spans = spans.unwrap_or_else(|short| unreachable!("the stock is larger: {short}"));
        self.store.take(&self.stream, &spans, Purpose::Pad);
    }

    /// Follows the other end, which used a key of its own.
    pub fn follow(&mut self, len_bytes: u32) {
        // Some numbers belong to segments that were forgotten.
        while self.followed.1 == 0
            && self.followed.0 < self.stored
            && self
                .store
                .segment(&self.stream, SegmentNumber(self.followed.0))
                .is_none()
        {
            self.followed.0 += 2;
        }
        let (segment, offset_bytes) = self.followed;
        let span = KeySpan {
            segment: SegmentNumber(segment),
            offset_bytes,
            len_bytes,
        };
        let followed = self.store.follow(&self.stream, &[span], Purpose::Pad);
        assert_eq!(followed, Ok(()), "{span:?}");
        let next = offset_bytes + len_bytes;
        self.followed = if next + len_bytes > self.segment_bytes {
            (segment + 2, 0)
        } else {
            (segment, next)
        };
    }

    /// Reads the key that would be taken next, as supply does.
    pub fn read(&mut self, len_bytes: u32) {
        let spans = self.store.plan_pad(&self.stream, len_bytes, 0);
        let spans = spans.unwrap_or_else(|short| unreachable!("the stock is larger: {short}"));
        let key = self.store.read_all(&self.stream, &spans);
        assert!(key.is_ok_and(|key| key.expose()[0] == 0x5A));
    }

    /// Forgets the segments that were confirmed after the stock was made, whole.
    pub fn forget_confirmed_beyond_stock(&mut self) {
        for number in self.made..self.confirmed {
            self.store.close(&self.stream, SegmentNumber(number));
        }
        self.made = self.confirmed;
    }

    /// Closes what is used up, and makes everything durable.
    ///
    /// # Errors
    ///
    /// The vault's.
    pub fn commit(&mut self) -> Result<(), VaultError> {
        let stream = self.store.stream(&self.stream);
        let done = stream.map(|stream| stream.spent.iter().chain(&stream.finished));
        for segment in done.into_iter().flatten().copied().collect::<Vec<_>>() {
            self.store.close(&self.stream, segment);
        }
        self.store.commit()
    }
}
