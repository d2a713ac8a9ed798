//! An application: a client of ETSI GS QKD 014 over HTTP/1.1 and mutual TLS.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use qkd_keyfile::AppId;
use qkd_net::{Credentials, CredentialsError};
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};
use zeroize::{Zeroize, Zeroizing};

use super::{AppFiles, Network};

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A key that was supplied.
pub struct Key {
    /// Its ID.
    pub id: String,
    /// Its bytes.
    pub key: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Why an application got no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The node cannot be reached.
    #[error("cannot connect")]
    Connect(#[from] io::Error),
    /// The connection broke; whether keys were consumed is unknown.
    #[error("the connection broke")]
    Broken(#[from] hyper::Error),
    /// No answer in time; whether keys were consumed is unknown.
    #[error("no answer in {} s", ANSWER_WITHIN.as_secs())]
    TimedOut,
    /// The node refused; no key was consumed.
    #[error("status {status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the node says.
        message: String,
    },
    /// The answer is not one of the standard's.
    #[error("the answer is not a key container")]
    Answer,
}

impl RequestError {
    /// The HTTP status of a refusal.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::Connect(_) | Self::Broken(_) | Self::TimedOut | Self::Answer => None,
        }
    }
}

/// An application at its node; connects when it has to.
pub struct Application {
    id: AppId,
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    sender: Option<http1::SendRequest<Full<Bytes>>>,
}

impl std::fmt::Debug for Application {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Application")
            .field("id", &self.id)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Container<'a> {
    #[serde(borrow)]
    keys: Vec<Entry<'a>>,
}

/// Borrows from the answer, which is wiped.
#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(rename = "key_ID")]
    id: &'a str,
    key: &'a str,
}

#[derive(Deserialize)]
struct Message {
    message: String,
}

impl Application {
    /// An application of a network, at its node.
    ///
    /// # Errors
    ///
    /// Its certificate cannot be used.
    pub fn new(network: &Network, files: &AppFiles) -> Result<Self, CredentialsError> {
        let credentials = Credentials::load(&network.ca, &files.certificate, &files.key)?;
        let node = network.nodes.iter().find(|node| node.id == files.node);
        let address = node.map(|node| node.https);
        Ok(Self {
            id: files.id.clone(),
            address: address
                .unwrap_or_else(|| unreachable!("a plan's applications are at its nodes")),
            tls: credentials.web_client_config(&[b"http/1.1"]),
            sender: None,
        })
    }

    /// Its ID.
    #[must_use]
    pub fn id(&self) -> &AppId {
        &self.id
    }

    /// "Get key": new keys, which `slave` can fetch by ID.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says what was consumed. After it the connection is made anew.
    pub async fn enc_keys(
        &mut self,
        slave: &AppId,
        number: usize,
        size_bits: u32,
    ) -> Result<Vec<Key>, RequestError> {
        let body = serde_json::json!({"number": number, "size": size_bits});
        self.post(&format!("{slave}/enc_keys"), body.to_string())
            .await
    }

    /// "Get key with key IDs": keys that `master` was given.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says what was consumed. After it the connection is made anew.
    pub async fn dec_keys(
        &mut self,
        master: &AppId,
        ids: &[&str],
    ) -> Result<Vec<Key>, RequestError> {
        let ids: Vec<_> = ids
            .iter()
            .map(|id| serde_json::json!({"key_ID": id}))
            .collect();
        let body = serde_json::json!({ "key_IDs": ids });
        self.post(&format!("{master}/dec_keys"), body.to_string())
            .await
    }

    async fn post(&mut self, path: &str, body: String) -> Result<Vec<Key>, RequestError> {
        let answer = match timeout(ANSWER_WITHIN, self.exchange(path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(RequestError::TimedOut),
        };
        if answer.as_ref().is_err_and(|error| error.status().is_none()) {
            self.sender = None;
        }
        answer
    }

    async fn exchange(&mut self, path: &str, body: String) -> Result<Vec<Key>, RequestError> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect().await?,
        };
        let request = Request::post(format!("/api/v1/keys/{path}"))
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| RequestError::Answer)?;
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let text = collect(response.into_body()).await?;
        self.sender = Some(sender);
        if status != 200 {
            let message = serde_json::from_slice(&text).map(|Message { message }| message);
            let message = message.unwrap_or_default();
            return Err(RequestError::Refused { status, message });
        }
        let container: Container<'_> =
            serde_json::from_slice(&text).map_err(|_| RequestError::Answer)?;
        container.keys.iter().map(Entry::decode).collect()
    }

    async fn connect(&self) -> Result<http1::SendRequest<Full<Bytes>>, RequestError> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::IpAddress(self.address.ip().into());
        let stream = TlsConnector::from(self.tls.clone())
            .connect(name, tcp)
            .await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

impl Entry<'_> {
    fn decode(&self) -> Result<Key, RequestError> {
        let mut key = Zeroizing::new(vec![0; base64::decoded_len_estimate(self.key.len())]);
        let length = BASE64_STANDARD
            .decode_slice(self.key, &mut key)
            .map_err(|_| RequestError::Answer)?;
        key.truncate(length);
        Ok(Key {
            id: self.id.to_owned(),
            key,
        })
    }
}

/// The whole answer, in memory that is wiped; the connection's own buffers are wiped where nothing
/// else shares them.
async fn collect(mut body: hyper::body::Incoming) -> Result<Zeroizing<Vec<u8>>, hyper::Error> {
    use hyper::body::Body;
    let expected = body.size_hint().upper().unwrap_or(0).min(1 << 20);
    let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(expected).unwrap_or(0)));
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            text.extend_from_slice(&data);
            if let Ok(mut data) = data.try_into_mut() {
                data.as_mut().zeroize();
            }
        }
    }
    Ok(text)
}
