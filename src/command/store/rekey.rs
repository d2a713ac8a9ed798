//! `store rekey`.

use qkd_kma::vault::{LmdbOptions, open_lmdb};
use serde_json::json;

use super::StoreError;
use crate::{
    config::{Config, KekConfig, PassPhraseFrom, StoreConfig},
    kek::{has_data_keys, kek_source},
};

pub(super) fn run(config: &Config, to: Option<&KekConfig>, json: bool) -> Result<(), StoreError> {
    let StoreConfig::Lmdb { kek, max_gib, .. } = &config.store else {
        return Err(StoreError::NoKek);
    };
    let dir = config.store_dir();
    if !has_data_keys(&dir) {
        return Err(StoreError::None { dir });
    }
    let failed = |source| StoreError::of(config, source);
    let options = LmdbOptions {
        max_bytes: max_gib << 30,
    };
    let mut vault = open_lmdb(&dir, &kek_source(kek, false)?, options).map_err(failed)?;
    match to {
        Some(to) => vault.rekey(&kek_source(to, true)?),
        None => qkd_kma::vault::Vault::rotate_epoch(&mut vault),
    }
    .map_err(failed)?;
    let (epoch, _) = vault.epoch();
    if json {
        let report = json!({ "epoch": epoch, "kek": to.map(entry) });
        println!("{report:#}");
        return Ok(());
    }
    println!("all data keys are wrapped anew: epoch {epoch}");
    if let Some(to) = to {
        println!("now put this into [store] of the configuration, and destroy the old key:");
        println!("  kek = {}", entry(to));
    }
    Ok(())
}

/// The entry of the configuration.
fn entry(kek: &KekConfig) -> String {
    let quoted = |text: &str| format!("{text:?}");
    match kek {
        KekConfig::File(path) => format!("{{ file = {} }}", quoted(&path.to_string_lossy())),
        KekConfig::Credential(name) => format!("{{ credential = {} }}", quoted(name)),
        KekConfig::Passphrase(from) => {
            let from = match from {
                PassPhraseFrom::Prompt => "prompt".to_owned(),
                PassPhraseFrom::File(path) => format!("file:{}", path.display()),
                PassPhraseFrom::Credential(name) => format!("credential:{name}"),
                PassPhraseFrom::Environment(name) => format!("env:{name}"),
            };
            format!("{{ passphrase = {} }}", quoted(&from))
        }
    }
}
