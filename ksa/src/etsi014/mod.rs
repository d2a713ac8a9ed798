//! ETSI GS QKD 014 V1.1.1: its three resources, as an axum router.

mod reply;
mod request;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{Method, StatusCode},
    response::Response,
    routing::any,
};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use qkd_keyfile::{AppId, KeyBits, KsaKeyId};
use tokio::time::timeout;

use self::request::{FormError, KeyRequest, Refusal, key_id_from_query, key_ids_from_json, sae_id};
use crate::{
    Counters, KeySupply, Profile, SuppliedKey, SupplyByIdRequest, SupplyError, SupplyRequest,
};

/// Who is at the other end of the connection, by its certificate. Every request carries one.
#[derive(Debug, Clone)]
pub(crate) struct Caller(pub(crate) AppId);

/// What every request needs.
#[derive(Debug)]
pub(crate) struct Service<S> {
    pub(crate) supply: Arc<S>,
    pub(crate) profile: Profile,
    pub(crate) bounds: Bounds,
    pub(crate) counters: Arc<Counters>,
}

/// Bounds of one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) body_bytes: usize,
    pub(crate) body_within: Duration,
    pub(crate) answer_within: Duration,
}

/// The three resources of clause 5. The caller comes as an extension, [`Caller`].
pub(crate) fn router<S: KeySupply>(service: Arc<Service<S>>) -> Router {
    Router::new()
        .route("/api/v1/keys/{sae_id}/status", any(status::<S>))
        .route("/api/v1/keys/{sae_id}/enc_keys", any(enc_keys::<S>))
        .route("/api/v1/keys/{sae_id}/dec_keys", any(dec_keys::<S>))
        .fallback(not_found::<S>)
        .with_state(service)
}

type Sae = Result<Path<String>, PathRejection>;
type Parameters = Result<Query<Vec<(String, String)>>, QueryRejection>;
type Shared<S> = State<Arc<Service<S>>>;

/// Clause 5, Get status.
async fn status<S: KeySupply>(
    State(service): Shared<S>,
    Extension(Caller(caller)): Extension<Caller>,
    sae: Sae,
    method: Method,
) -> Response {
    if method != Method::GET {
        return service.finish(&caller, "status", Ok(reply::method_not_allowed("GET")));
    }
    let answer = async {
        let peer = peer(sae)?;
        let stock = service
            .in_time(service.supply.status(&caller, &peer))
            .await?;
        Ok(reply::status(&stock, &service.profile, &caller, &peer))
    };
    service.finish(&caller, "status", answer.await)
}

/// Clause 5, Get key.
async fn enc_keys<S: KeySupply>(
    State(service): Shared<S>,
    Extension(Caller(caller)): Extension<Caller>,
    sae: Sae,
    parameters: Parameters,
    method: Method,
    body: Body,
) -> Response {
    let answer = async {
        let slave = peer(sae)?;
        let request = match method {
            Method::GET => KeyRequest::from_query(&query(parameters)?, &service.profile)?,
            Method::POST => {
                no_parameters(parameters)?;
                KeyRequest::from_json(&service.body(body).await?, &service.profile)?
            }
            _ => return Ok(reply::method_not_allowed("GET, POST")),
        };
        let KeyRequest {
            number,
            size,
            additional,
            level,
        } = request;
        if additional.contains(&slave) {
            return Err(FormError::SaeIdTwice.into());
        }
        let mut destinations = vec![slave];
        destinations.extend(additional);
        let request = SupplyRequest {
            caller: caller.clone(),
            destinations,
            number,
            size,
            level,
        };
        let keys = service.in_time(service.supply.supply(request)).await?;
        service.key_reply(&keys, |keys| is_what_was_asked(keys, number, size))
    };
    service.finish(&caller, "enc_keys", answer.await)
}

/// Clause 5, Get key with key IDs.
async fn dec_keys<S: KeySupply>(
    State(service): Shared<S>,
    Extension(Caller(caller)): Extension<Caller>,
    sae: Sae,
    parameters: Parameters,
    method: Method,
    body: Body,
) -> Response {
    let answer = async {
        let master = peer(sae)?;
        let ids = match method {
            Method::GET => vec![key_id_from_query(&query(parameters)?)?],
            Method::POST => {
                no_parameters(parameters)?;
                key_ids_from_json(&service.body(body).await?, &service.profile)?
            }
            _ => return Ok(reply::method_not_allowed("GET, POST")),
        };
        let request = SupplyByIdRequest {
            caller: caller.clone(),
            master,
            ids: ids.clone(),
        };
        let keys = service
            .in_time(service.supply.supply_by_id(request))
            .await?;
        service.key_reply(&keys, |keys| are_those_asked_for(keys, &ids))
    };
    service.finish(&caller, "dec_keys", answer.await)
}

async fn not_found<S: KeySupply>(
    State(service): Shared<S>,
    Extension(Caller(caller)): Extension<Caller>,
) -> Response {
    service.finish(&caller, "unknown path", Ok(reply::not_found()))
}

impl<S: KeySupply> Service<S> {
    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, SupplyError>>,
    ) -> Result<T, SupplyError> {
        timeout(self.bounds.answer_within, answer)
            .await
            .unwrap_or(Err(SupplyError::TimedOut))
    }

    async fn body(&self, body: Body) -> Result<Bytes, FormError> {
        let most = self.bounds.body_bytes;
        let collected = Limited::new(body, most).collect();
        match timeout(self.bounds.body_within, collected).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(FormError::BodyTooLong { most })
            }
            Ok(Err(_)) | Err(_) => Err(FormError::BodyLost),
        }
    }

    /// Never hands out something else than what was asked for, whatever the supply does.
    fn key_reply(
        &self,
        keys: &[SuppliedKey],
        is_right: impl Fn(&[SuppliedKey]) -> bool,
    ) -> Result<Response, Refusal> {
        if !is_right(keys) {
            tracing::error!("the supply's keys are not those asked for; they are not handed out");
            return Err(SupplyError::Faulty.into());
        }
        self.counters.keys.add(keys.len() as u64);
        Ok(reply::keys(keys))
    }

    fn finish(
        &self,
        caller: &AppId,
        operation: &'static str,
        answer: Result<Response, Refusal>,
    ) -> Response {
        let response = answer.unwrap_or_else(|refusal| {
            match &refusal {
                Refusal::Supply(error) if error.status() == 503 => {
                    tracing::warn!(%caller, operation, "not supplied: {error}");
                }
                _ => tracing::info!(%caller, operation, "refused: {refusal}"),
            }
            reply::refusal(&refusal)
        });
        let counter = match response.status() {
            StatusCode::OK => &self.counters.answered,
            StatusCode::UNAUTHORIZED => &self.counters.unauthorised,
            StatusCode::SERVICE_UNAVAILABLE => &self.counters.unavailable,
            _ => &self.counters.refused,
        };
        counter.add(1);
        response
    }
}

fn peer(sae: Sae) -> Result<AppId, FormError> {
    let Path(text) = sae.map_err(|_| FormError::SaeId)?;
    sae_id(&text)
}

fn query(parameters: Parameters) -> Result<Vec<(String, String)>, FormError> {
    let Query(pairs) = parameters.map_err(|_| FormError::Query)?;
    Ok(pairs)
}

/// A POST says all in its body; a query beside it would be ignored, so it is refused.
fn no_parameters(parameters: Parameters) -> Result<(), FormError> {
    if query(parameters)?.is_empty() {
        return Ok(());
    }
    Err(FormError::QueryOfPost)
}

fn is_what_was_asked(keys: &[SuppliedKey], number: u32, size: KeyBits) -> bool {
    keys.len() == number as usize && keys.iter().all(|key| key.key.len_bytes() == size.bytes())
}

fn are_those_asked_for(keys: &[SuppliedKey], ids: &[KsaKeyId]) -> bool {
    keys.iter().map(|key| key.id).eq(ids.iter().copied())
}
