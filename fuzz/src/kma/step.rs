//! What an input does to the network.

/// What a step is, by its first byte.
pub(super) enum Step {
    /// The next message arrives.
    Deliver,
    /// All messages arrive, and those that answer them.
    Drain,
    /// Time passes, a quarter of a second at once: all messages arrive, and again, up to 8 times.
    Wait,
    /// The next message is lost.
    Lose,
    /// The next message arrives twice.
    Repeat,
    /// Bytes of the next message are changed, and its length.
    Damage,
    /// Any bytes arrive, from any peer.
    Forge,
    /// A well-formed message with any values in it arrives, from any peer.
    Tell,
    /// An earlier message arrives again, from whoever, wherever.
    Replay,
    /// A module pair delivers a QKD-key at both ends.
    Key,
    /// It delivers at one end, or unlike bits.
    OddKey,
    /// An application asks for keys.
    Supply,
    /// An application asks for keys by ID.
    Fetch,
    /// A connection ends, or comes back.
    Connection,
    /// A node loses power, and starts again.
    Crash,
}

impl Step {
    pub(super) fn of(byte: u8) -> Self {
        match byte % 16 {
            0 => Self::Deliver,
            1 => Self::Drain,
            2 | 15 => Self::Wait,
            3 => Self::Lose,
            4 => Self::Repeat,
            5 => Self::Damage,
            6 => Self::Forge,
            7 => Self::Replay,
            8 => Self::Key,
            9 => Self::OddKey,
            10 => Self::Supply,
            11 => Self::Fetch,
            12 => Self::Connection,
            14 => Self::Tell,
            _ => Self::Crash,
        }
    }
}
