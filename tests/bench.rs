//! `qkd-bridge bench`: what it prints.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::Value;
use support::{qkd_bridge, stderr, stdout};

#[test]
fn bench_tells_backends_speeds_ratios_and_how_many_modules_can_be_served() {
    let output = qkd_bridge(["bench", "--seconds", "1", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();

    let backends = report["backends"].as_array().unwrap();
    assert!(backends.contains(&report["backend"]));
    assert_eq!(backends[0], "portable");

    let groups = report["groups"].as_array().unwrap();
    for name in ["health", "sha256_units", "pipeline", "xor", "otp_relay"] {
        assert!(groups.iter().any(|group| group["group"] == name), "{name}");
    }
    for group in groups {
        let (ours, ratio) = (&group["gb_per_s"], &group["ratio"]);
        let rival = &group["cases_gb_per_s"][group["rival"].as_str().unwrap()];
        let quotient = ours.as_f64().unwrap() / rival.as_f64().unwrap();
        assert!((ratio.as_f64().unwrap() / quotient - 1.0).abs() < 1e-9);
    }

    let pipeline = report["pipeline_gb_per_s"]["one_core"].as_f64().unwrap();
    let modules = report["record_modules"]["one_core"].as_f64().unwrap();
    assert!((pipeline * 8e9 / 115.8e6 - modules).abs() <= 1.0);
}

#[test]
fn bench_is_a_table_for_people_and_refuses_no_time() {
    let output = qkd_bridge(["bench", "--seconds", "1"]);
    let table = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(table.contains("SHA-256 of units"), "{table}");
    assert!(table.contains("record-rate module pairs"), "{table}");
    assert_eq!(
        qkd_bridge(["bench", "--seconds", "0"]).status.code(),
        Some(2)
    );
}
