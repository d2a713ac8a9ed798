//! The formats and the ring that QKD hardware and the bridge share.
