//! From types to JSON.

use serde_json::{Map, Value, json};

use super::{Destination, LinkReport, LinkState, Message, shortened};

pub(super) fn payload(message: &Message) -> Value {
    let mut members = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            members.insert(name.to_owned(), value);
        }
    };
    match message {
        Message::NextHopRequest {
            source,
            destination,
        }
        | Message::NotifyRelayRequest {
            source,
            destination,
        } => {
            put(
                "source_kma_id",
                source.as_ref().map(|id| id.as_str().into()),
            );
            match destination {
                Destination::Node(id) => put("destination_kma_id", Some(id.as_str().into())),
                Destination::App(id) => put("application_destination_id", Some(id.as_str().into())),
            }
        }
        Message::NextHopResponse {
            source,
            destination,
            next,
            error,
        } => {
            put(
                "source_kma_id",
                source.as_ref().map(|id| id.as_str().into()),
            );
            put(
                "destination_kma_id",
                destination.as_ref().map(|id| id.as_str().into()),
            );
            put(
                "next_kma_ids",
                Some(next.iter().map(|id| id.as_str()).collect()),
            );
            put("extension", error.as_deref().map(extension));
        }
        Message::RelayRequest {
            source,
            destination,
            transit,
            request_id,
            error,
        } => {
            put(
                "source_kma_id",
                source.as_ref().map(|id| id.as_str().into()),
            );
            put("destination_kma_id", Some(destination.as_str().into()));
            put(
                "transit_kma_ids",
                Some(transit.iter().map(|id| id.as_str()).collect()),
            );
            put(
                "key_relay_request_id",
                request_id.as_ref().map(|id| id.as_str().into()),
            );
            put("extension", error.as_deref().map(extension));
        }
        Message::RelayResponse {
            response,
            request_id,
        } => {
            put("response", Some(shortened(response).into()));
            put(
                "key_relay_request_id",
                request_id.as_ref().map(|id| id.as_str().into()),
            );
        }
        Message::StatusReport { links } => put("links", Some(links.iter().map(link).collect())),
        Message::ReportResponse { response } => put("response", Some(shortened(response).into())),
        Message::AlarmReport(alarm) => {
            put("peer_kma_id", Some(alarm.peer.as_str().into()));
            put("raised", Some(alarm.raised.into()));
            put("text", Some(shortened(&alarm.text).into()));
        }
    }
    Value::Object(members)
}

/// The error that 0x0002 and 0x0004 have no parameter for.
fn extension(error: &str) -> Value {
    json!([{ "name": "error", "value": shortened(error) }])
}

fn link(report: &LinkReport) -> Value {
    json!({
        "peer_kma_id": report.peer.as_str(),
        "outgoing_bits": report.outgoing_bits,
        "incoming_bits": report.incoming_bits,
        "key_rate_bits_per_second": report.key_rate_bits_per_second,
        "state": match report.state {
            LinkState::Up => "up",
            LinkState::Down => "down",
        },
    })
}
