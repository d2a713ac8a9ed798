//! Hand-over files in a directory, in the forms of several vendors ([`FileFormat`]).
//!
//! As qcrypto does it: a file is created with mode 0600 and written in place, so that a reader may find
//! it half written. A block counts as delivered when it is written.

mod format;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

pub use self::format::FileFormat;
use self::format::Piece;
use crate::{
    faults::{WireFault, picked},
    feed::{self, Feed},
    is_stopped,
    pair::Block,
    stats::Stats,
};
use qkd_handover::{hex_lines::HexLineError, r10::R10Error, type7::Type7Error};
use serde::Deserialize;

/// Where the files go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesConfig {
    /// The directory; made if it is not there.
    pub directory: PathBuf,
    /// Most files that wait to be taken; then the module pauses.
    #[serde(default = "default_max_waiting")]
    pub max_waiting: u32,
    /// In what form.
    #[serde(default)]
    pub format: FileFormat,
    /// Name of the file, where blocks are appended to one.
    #[serde(default)]
    pub file: Option<String>,
    /// Name of the peer, which the names of hexadecimal files begin with.
    #[serde(default)]
    pub peer: Option<String>,
}

impl FilesConfig {
    /// The defaults for a directory.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            max_waiting: default_max_waiting(),
            format: FileFormat::default(),
            file: None,
            peer: None,
        }
    }

    fn file_name(&self, usual: &str) -> String {
        self.file.clone().unwrap_or_else(|| usual.to_owned())
    }
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
    /// Epochs, and the key IDs of some formats, have 32 bits.
    #[error("block number {number} is no epoch")]
    Epoch {
        /// The number.
        number: u64,
    },
    /// The block does not fit the format.
    #[error(transparent)]
    Format(#[from] Type7Error),
    /// The keys do not fit lines.
    #[error(transparent)]
    Lines(#[from] HexLineError),
    /// The block does not fit a record.
    #[error(transparent)]
    Record(#[from] R10Error),
}

const fn default_max_waiting() -> u32 {
    1000
}

/// Time between two looks at how the module is.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// How many files are written between two looks at how many wait.
const LOOK_EVERY: u32 = 32;

/// Pieces that a file comes in that is split, and the time between two of them.
const PIECES: usize = 4;
const PIECE_PAUSE: Duration = Duration::from_millis(10);

/// Writes files until `stop` is set or all blocks are written.
///
/// # Errors
///
/// See [`FilesError`]; a file that was begun is removed.
pub(crate) fn run(
    mut feed: Feed<'_>,
    config: &FilesConfig,
    stall: Duration,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), FilesError> {
    let directory = |source| FilesError::Directory {
        directory: config.directory.clone(),
        source,
    };
    fs::create_dir_all(&config.directory).map_err(directory)?;
    stats.set_connected(true);
    let mut writer = Writer {
        config,
        stall,
        held: None,
        again: None,
    };
    let mut room = 0;
    let mut status_at = Instant::now();
    while !is_stopped(stop) && !feed.is_finished() {
        if status_at <= Instant::now() {
            status_at = Instant::now() + STATUS_EVERY;
            feed.status();
        }
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
        writer.deliver(block, stop, stats)?;
        room -= 1;
    }
    writer.finish(stats)?;
    stats.set_connected(false);
    Ok(())
}

/// Writes files, with what is planned to happen to them.
struct Writer<'a> {
    config: &'a FilesConfig,
    /// How long a stall is.
    stall: Duration,
    /// A block that the next overtakes.
    held: Option<Block>,
    /// A block that comes again.
    again: Option<Block>,
}

impl Writer<'_> {
    fn deliver(
        &mut self,
        block: Block,
        stop: &AtomicBool,
        stats: &Stats,
    ) -> Result<(), FilesError> {
        let Some(mut piece) = format::piece(self.config, &block)? else {
            return Ok(());
        };
        match block.fault {
            Some(WireFault::Drop) => return Ok(()),
            Some(WireFault::Reorder) if self.held.is_none() => {
                self.held = Some(block);
                return Ok(());
            }
            Some(WireFault::HangUp) => return self.cut_off(&piece),
            Some(WireFault::Flip(pick)) => {
                let bit = picked(pick, piece.bytes.len() * 8);
                piece.bytes[bit / 8] ^= 0x80 >> (bit % 8);
            }
            Some(WireFault::Stall) => {
                feed::sleep(self.stall, stop);
            }
            Some(WireFault::Split | WireFault::Duplicate | WireFault::Reorder) | None => {}
        }
        let split = block.fault == Some(WireFault::Split);
        self.write(&piece, if split { PIECES } else { 1 })?;
        stats.add_delivered(piece.key_bits);
        for late in [self.held.take(), self.again.take()].into_iter().flatten() {
            self.whole(&late, stats)?;
        }
        if block.fault == Some(WireFault::Duplicate) {
            self.again = Some(block);
        }
        Ok(())
    }

    fn finish(&mut self, stats: &Stats) -> Result<(), FilesError> {
        for late in [self.held.take(), self.again.take()].into_iter().flatten() {
            self.whole(&late, stats)?;
        }
        Ok(())
    }

    fn whole(&self, block: &Block, stats: &Stats) -> Result<(), FilesError> {
        let Some(piece) = format::piece(self.config, block)? else {
            return Ok(());
        };
        self.write(&piece, 1)?;
        match block.fault {
            Some(WireFault::Duplicate) => stats.add_sent_again(1),
            _ => stats.add_delivered(piece.key_bits),
        }
        Ok(())
    }

    /// Half a file, as when the power fails. A file that is appended to is begun anew instead: after
    /// half a record nothing in it could be read.
    fn cut_off(&self, piece: &Piece) -> Result<(), FilesError> {
        let half = match self.config.format.is_appended() {
            true => 0,
            false => piece.bytes.len() / 2,
        };
        let path = self.config.directory.join(&piece.name);
        write_in_place(&path, &[&piece.bytes[..half]], false)
            .map_err(|source| FilesError::Write { path, source })
    }

    fn write(&self, piece: &Piece, pieces: usize) -> Result<(), FilesError> {
        let path = self.config.directory.join(&piece.name);
        let appended = self.config.format.is_appended();
        let parts: Vec<_> = piece
            .bytes
            .chunks(piece.bytes.len().div_ceil(pieces))
            .collect();
        write_in_place(&path, &parts, appended).map_err(|source| {
            if !appended {
                // Half a key is of no use to anyone; that it could not be removed changes nothing.
                let _ = fs::remove_file(&path);
            }
            FilesError::Write { path, source }
        })
    }
}

fn write_in_place(path: &Path, parts: &[&[u8]], append: bool) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .append(append)
        .truncate(!append)
        .mode(0o600)
        .open(path)?;
    for (at, part) in parts.iter().enumerate() {
        if at > 0 {
            std::thread::sleep(PIECE_PAUSE);
        }
        file.write_all(part)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use qkd_handover::type7::{self, Header};

    use super::*;
    use crate::{
        config::tests::config,
        pair::{Half, ModulePair, Role},
        script::HalfScript,
    };

    fn play(
        half: Half,
        config: &FilesConfig,
        stop: &AtomicBool,
        stats: &Stats,
    ) -> Result<(), FilesError> {
        let feed = Feed::new(Box::new(HalfScript::new(half)), stats);
        run(feed, config, Duration::from_millis(20), stop, stats)
    }

    #[test]
    fn every_file_holds_its_block_and_nothing_is_readable_by_others() {
        let mut pair = config();
        (pair.first_number, pair.blocks) = (0xbe00, Some(40));
        pair.faults.empty_per_million = 200_000;
        let directory = tempfile::tempdir().unwrap();
        let config = FilesConfig {
            max_waiting: 100,
            ..FilesConfig::new(directory.path().join("new"))
        };
        let stats = Stats::default();
        let pair = ModulePair::new(&pair).unwrap();
        let half = pair.half(Role::Receiver);
        play(half, &config, &AtomicBool::new(false), &stats).unwrap();

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
            max_waiting: 5,
            ..FilesConfig::new(directory.path())
        };
        let mut pair = config();
        pair.blocks = Some(12);
        let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
        let (stop, stats) = (AtomicBool::new(false), Stats::default());
        let mut taken = 0;
        std::thread::scope(|scope| {
            let running = scope.spawn(|| play(half, &config_of_files, &stop, &stats));
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
            max_waiting: 5,
            ..FilesConfig::new(directory.path())
        };
        let mut pair = config();
        pair.first_number = 1 << 32;
        let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
        let stop = AtomicBool::new(false);
        let error = play(half, &config_of_files, &stop, &Stats::default()).unwrap_err();
        assert!(matches!(error, FilesError::Epoch { number } if number == 1 << 32));
    }
}
