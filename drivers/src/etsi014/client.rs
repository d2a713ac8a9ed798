//! A connection to a key manager: one request, one answer.

use std::{future::poll_fn, io, pin::Pin, task::Poll, time::Duration};

use qkd_keyfile::QkdKeyId;
use qkd_net::{
    Reloadable,
    tls::{ClientStream, connect_to_host},
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{
    Etsi014Config,
    container::{self, ContainerError, Pulled},
    http,
};
use crate::scratch::Scratch;

/// What became of a request.
pub(super) enum Outcome {
    Keys(Client, Vec<Pulled>),
    /// The key manager has answered, and has no key now, or not for us.
    Refused(Client, u16),
    /// It has answered what cannot be; the connection is closed.
    Nonsense(Client, ContainerError),
    /// It was not reached.
    Unreached(Client, io::ErrorKind),
    /// Whether it has handed keys out is not known.
    Unanswered(Client, io::ErrorKind),
    /// A pause is over.
    Rested(Client),
}

/// A connection that can be made again.
pub(super) struct Client {
    config: Etsi014Config,
    credentials: Reloadable,
    stream: Option<Box<ClientStream>>,
}

impl Client {
    pub(super) fn new(config: &Etsi014Config, credentials: Reloadable) -> Self {
        Self {
            config: config.clone(),
            credentials,
            stream: None,
        }
    }

    /// Asks for so many new keys, or for those with these IDs.
    pub(super) async fn ask(mut self, ids: Vec<QkdKeyId>, number: usize) -> Outcome {
        let within = Duration::from_millis(self.config.timeout_ms);
        let mut buffer = Scratch::new(answer_bytes(&self.config));
        let request = self.request(&ids, number);
        let mut stream = match self.connection(within).await {
            Ok(stream) => stream,
            Err(error) => return Outcome::Unreached(self, error.kind()),
        };
        let answer = timeout(within, http::exchange(&mut *stream, &request, &mut buffer)).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Outcome::Unanswered(self, error.kind()),
            Err(_) => return Outcome::Unanswered(self, io::ErrorKind::TimedOut),
        };
        if answer.stays_open {
            self.stream = Some(stream);
        }
        if answer.status != 200 {
            return Outcome::Refused(self, answer.status);
        }
        let body = &mut buffer[answer.body];
        let is_strange = |one: &Pulled| !ids.is_empty() && !ids.contains(&one.id);
        let error = match container::parse(body, number, self.config.key_bits) {
            Ok(pulled) if !pulled.iter().any(is_strange) => return Outcome::Keys(self, pulled),
            Ok(_) => ContainerError::Id,
            Err(error) => error,
        };
        self.stream = None;
        Outcome::Nonsense(self, error)
    }

    /// That which is open, or a new one. A key manager may have closed one that was idle: a request that
    /// it did not read must not count as one that it did not answer.
    async fn connection(&mut self, within: Duration) -> io::Result<Box<ClientStream>> {
        if let Some(mut stream) = self.stream.take()
            && is_silent(&mut stream).await
        {
            return Ok(stream);
        }
        Ok(Box::new(self.connect(within).await?))
    }

    async fn connect(&self, within: Duration) -> io::Result<ClientStream> {
        let Etsi014Config { host, port, .. } = &self.config;
        // New certificates count from the next connection on; what cannot be read changes nothing.
        let _ = self.credentials.reload();
        let tcp = timeout(within, TcpStream::connect((host.as_str(), *port))).await;
        let tcp = tcp.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let config = self.credentials.current().web_client_config(&[b"http/1.1"]);
        let stream = connect_to_host(tcp, config, host, within).await;
        stream.map_err(|error| io::Error::new(io::ErrorKind::ConnectionRefused, error))
    }

    /// Clause 5: Get key, or Get key with key IDs.
    fn request(&self, ids: &[QkdKeyId], number: usize) -> Vec<u8> {
        let Etsi014Config {
            host,
            port,
            peer_sae,
            key_bits,
            ..
        } = &self.config;
        let sae = percent_encoded(peer_sae.as_str());
        let (method, path, body) = if ids.is_empty() {
            let path = format!("enc_keys?number={number}&size={key_bits}");
            ("GET", path, String::new())
        } else {
            let each = ids
                .iter()
                .map(|id| format!(r#"{{"key_ID":{}}}"#, serde_json::json!(id.as_str())));
            let list = each.collect::<Vec<_>>().join(",");
            let body = format!(r#"{{"key_IDs":[{list}]}}"#);
            ("POST", "dec_keys".to_owned(), body)
        };
        let content = if body.is_empty() {
            String::new()
        } else {
            let len = body.len();
            format!("content-type: application/json\r\ncontent-length: {len}\r\n")
        };
        format!(
            "{method} /api/v1/keys/{sae}/{path} HTTP/1.1\r\nhost: {host}:{port}\r\n\
             accept: application/json\r\n{content}\r\n{body}"
        )
        .into_bytes()
    }
}

/// Whether nothing has come on a connection without being asked for, its end included.
async fn is_silent(stream: &mut ClientStream) -> bool {
    let mut byte = [0];
    let mut buffer = ReadBuf::new(&mut byte);
    poll_fn(|cx| {
        let read = Pin::new(&mut *stream).poll_read(cx, &mut buffer);
        Poll::Ready(read.is_pending())
    })
    .await
}

/// All but the unreserved characters (RFC 3986, clause 2.3).
fn percent_encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Bytes of the longest answer: keys in base64 with their IDs, and extensions.
fn answer_bytes(config: &Etsi014Config) -> usize {
    let key_bytes = config.key_bits as usize / 8;
    8192 + config.keys_per_request as usize * (key_bytes.div_ceil(3) * 5 + 512)
}
