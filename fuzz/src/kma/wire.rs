//! Messages between key managers, well-formed and with any values in them: a hostile peer's hand.
//!
//! Written from the description of the messages (postcard: numbers as LEB128, texts and lists with
//! their length before them), so that an input says which message and which values, and most of its
//! bytes get past the decoder.

use qkd_keyfile::KsaKeyId;

use super::Input;

/// The next message of an input. `keys` are IDs that somebody knows.
pub(super) fn message(input: &mut Input<'_>, keys: &[KsaKeyId]) -> Vec<u8> {
    let kind = input.byte() % 28;
    let mut message = Writer {
        input,
        keys,
        out: vec![kind],
    };
    message.body(kind);
    message.out
}

struct Writer<'a, 'b> {
    input: &'a mut Input<'b>,
    keys: &'a [KsaKeyId],
    out: Vec<u8>,
}

impl Writer<'_, '_> {
    fn body(&mut self, kind: u8) {
        match kind {
            // Hello: version, incarnation, boot, the last sessions agreed and begun.
            0 => {
                self.varint(4);
                self.long();
                self.fixed();
                (0..2).for_each(|_| self.perhaps(Self::long));
            }
            // Marks: session, round, part, parts, bindings and cessions known and next, marks.
            1 => {
                self.long();
                (0..3).for_each(|_| self.int());
                (0..4).for_each(|_| self.long());
                self.list(|w| {
                    w.stream();
                    w.long();
                    w.int();
                    w.int();
                });
            }
            // MarksTaken, RolledBack, BindingsTaken, CessionsTaken: one number.
            2 | 3 | 17 | 26 => self.long(),
            // Announce: module pair, generation, the last anew, held, dropped, complete.
            4 => {
                self.pair();
                self.small();
                self.small();
                self.list(|w| {
                    w.qkd_key();
                    w.int();
                });
                self.list(|w| {
                    w.qkd_key();
                    w.small_below(2);
                });
                self.small_below(2);
            }
            // Propose: segment, composition, key type, key ID, unit length, tag.
            5 => {
                self.long();
                self.pair();
                self.small();
                self.list(|w| {
                    w.qkd_key();
                    w.int();
                    w.int();
                });
                self.small_below(2);
                self.fixed();
                self.int();
                self.fixed();
            }
            // Answer: segment, verdict, tag, what is missing.
            6 => {
                self.long();
                self.small_below(4);
                self.fixed();
                self.list(Self::qkd_key);
            }
            // Commit: stream, segment, proof.
            7 => {
                self.stream();
                self.long();
                self.fixed();
            }
            // Completion: stream, segment, way, tag.
            15 => {
                self.stream();
                self.long();
                self.way();
                self.fixed();
            }
            // Pending, Spent, SpentTaken, Suspected: stream, segments.
            8 | 10 | 11 | 20 => {
                self.stream();
                self.list(Self::long);
            }
            // Void: stream, segment.
            9 => {
                self.stream();
                self.long();
            }
            12 => self.relay(),
            // HopTaken: session, sequence. Want: segments acquired, bytes.
            13 | 24 => (0..2).for_each(|_| self.long()),
            // RelayFailed: route, segment.
            14 => {
                self.list(Self::node);
                self.long();
            }
            // Bindings: the first's number, bindings.
            16 => {
                self.long();
                self.list(Self::binding);
            }
            // AskBinding, AskedBindings: key IDs.
            18 | 19 => self.list(Self::key_id),
            // Xor: relay, route, plan, place, ciphertext.
            21 => {
                self.fixed();
                self.list(Self::node);
                self.plan();
                self.small();
                let ciphertext = self.input.short();
                self.varint(ciphertext.len() as u64);
                self.out.extend_from_slice(ciphertext);
            }
            // Cessions: the first's number, streams and segments.
            25 => {
                self.long();
                self.list(|w| {
                    w.stream();
                    w.long();
                });
            }
            // XorTaken: relay, place.
            22 => {
                self.fixed();
                self.small();
            }
            // Renumbered: module pair, generation.
            23 => {
                self.pair();
                self.small();
            }
            // Standing: module pair, why it is stopped at either end, if it is.
            _ => {
                self.pair();
                for _ in 0..2 {
                    self.perhaps(|w| {
                        w.small_below(2);
                    });
                }
            }
        }
    }

    /// Something that may not be there.
    fn perhaps(&mut self, item: impl FnOnce(&mut Self)) {
        if self.small_below(2) == 1 {
            item(self);
        }
    }

    /// A level and hops.
    fn way(&mut self) {
        self.small_below(2);
        self.list(|w| {
            w.node();
            w.node();
            w.small();
            w.small_below(2);
        });
    }

    /// Perhaps a centre, and whether there are random bits.
    fn plan(&mut self) {
        if self.small_below(2) == 1 {
            self.node();
        }
        self.small_below(2);
    }

    /// Pad, a batch's number, or a reservation.
    fn cargo(&mut self) {
        match self.small_below(3) {
            0 => {}
            1 => self.long(),
            _ => {
                self.fixed();
                if self.small_below(2) == 1 {
                    self.plan();
                }
                self.way();
            }
        }
    }

    /// Header (session, sequence, route, segment, fallback, cargo, three lists of spans), ciphertext,
    /// tag.
    fn relay(&mut self) {
        let before = std::mem::take(&mut self.out);
        (0..2).for_each(|_| self.long());
        self.list(Self::node);
        self.long();
        self.small_below(2);
        self.cargo();
        (0..3).for_each(|_| self.list(Self::span));
        let header = std::mem::replace(&mut self.out, before);
        self.varint(header.len() as u64);
        self.out.extend_from_slice(&header);
        let ciphertext = self.input.short();
        self.varint(ciphertext.len() as u64);
        self.out.extend_from_slice(ciphertext);
        self.fixed();
    }

    fn binding(&mut self) {
        self.key_id();
        self.stream();
        self.span();
        self.app();
        self.list(Self::app);
    }

    fn span(&mut self) {
        self.long();
        self.int();
        self.int();
    }

    /// A link or a way, between any two nodes in any order.
    fn stream(&mut self) {
        self.small_below(2);
        self.node();
        self.node();
    }

    fn node(&mut self) {
        let name = self.one_of(&["alice", "bob", "carol", "dave"]);
        self.text(name);
    }

    fn app(&mut self) {
        let name = self.one_of(&["app-alice", "app-bob", "app-carol", "x"]);
        self.text(name);
    }

    fn pair(&mut self) {
        let name = self.one_of(&["pair-0", "pair-1", "pair-2"]);
        self.text(name);
    }

    fn qkd_key(&mut self) {
        let name = match self.input.byte() {
            0xff => u64::MAX.to_string(),
            0xfe => "c74ebf47".to_owned(),
            number => number.to_string(),
        };
        self.text(&name);
    }

    fn key_id(&mut self) {
        let which = self.input.byte();
        match self.keys.get(usize::from(which)) {
            Some(id) => self.out.extend_from_slice(&id.0),
            None => self.out.extend_from_slice(&[which; 16]),
        }
    }

    /// 16 bytes.
    fn fixed(&mut self) {
        let fill = self.input.byte();
        self.out.extend_from_slice(&[fill; 16]);
    }

    fn list(&mut self, mut item: impl FnMut(&mut Self)) {
        let len = self.input.byte() % 8;
        self.varint(u64::from(len));
        (0..len).for_each(|_| item(self));
    }

    /// A number of 64 bits: small ones, those at edges, any.
    fn long(&mut self) {
        let value = match self.input.byte() {
            0xff => u64::MAX,
            0xfe => u64::MAX - 1,
            0xfd => 1 << 63,
            0xfc => 1 << 32,
            0xfb => self.input.u64(),
            small => u64::from(small),
        };
        self.varint(value);
    }

    /// A number of 32 bits; lengths are small multiples, too.
    fn int(&mut self) {
        let value = match self.input.byte() {
            0xff => u32::MAX,
            0xfe => u32::MAX - 1,
            0xfd => 1 << 31,
            0xfc => self.input.u32(),
            many @ 0x80..0xc0 => u32::from(many - 0x80) * 128,
            small => u32::from(small),
        };
        self.varint(u64::from(value));
    }

    fn small(&mut self) {
        let _ = self.small_below(8);
    }

    fn small_below(&mut self, bound: u8) -> u8 {
        let value = self.input.byte() % bound;
        self.out.push(value);
        value
    }

    fn one_of(&mut self, names: &[&'static str]) -> &'static str {
        names[usize::from(self.input.byte()) % names.len()]
    }

    fn text(&mut self, text: &str) {
        self.varint(text.len() as u64);
        self.out.extend_from_slice(text.as_bytes());
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.out.push(value.to_le_bytes()[0]);
    }
}
