//! Key management agent: agree with the matching node, store, account for every bit, relay.
