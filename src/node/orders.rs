//! What an operator orders of a running node: one JSON document in and one out per connection to a
//! socket in its data directory, which only the node's own user may open.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    path::Path,
    time::Duration,
};

use qkd_kma::{OperatorAct, OperatorAnswer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::agent::Request;

/// An order that has not come, or an answer that is not read, in this time is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest order, in bytes.
const ORDER_MAX_BYTES: u64 = 4 << 20;

/// Gives an order to a running node, and waits for what comes of it, which is durable then. Blocks the
/// thread.
///
/// # Errors
///
/// The node does not answer on this socket. It may have done what was ordered.
pub fn order(socket: &Path, act: &OperatorAct) -> io::Result<OperatorAnswer> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&serde_json::to_vec(act)?)?;
    stream.shutdown(Shutdown::Write)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Takes orders until the node stops, one after the other.
pub(crate) async fn run(
    listener: UnixListener,
    requests: mpsc::Sender<Request>,
    mut shutdown: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            () = super::until_stop(&mut shutdown) => return,
            accepted = listener.accept() => accepted,
        };
        if let Ok((stream, _)) = accepted
            && let Err(error) = serve(stream, &requests).await
        {
            tracing::warn!(%error, "an operator's order was not carried out, or not answered");
        }
    }
}

async fn serve(mut stream: UnixStream, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let mut text = Vec::new();
    let mut limited = (&mut stream).take(ORDER_MAX_BYTES);
    timeout(PATIENCE, limited.read_to_end(&mut text)).await??;
    let act: OperatorAct = serde_json::from_slice(&text)?;
    tracing::warn!(uid, order = %named(&act), "an operator orders");
    let (reply, answer) = oneshot::channel();
    let stopped = |_| io::Error::other("the node stops");
    let asked = requests.send(Request::Order(act, reply)).await;
    asked.map_err(|_| io::Error::other("the node stops"))?;
    let answer = answer.await.map_err(stopped)?;
    let json = serde_json::to_vec(&answer)?;
    timeout(PATIENCE, stream.write_all(&json)).await??;
    stream.shutdown().await
}

/// An order in a line of the log, which takes no lists of keys.
fn named(act: &OperatorAct) -> String {
    match act {
        OperatorAct::StopModulePair(pair) => format!("stop module pair {pair}"),
        OperatorAct::StartModulePair(pair) => format!("start module pair {pair}"),
        OperatorAct::Suspect(suspects) => format!(
            "void {} QKD-keys, {} KMA-keys and {} units on their way",
            suspects.qkd_keys.len(),
            suspects.segments.len(),
            suspects.units.len()
        ),
    }
}
