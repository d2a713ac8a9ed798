//! Standard output whose reader may go away: `| head` is no fault of the program.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
};

/// As the standard library's, but a reader that has gone is no reason to stop; the work goes on.
macro_rules! println {
    () => { $crate::output::print(format_args!("\n")) };
    ($($argument:tt)*) => { $crate::output::print(format_args!("{}\n", format_args!($($argument)*))) };
}

/// As [`println`], without the end of the line.
macro_rules! print {
    ($($argument:tt)*) => { $crate::output::print(format_args!($($argument)*)) };
}

/// Ends the process where standard output cannot be written to for another reason, such as a full disk: what
/// was asked for is then missing.
pub(crate) fn print(text: Arguments<'_>) {
    match io::stdout().lock().write_fmt(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("qkd-bridge: cannot write to standard output: {error}");
            std::process::exit(1);
        }
        _ => {}
    }
}
