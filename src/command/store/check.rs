//! `store check`.

use std::{os::unix::process::ExitStatusExt, process::Command};

use qkd_kma::store::{CheckReport, check};
use serde_json::json;

use super::{StoreError, Which, progress, view};
use crate::{command::chain, config::Config};

/// Runs the check in a process of its own: LMDB may follow a damaged page anywhere, and then the
/// answer is that it did.
pub(super) fn run_apart(which: &Which) -> Result<(), StoreError> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["store", "check", "--in-process", "--config"]);
    command.arg(&which.config);
    if which.json {
        command.arg("--json");
    }
    let status = command.status()?;
    if let Some(signal) = status.signal() {
        if which.json {
            let report = json!({ "sound": false, "reader_died_of_signal": signal });
            println!("{report:#}");
        } else {
            println!("The row database is damaged: its reader died of signal {signal}.");
            println!(
                "Every row that cannot be read is burned when the node comes to use it; if the"
            );
            println!("node itself dies of it, remove the folder `rows` of the store: all rows are");
            println!("then missing, and are burned one by one.");
        }
        return Err(StoreError::Damaged);
    }
    match status.code() {
        Some(0) => Ok(()),
        // The process has said why.
        code => std::process::exit(code.unwrap_or(1)),
    }
}

pub(super) fn run(config: &Config, json: bool) -> Result<(), StoreError> {
    let mut view = view(config)?;
    let mut bar = None;
    let report = check(&mut view, &mut |done, total| {
        let bar = bar.get_or_insert_with(|| progress(total, "checking rows"));
        bar.set_position(done);
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let report = report.map_err(|source| StoreError::of(config, source))?;
    let faults: Vec<String> = report.faults.iter().map(|fault| chain(fault)).collect();
    if json {
        print_json(&report, &faults);
    } else {
        print_text(&report, &faults);
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(StoreError::Damaged)
    }
}

fn print_json(report: &CheckReport, faults: &[String]) {
    let report = json!({
        "sound": faults.is_empty(),
        "faults": faults,
        "rows": report.rows,
        "bytes": report.bytes,
        "records": report.records,
        "archived_records": report.archived_records,
        "stray_rows": report.stray_rows,
        "torn_bytes": report.torn_bytes,
    });
    println!("{report:#}");
}

fn print_text(report: &CheckReport, faults: &[String]) {
    println!(
        "{} rows with {} bytes compared with the ledger ({} records, {} archived)",
        report.rows, report.bytes, report.records, report.archived_records
    );
    if report.stray_rows > 0 || report.torn_bytes > 0 {
        println!(
            "a crash left {} rows that the ledger does not know and {} bytes of a commit; the node \
             drops them when it starts",
            report.stray_rows, report.torn_bytes
        );
    }
    for fault in faults {
        println!("DAMAGED: {fault}");
    }
    if faults.is_empty() {
        println!("sound");
    }
}
