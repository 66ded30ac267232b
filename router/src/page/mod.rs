//! The web page of the router: an overview of the cluster, and a playground. Its files are part of the binary.
//!
//! The files are served to everybody: they contain no data. Data needs an API key, if the router has keys.

mod state;

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderValue, StatusCode, header},
    middleware::from_fn_with_state,
    response::{IntoResponse as _, Redirect, Response},
    routing::{get, post},
};
use include_dir::{Dir, include_dir};
use overfill_proto::v1;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::info;

use crate::{
    generate::Core,
    openai::{
        caller::{self, Caller},
        error::ApiError,
    },
};

static FILES: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/src/page/static");

/// Nothing but the page's own files may run, and no other site may frame it.
const POLICY: &str = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// Time limit of the call that asks a node to drain.
const DRAIN_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// What the page may do besides showing the state.
#[derive(Clone, Copy, Debug)]
pub struct PageRights {
    /// Whether clients without an API key may drain nodes: only if the router listens on loopback.
    pub drain_without_key: bool,
}

#[derive(Clone)]
struct Page {
    core: Core,
    rights: PageRights,
}

/// The routes of the page, below `/page`.
pub fn routes(core: Core, rights: PageRights) -> Router {
    let page = Page { core: core.clone(), rights };
    let data = Router::new()
        .route("/page/state", get(async |State(page): State<Page>| Json(state::state(&page.core))))
        .route("/page/drain", post(drain))
        .route_layer(from_fn_with_state(core, caller::identify));
    Router::new()
        .route("/page", get(async || Redirect::permanent("/page/")))
        .route("/page/", get(async || file("index.html")))
        .route("/page/{*path}", get(async |Path(path): Path<String>| file(&path)))
        .merge(data)
        .with_state(page)
}

fn file(path: &str) -> Response {
    let Some(file) = FILES.get_file(path) else {
        return ApiError::bad_request("no such path").with_status(StatusCode::NOT_FOUND).into_response();
    };
    let kind = match path.rsplit_once('.').map_or("", |(_, ending)| ending) {
        "html" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "svg" => "image/svg+xml",
        "md" | "txt" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    };
    let mut response = Response::new(Body::from(file.contents()));
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new version of the router has new files.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

#[derive(Deserialize)]
struct DrainBody {
    url: String,
}

/// Asks a node to drain. The body must be JSON: a page of another site can't send that content type unasked.
async fn drain(
    State(page): State<Page>,
    axum::Extension(caller): axum::Extension<Caller>,
    body: Result<Json<DrainBody>, axum::extract::rejection::JsonRejection>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let refused = |status, message: String| Err(ApiError::bad_request(message).with_status(status));
    let Json(DrainBody { url }) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(rejection.status(), rejection.body_text()),
    };
    let allowed = match page.core.has_keys() {
        true => caller.tenant.admin,
        false => page.rights.drain_without_key,
    };
    if !allowed {
        let message =
            "draining needs an API key with \"admin\": true, or a router without keys that listens on loopback";
        return refused(StatusCode::FORBIDDEN, message.into());
    }
    let node = page.core.nodes.statuses().into_iter().find(|status| status.url == url).and_then(|status| status.node);
    let Some(node) = node else {
        return refused(StatusCode::NOT_FOUND, format!("url must be that of a connected node, got {url}"));
    };
    info!(%url, tenant = %caller.tenant.name, "drain requested on the page");
    let mut client = node.node_client();
    match timeout(DRAIN_TIMEOUT, client.drain(v1::DrainRequest::default())).await {
        Ok(Ok(_)) => Ok((StatusCode::ACCEPTED, Json(json!({"draining": true})))),
        Ok(Err(status)) => refused(StatusCode::BAD_GATEWAY, format!("the node refused: {}", status.message())),
        Err(_) => refused(StatusCode::GATEWAY_TIMEOUT, format!("no answer within {} s", DRAIN_TIMEOUT.as_secs())),
    }
}
