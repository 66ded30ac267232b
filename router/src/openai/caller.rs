//! Identifies the tenant and the time limit of an HTTP request.

use std::{borrow::Cow, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::Response,
};

use tokio::time::Instant;

use super::error::ApiError;
use crate::{
    GenerateError,
    generate::Core,
    grpc::{MAX_DEADLINE, check_crowd},
    tenants::{TENANT_HEADER, Tenant},
};

/// Header with the request's time limit in seconds, counted from its arrival.
const TIMEOUT_HEADER: &str = "x-overfill-timeout-seconds";

/// Header with an API key alone. Anthropic's clients send it.
const KEY_HEADER: &str = "x-api-key";

/// Tenant and time limit from a request's headers.
#[derive(Clone)]
pub struct Caller {
    /// The tenant that the request belongs to.
    pub tenant: Arc<Tenant>,
    /// Time limit of the request. `None`: the router's default.
    pub time: Option<Duration>,
    /// When the request's headers arrived. Its time limit begins here.
    pub arrived: Instant,
}

impl Caller {
    fn new(core: &Core, headers: &HeaderMap) -> Result<Self, GenerateError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let authorization = text(header::AUTHORIZATION.as_str()).map(Cow::from);
        let authorization = authorization.or_else(|| Some(format!("Bearer {}", text(KEY_HEADER)?).into()));
        let tenant = core.identify(authorization.as_deref(), text(TENANT_HEADER))?;
        let time = match text(TIMEOUT_HEADER) {
            None => None,
            Some(value) => {
                let seconds = value.parse().ok().filter(|s: &f64| *s > 0.0 && *s <= MAX_DEADLINE.as_secs_f64());
                let limit = || GenerateError::limit(TIMEOUT_HEADER, "in (0, 86400]", value);
                Some(Duration::from_secs_f64(seconds.ok_or_else(limit)?))
            }
        };
        Ok(Self { tenant, time, arrived: Instant::now() })
    }
}

/// Middleware that checks the headers before the body is read.
pub async fn identify(State(core): State<Core>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    check_crowd(request.extensions())?;
    let caller = Caller::new(&core, request.headers())?;
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}
