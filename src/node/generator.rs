//! The registered physical generator: a device that random bits are read from, for units of level
//! `qkd`.
//!
//! It is read on a thread of its own, for it may be slow. What it delivers is tested as QKD-keys are;
//! bits that fail are thrown away, with a line in the log.

use std::{fs::File, io::Read, path::Path, sync::mpsc, thread, time::Duration};

use qkd_kernels::Backend;
use qkd_pipeline::HealthTest;
use qkd_secmem::Pool;

use super::{NodeError, agent::Request};

/// Bytes read and tested at a time.
const PIECE_BYTES: usize = 4096;

/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// Opens the device and reads from it whenever it is asked for bytes, until the sender is gone.
pub(super) fn start(
    device: &Path,
    backend: Backend,
    pool: Pool,
    requests: tokio::sync::mpsc::Sender<Request>,
) -> Result<mpsc::Sender<usize>, NodeError> {
    let path = device.display().to_string();
    let mut file = File::open(device).map_err(|source| NodeError::Generator {
        path: path.clone(),
        source,
    })?;
    let (want, wanted) = mpsc::channel::<usize>();
    let mut health = HealthTest::new(backend);
    let work = move || {
        for bytes in wanted {
            let mut left = bytes;
            while left > 0 {
                let len = left.min(PIECE_BYTES);
                let Ok(mut bits) = pool.take(len) else {
                    thread::sleep(PAUSE);
                    continue;
                };
                if let Err(error) = file.read_exact(bits.expose_mut()) {
                    tracing::error!(%path, %error, "generator cannot be read; trying on");
                    thread::sleep(PAUSE);
                    continue;
                }
                if let Err(reason) = health.judge(bits.expose()) {
                    tracing::error!(%path, %reason, "generator fails its health test; bits thrown away");
                    thread::sleep(PAUSE);
                    continue;
                }
                left -= len;
                if requests.blocking_send(Request::Random(bits)).is_err() {
                    return;
                }
            }
        }
    };
    let thread = thread::Builder::new().name("qkd-generator".to_owned());
    thread.spawn(work)?;
    Ok(want)
}
