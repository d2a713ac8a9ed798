use serde_json::{Value, json};

use super::*;

fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

fn examples() -> Vec<Message> {
    let links = (0..MAX_REPORTED_LINKS).map(|i| LinkReport {
        peer: node(&format!("{i:064}")),
        outgoing_bits: u64::MAX,
        incoming_bits: u64::MAX,
        key_rate_bits_per_second: u64::MAX,
        state: if i % 2 == 0 {
            LinkState::Up
        } else {
            LinkState::Down
        },
    });
    let to_node = Destination::Node(node("c"));
    let to_app = Destination::App("video".parse().unwrap());
    vec![
        Message::NextHopRequest {
            source: Some(node("a")),
            destination: to_node.clone(),
        },
        Message::NextHopRequest {
            source: None,
            destination: to_app.clone(),
        },
        Message::NextHopResponse {
            source: Some(node("a")),
            destination: Some(node("c")),
            next: vec![node("b"), node("d")],
            error: None,
        },
        Message::NextHopResponse {
            source: None,
            destination: None,
            next: vec![],
            error: Some(NO_ROUTE.to_owned()),
        },
        Message::NotifyRelayRequest {
            source: Some(node("a")),
            destination: to_app,
        },
        Message::NotifyRelayRequest {
            source: None,
            destination: to_node,
        },
        Message::RelayRequest {
            source: Some(node("a")),
            destination: node("c"),
            transit: vec![node("b"), node("d")],
            request_id: Some("a1".parse().unwrap()),
            error: None,
        },
        Message::RelayRequest {
            source: None,
            destination: node("c"),
            transit: vec![],
            request_id: None,
            error: Some(NO_ROUTE.to_owned()),
        },
        Message::RelayResponse {
            response: SUCCESS.to_owned(),
            request_id: Some("a1".parse().unwrap()),
        },
        Message::RelayResponse {
            response: "no key".to_owned(),
            request_id: None,
        },
        Message::StatusReport {
            links: links.collect(),
        },
        Message::ReportResponse {
            response: SUCCESS.to_owned(),
        },
        Message::AlarmReport(AlarmReport {
            peer: node("b"),
            raised: true,
            text: "QBER \"0.12\"\n".to_owned(),
        }),
    ]
}

fn message(command: Command, payload: &Value) -> Vec<u8> {
    signal::encode_message(7, command.code(), payload.to_string().as_bytes()).unwrap()
}

fn read(command: Command, payload: &Value) -> Result<Message, BadPayload> {
    let received = receive(&message(command, payload), command.sender(), false).unwrap();
    assert_eq!((received.message_id, received.command), (7, command));
    received.content
}

#[test]
fn every_code_encodes_and_decodes() {
    for example in examples() {
        let bytes = example.encode(7).unwrap();
        let sender = example.command().sender();
        let received = receive(&bytes, sender, false).unwrap();
        assert_eq!(received.content.unwrap(), example);
    }
    let codes: Vec<u16> = COMMANDS.iter().map(|command| command.code()).collect();
    assert_eq!(codes, [1, 2, 3, 4, 5, 0x8001, 0x8002, 0x8003]);
    for command in COMMANDS {
        assert!(
            examples()
                .iter()
                .any(|example| example.command() == command)
        );
    }
}

#[test]
fn the_bytes_are_those_of_the_document() {
    let request = Message::NextHopRequest {
        source: None,
        destination: Destination::Node(node("c")),
    };
    let bytes = request.encode(0x0102_0304).unwrap();
    assert_eq!(bytes[..10], [0, 1, 1, 2, 3, 4, 0, 1, 0, 26]);
    assert_eq!(&bytes[10..], br#"{"destination_kma_id":"c"}"#);
}

#[test]
fn every_mandatory_member_must_be_there() {
    for example in examples() {
        let Value::Object(members) = encode::payload(&example) else {
            panic!("not an object");
        };
        for name in members.keys() {
            let mut fewer = members.clone();
            fewer.remove(name);
            let optional = matches!(
                name.as_str(),
                "source_kma_id" | "key_relay_request_id" | "extension"
            ) || (name == "destination_kma_id"
                && example.command() == Command::NextHopResponse);
            let read = read(example.command(), &Value::Object(fewer));
            assert_eq!(
                read.is_ok(),
                optional,
                "{:?} without {name}",
                example.command()
            );
        }
    }
    let link = json!({"peer_kma_id": "b", "outgoing_bits": 1, "incoming_bits": 1, "key_rate_bits_per_second": 1, "state": "up"});
    assert!(read(Command::StatusReport, &json!({"links": [link]})).is_ok());
    for name in [
        "peer_kma_id",
        "outgoing_bits",
        "incoming_bits",
        "key_rate_bits_per_second",
        "state",
    ] {
        let mut fewer = link.clone();
        fewer.as_object_mut().unwrap().remove(name);
        assert!(
            read(Command::StatusReport, &json!({"links": [fewer]})).is_err(),
            "{name}"
        );
    }
}

#[test]
fn members_are_read_by_the_names_of_the_tables_too() {
    let payload = json!({"Source KMA ID": "a", "Application destination ID": "video"});
    assert_eq!(
        read(Command::NotifyRelayRequest, &payload).unwrap(),
        Message::NotifyRelayRequest {
            source: Some(node("a")),
            destination: Destination::App("video".parse().unwrap()),
        }
    );
    let twice = json!({"Destination KMA ID": "a", "destination_kma_id": "b"});
    assert!(matches!(
        read(Command::NextHopRequest, &twice),
        Err(BadPayload::Json(_))
    ));
}

#[test]
fn transit_nodes_come_as_a_list_or_as_one_string_with_or_without_the_ends() {
    let expected = [vec![], vec![node("b")], vec![node("b"), node("c")]];
    let texts = [
        (json!([]), 0),
        (json!(""), 0),
        (json!(["a", "d"]), 0),
        (json!(["b"]), 1),
        (json!("a, b ,d"), 1),
        (json!(["b", "c"]), 2),
        (json!("b,c"), 2),
        (json!(["a", "b", "c", "d"]), 2),
    ];
    for (text, count) in texts {
        let payload =
            json!({"source_kma_id": "a", "destination_kma_id": "d", "transit_kma_ids": text});
        let Message::RelayRequest { transit, .. } = read(Command::RelayRequest, &payload).unwrap()
        else {
            panic!("another message");
        };
        assert_eq!(transit, expected[count], "{text}");
    }
    for bad in [json!(5), json!(["a b"]), json!([["b"]]), json!("b,,c")] {
        let payload = json!({"destination_kma_id": "d", "transit_kma_ids": bad});
        assert!(read(Command::RelayRequest, &payload).is_err(), "{bad}");
    }
}

#[test]
fn codes_that_are_unknown_private_or_of_the_other_end_close_the_connection() {
    let bytes = signal::encode_message(1, 6, b"{}").unwrap();
    assert_eq!(
        receive(&bytes, End::Km, false).unwrap_err(),
        Fault::UnknownCommand { code: 6 }
    );
    for command in COMMANDS {
        let bytes = message(command, &json!({}));
        let (sender, other) = match command.sender() {
            End::Km => (End::Km, End::Controller),
            End::Controller => (End::Controller, End::Km),
        };
        assert_eq!(
            receive(&bytes, other, false).unwrap_err(),
            Fault::WrongDirection { command }
        );
        let strict = receive(&bytes, sender, true);
        assert_eq!(strict.is_err(), command.is_private());
    }
    for bytes in [
        &b""[..],
        &[0; 9],
        &[0, 1, 0, 0, 0, 1, 0, 1, 0, 3, b'{', b'}'],
    ] {
        assert!(matches!(
            receive(bytes, End::Km, false),
            Err(Fault::Framing { .. })
        ));
    }
}

#[test]
fn a_bad_payload_leaves_the_connection_alone() {
    for payload in [&b""[..], b"[]", b"{} {}", b"{\"destination_kma_id\":5}"] {
        let bytes = signal::encode_message(9, 1, payload).unwrap();
        let received = receive(&bytes, End::Km, false).unwrap();
        assert_eq!(received.message_id, 9);
        assert!(received.content.is_err());
    }
    let mut bytes = message(Command::NextHopRequest, &json!({"destination_kma_id": "b"}));
    bytes[1] = 2;
    let received = receive(&bytes, End::Km, false).unwrap();
    assert_eq!(
        received.content.unwrap_err().to_string(),
        "unsupported-version"
    );
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let long = Message::ReportResponse {
        response: "é".repeat(400),
    };
    let bytes = long.encode(1).unwrap();
    let received = receive(&bytes, End::Controller, false).unwrap();
    assert_eq!(
        received.content.unwrap(),
        Message::ReportResponse {
            response: "é".repeat(128)
        }
    );
}
