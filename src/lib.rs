//! QKD Bridge: configuration, wiring and command line around the stages of a key's journey.
