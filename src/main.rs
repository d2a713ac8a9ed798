//! The `qkd-bridge` program; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    qkd_bridge::command::main()
}
