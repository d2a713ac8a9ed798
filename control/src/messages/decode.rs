//! From bytes to types.

use std::str::FromStr;

use qkd_keyfile::{
    IdError, NodeId,
    signal::{HEADER_BYTES, Header, VERSION},
};
use qkd_net::json::{Object, required};

use super::{
    AlarmReport, Command, Destination, End, JsonError, LinkReport, LinkState, MAX_REPORTED_LINKS,
    MemberError, Message, shortened,
};

/// A message that came, as far as it could be read.
#[derive(Debug)]
pub struct Received {
    /// What pairs it.
    pub message_id: u32,
    /// What it is.
    pub command: Command,
    /// What it says, or why it cannot be used: a request is answered with that reason, a response
    /// fails its transaction.
    pub content: Result<Message, BadPayload>,
}

/// Why a connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Fewer bytes than a header and its payload have, or more.
    #[error("{bytes} bytes are not one message")]
    Framing {
        /// How many there were.
        bytes: usize,
    },
    /// No message has this code, or only with private codes allowed.
    #[error("unknown command code {code:#06x}")]
    UnknownCommand {
        /// The code.
        code: u16,
    },
    /// The message is one that we send and the peer does not.
    #[error("{command:?} came from the wrong end")]
    WrongDirection {
        /// The message.
        command: Command,
    },
}

/// Why a payload cannot be used. The text is fit for the peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadPayload {
    /// The header has another version than ours.
    #[error("unsupported-version")]
    Version {
        /// The version.
        version: u16,
    },
    /// Not a JSON object.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// A member is missing or has the wrong type.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// A member is no valid ID.
    #[error("{name}: {source}")]
    Id {
        /// The member.
        name: &'static str,
        /// What is wrong.
        source: IdError,
    },
    /// More links than one report may have.
    #[error("{links} links in one report, {MAX_REPORTED_LINKS} at most")]
    TooManyLinks {
        /// How many there are.
        links: usize,
    },
}

/// Reads one whole message, header and payload, that `sender` sent.
///
/// # Errors
///
/// [`Fault`]: close the connection.
pub fn receive(bytes: &[u8], sender: End, strict: bool) -> Result<Received, Fault> {
    let framing = Fault::Framing { bytes: bytes.len() };
    let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(framing)?;
    let header = Header::decode(head);
    if usize::from(header.payload_bytes) != payload.len() {
        return Err(framing);
    }
    let code = header.command;
    let command = Command::from_code(code)
        .filter(|command| !(strict && command.is_private()))
        .ok_or(Fault::UnknownCommand { code })?;
    if command.sender() != sender {
        return Err(Fault::WrongDirection { command });
    }
    let content = match header.version {
        VERSION => content(command, payload),
        version => Err(BadPayload::Version { version }),
    };
    Ok(Received {
        message_id: header.message_id,
        command,
        content,
    })
}

fn content(command: Command, payload: &[u8]) -> Result<Message, BadPayload> {
    let object = Object::parse(payload)?;
    let source = || optional_id(&object, "source_kma_id");
    let request_id = || optional_id(&object, "key_relay_request_id");
    let response = || -> Result<String, BadPayload> {
        let text = required("response", object.text("response"))?;
        Ok(shortened(text).to_owned())
    };
    Ok(match command {
        Command::NextHopRequest => Message::NextHopRequest {
            source: source()?,
            destination: destination(&object)?,
        },
        Command::NotifyRelayRequest => Message::NotifyRelayRequest {
            source: source()?,
            destination: destination(&object)?,
        },
        Command::NextHopResponse => Message::NextHopResponse {
            source: source()?,
            destination: optional_id(&object, "destination_kma_id")?,
            next: ids(
                "next_kma_ids",
                required("next_kma_ids", object.texts("next_kma_ids"))?,
            )?,
            error: error(&object)?,
        },
        Command::RelayRequest => relay_request(&object)?,
        Command::RelayResponse => Message::RelayResponse {
            response: response()?,
            request_id: request_id()?,
        },
        Command::StatusReport => Message::StatusReport {
            links: links(&object)?,
        },
        Command::ReportResponse => Message::ReportResponse {
            response: response()?,
        },
        Command::AlarmReport => Message::AlarmReport(AlarmReport {
            peer: id(&object, "peer_kma_id")?,
            raised: required("raised", object.flag("raised"))?,
            text: shortened(required("text", object.text("text"))?).to_owned(),
        }),
    })
}

/// One of the two is mandatory; the node is the more precise one where both are given.
fn destination(object: &Object) -> Result<Destination, BadPayload> {
    if let Some(node) = optional_id(object, "destination_kma_id")? {
        return Ok(Destination::Node(node));
    }
    match optional_id(object, "application_destination_id")? {
        Some(app) => Ok(Destination::App(app)),
        None => Err(MemberError::Missing {
            name: "destination_kma_id",
        }
        .into()),
    }
}

fn relay_request(object: &Object) -> Result<Message, BadPayload> {
    let source: Option<NodeId> = optional_id(object, "source_kma_id")?;
    let destination: NodeId = id(object, "destination_kma_id")?;
    let mut transit = ids("transit_kma_ids", transit_texts(object)?)?;
    // The document does not say whether the ends are part of the list.
    if source.is_some() && transit.first() == source.as_ref() {
        transit.remove(0);
    }
    if transit.last() == Some(&destination) {
        transit.pop();
    }
    Ok(Message::RelayRequest {
        source,
        destination,
        transit,
        request_id: optional_id(object, "key_relay_request_id")?,
        error: error(object)?,
    })
}

/// An array, or, since the document types it "string", one string with commas.
fn transit_texts(object: &Object) -> Result<Vec<&str>, MemberError> {
    const NAME: &str = "transit_kma_ids";
    match object.text(NAME) {
        Ok(Some(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Ok(Some(text)) => Ok(text.split(',').map(str::trim).collect()),
        Ok(None) => Err(MemberError::Missing { name: NAME }),
        Err(_) => required(NAME, object.texts(NAME)),
    }
}

/// The value of the extension named "error". Other extensions are not ours to know.
fn error(object: &Object) -> Result<Option<String>, BadPayload> {
    for extension in object.objects("extension")?.unwrap_or_default() {
        if extension.text("name") == Ok(Some("error")) {
            let value = extension.text("value").ok().flatten();
            return Ok(Some(shortened(value.unwrap_or("unknown")).to_owned()));
        }
    }
    Ok(None)
}

fn links(object: &Object) -> Result<Vec<LinkReport>, BadPayload> {
    let links = required("links", object.objects("links"))?;
    if links.len() > MAX_REPORTED_LINKS {
        return Err(BadPayload::TooManyLinks { links: links.len() });
    }
    let number = |link: &Object, name| required(name, link.long(name));
    let report = |link: &Object| -> Result<LinkReport, BadPayload> {
        Ok(LinkReport {
            peer: id(link, "peer_kma_id")?,
            outgoing_bits: number(link, "outgoing_bits")?,
            incoming_bits: number(link, "incoming_bits")?,
            key_rate_bits_per_second: number(link, "key_rate_bits_per_second")?,
            state: match required("state", link.text("state"))? {
                "up" => LinkState::Up,
                "down" => LinkState::Down,
                _ => {
                    return Err(MemberError::Type {
                        name: "state",
                        expected: "up or down",
                    }
                    .into());
                }
            },
        })
    };
    links.iter().map(report).collect()
}

fn ids(name: &'static str, texts: Vec<&str>) -> Result<Vec<NodeId>, BadPayload> {
    let parse = |text: &str| {
        text.parse()
            .map_err(|source| BadPayload::Id { name, source })
    };
    texts.into_iter().map(parse).collect()
}

fn id<T: FromStr<Err = IdError>>(object: &Object, name: &'static str) -> Result<T, BadPayload> {
    optional_id(object, name)?.ok_or(MemberError::Missing { name }.into())
}

fn optional_id<T: FromStr<Err = IdError>>(
    object: &Object,
    name: &'static str,
) -> Result<Option<T>, BadPayload> {
    let text = object.text(name)?;
    text.map(|text| {
        text.parse()
            .map_err(|source| BadPayload::Id { name, source })
    })
    .transpose()
}
