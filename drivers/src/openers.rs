//! Drivers of your own, by name.

use std::{collections::BTreeMap, error::Error, fmt, path::PathBuf, sync::Arc};

use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    config::{DriverConfig, OpenError},
    records::Limits,
    source::KeySource,
};

/// Entry of a driver that a program brings along, with settings that only that driver knows.
///
/// ```toml
/// kind = "custom"
/// driver = "records"     # the name that the program gave it
/// socket = "module.sock" # and whatever else the driver asks for
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CustomConfig {
    /// Name of the driver, as in [`Openers::with`].
    pub driver: String,
    /// Folder from which relative paths among the settings are taken.
    #[serde(skip)]
    pub folder: PathBuf,
    /// When the module's values count as out of range.
    #[serde(default)]
    pub limits: Limits,
    /// Everything else in the entry.
    #[serde(flatten)]
    pub settings: toml::Table,
}

impl CustomConfig {
    /// The settings, as a type of the driver's.
    ///
    /// # Errors
    ///
    /// A setting is missing, of another type, or refused by the type (`deny_unknown_fields` finds
    /// misspelt ones).
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T, SettingsError> {
        let settings = self.settings.clone();
        settings
            .try_into()
            .map_err(|error| SettingsError(Box::new(error)))
    }
}

/// The settings of a driver are not as it wants them.
#[derive(Debug, thiserror::Error)]
#[error("settings: {}", .0.message())]
pub struct SettingsError(Box<toml::de::Error>);

type Open =
    dyn Fn(&CustomConfig) -> Result<Box<dyn KeySource>, Box<dyn Error + Send + Sync>> + Send + Sync;

/// Opens modules: with the drivers of this crate, and with those that a program adds.
///
/// ```
/// # use qkd_drivers::{KeySource, Openers};
/// # fn open_records(path: String) -> std::io::Result<Box<dyn KeySource>> { unimplemented!() }
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Settings {
///     socket: String,
/// }
///
/// let openers = Openers::new().with("records", |entry| {
///     let settings: Settings = entry.settings()?;
///     Ok(open_records(settings.socket)?)
/// });
/// ```
#[derive(Clone, Default)]
pub struct Openers(BTreeMap<String, Arc<Open>>);

impl Openers {
    /// The drivers of this crate alone.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver, or puts another in its place. `open` is called inside a tokio runtime: when the
    /// node starts, and again, never more often than every 100 ms, after the source has ended with
    /// [`ReadError::Gone`](crate::ReadError::Gone). The source before is dropped first.
    #[must_use]
    pub fn with(
        mut self,
        driver: impl Into<String>,
        open: impl Fn(&CustomConfig) -> Result<Box<dyn KeySource>, Box<dyn Error + Send + Sync>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.0.insert(driver.into(), Arc::new(open));
        self
    }

    /// Opens a module. Needs the context of a tokio runtime, in which the source is then polled.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing is open and nothing was changed.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(&self, config: &DriverConfig) -> Result<Box<dyn KeySource>, OpenError> {
        let DriverConfig::Custom(entry) = config else {
            return config.open();
        };
        let driver = entry.driver.clone();
        let Some(open) = self.0.get(&driver) else {
            let known = self.0.keys().cloned().collect();
            return Err(OpenError::UnknownDriver { driver, known });
        };
        open(entry).map_err(|source| OpenError::Custom { driver, source })
    }
}

impl fmt::Debug for Openers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Openers").field(&self.0.keys()).finish()
    }
}
