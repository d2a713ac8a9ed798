//! The `qkd-bridge` program; everything is in the library.

use std::process::ExitCode;

/// Messages are allocated by one thread and freed by another, some hundred thousand times a second: the C
/// library's allocator gives their pages back to the system and asks for them again (`docs/benchmarks.md`).
/// Key memory is not its business.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    qkd_bridge::command::main()
}
