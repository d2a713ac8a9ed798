//! The `qkd-bridge` program.

fn main() {}
