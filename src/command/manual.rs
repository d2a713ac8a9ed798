//! `man`: manual pages, from the command line's own definition.

use std::{io, path::Path};

use clap::CommandFactory;

pub(super) fn write(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(super::Cli::command(), dir)
}
