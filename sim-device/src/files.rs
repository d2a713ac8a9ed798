//! qcrypto's final-key files in a directory.
//!
//! As qcrypto does it: the file is named for the block's first epoch, created with mode 0600 and
//! written in place, so that a reader may find it half written. A block counts as delivered when its
//! file is closed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::atomic::AtomicBool,
    time::Duration,
};

use qkd_handover::type7::{self, Header, Type7Error};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    feed::{self, Feed},
    is_stopped,
    pair::{Block, Half},
    stats::Stats,
};

/// Where the files go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesConfig {
    /// The directory; made if it is not there.
    pub directory: PathBuf,
    /// Most files that wait to be taken; then the module pauses.
    #[serde(default = "default_max_waiting")]
    pub max_waiting: u32,
}

/// Why files could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The directory cannot be made or read.
    #[error("cannot use the directory {}", .directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Epochs have 32 bits.
    #[error("block number {number} is no epoch")]
    Epoch {
        /// The number.
        number: u64,
    },
    /// The block does not fit the format.
    #[error(transparent)]
    Format(#[from] Type7Error),
}

const fn default_max_waiting() -> u32 {
    1000
}

/// How many files are written between two looks at how many wait.
const LOOK_EVERY: u32 = 32;

/// Writes files until `stop` is set or all blocks are written.
///
/// # Errors
///
/// See [`FilesError`]; a file that was begun is removed.
pub fn run(
    half: Half,
    config: &FilesConfig,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), FilesError> {
    let directory = |source| FilesError::Directory {
        directory: config.directory.clone(),
        source,
    };
    fs::create_dir_all(&config.directory).map_err(directory)?;
    stats.set_connected(true);
    let mut feed = Feed::new(half, stats);
    let mut room = 0;
    while !is_stopped(stop) && !feed.is_finished() {
        if room == 0 {
            let waiting = fs::read_dir(&config.directory).map_err(directory)?.count();
            let waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
            room = config.max_waiting.saturating_sub(waiting).min(LOOK_EVERY);
        }
        if room == 0 {
            feed::sleep(Duration::from_millis(10), stop);
            continue;
        }
        let Some(block) = feed.poll_next() else {
            feed::sleep(feed.nap(), stop);
            continue;
        };
        write(&block, config)?;
        stats.add_delivered(block.key_bits);
        room -= 1;
    }
    stats.set_connected(false);
    Ok(())
}

fn write(block: &Block, config: &FilesConfig) -> Result<(), FilesError> {
    let header = Header {
        tag: type7::TAG,
        first_epoch: u32::try_from(block.number).map_err(|_| FilesError::Epoch {
            number: block.number,
        })?,
        epochs: 1,
        key_bits: block.key_bits,
    };
    let mut words = Zeroizing::new(vec![0; type7::words_bytes(block.key_bits)]);
    type7::encode_words(block.key_bits, block.key(), &mut words)?;
    let path = config.directory.join(header.file_name());
    write_in_place(&path, &header, &words).map_err(|source| {
        // Half a key is of no use to anyone; that it could not be removed changes nothing.
        let _ = fs::remove_file(&path);
        FilesError::Write { path, source }
    })
}

fn write_in_place(path: &std::path::Path, header: &Header, words: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&header.encode())?;
    file.write_all(words)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        config::tests::config,
        pair::{ModulePair, Role},
    };

    #[test]
    fn every_file_holds_its_block_and_nothing_is_readable_by_others() {
        let mut pair = config();
        (pair.first_number, pair.blocks) = (0xbe00, Some(40));
        pair.faults.empty_per_million = 200_000;
        let directory = tempfile::tempdir().unwrap();
        let config = FilesConfig {
            directory: directory.path().join("new"),
            max_waiting: 100,
        };
        let stats = Stats::default();
        let pair = ModulePair::new(&pair).unwrap();
        let half = pair.half(Role::Receiver);
        run(half, &config, &AtomicBool::new(false), &stats).unwrap();

        let half = pair.half(Role::Transmitter);
        let mut bits = 0;
        for number in 0xbe00..0xbe00 + 40_u64 {
            let block = half.block(number).unwrap();
            let name = format!("{number:08x}");
            let path = config.directory.join(&name);
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let bytes = fs::read(&path).unwrap();
            let (head, words) = bytes.split_first_chunk().unwrap();
            let header = Header::decode(head).unwrap();
            header.check_name(&name).unwrap();
            let mut key = vec![0; block.key().len()];
            type7::decode_key(&header, words, &mut key).unwrap();
            assert_eq!(key, block.key());
            bits += u64::from(header.key_bits);
        }
        let done = stats.snapshot();
        assert_eq!((done.delivered, done.delivered_bits), (40, bits));
        assert!(bits < 40 * 1001 && !done.connected);
    }

    #[test]
    fn a_full_directory_pauses_the_module_until_files_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let config_of_files = FilesConfig {
            directory: directory.path().to_owned(),
            max_waiting: 5,
        };
        let mut pair = config();
        pair.blocks = Some(12);
        let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
        let (stop, stats) = (AtomicBool::new(false), Stats::default());
        let mut taken = 0;
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(half, &config_of_files, &stop, &stats));
            while taken < 12 {
                let entries: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
                assert!(entries.len() <= 5);
                for entry in entries {
                    fs::remove_file(entry.unwrap().path()).unwrap();
                    taken += 1;
                }
            }
            running.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_number_that_is_no_epoch_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let config_of_files = FilesConfig {
            directory: directory.path().to_owned(),
            max_waiting: 5,
        };
        let mut pair = config();
        pair.first_number = 1 << 32;
        let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
        let stop = AtomicBool::new(false);
        let error = run(half, &config_of_files, &stop, &Stats::default()).unwrap_err();
        assert!(matches!(error, FilesError::Epoch { number } if number == 1 << 32));
    }
}
