//! `completions`: shell completion, from the command line's own definition.

use clap::CommandFactory;

pub(super) fn print(shell: clap_complete::Shell) {
    let mut command = super::Cli::command();
    clap_complete::generate(shell, &mut command, "qkd-bridge", &mut std::io::stdout());
}
