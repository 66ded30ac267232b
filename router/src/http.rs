//! What happens to HTTP requests before the handlers of any API see them: compressed bodies are unpacked, web pages of other
//! origins are let in, and a slash at the end of a path is dropped.

use std::io;

use async_compression::tokio::bufread::GzipDecoder;
use axum::{
    RequestExt as _, Router,
    body::Body,
    extract::Request,
    http::{HeaderValue, Method, StatusCode, Uri, header, uri::PathAndQuery},
    middleware::Next,
    response::Response,
};
use futures::TryStreamExt as _;
use tokio_util::io::{ReaderStream, StreamReader};
use tower::util::MapRequest;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::openai::error::ApiError;

/// The value of the setting that allows web pages of all origins.
const ANY_ORIGIN: &str = "*";
/// How long browsers may remember that an origin is allowed. Chromium's limit is two hours.
const MAX_AGE: std::time::Duration = std::time::Duration::from_secs(2 * 3600);
/// Paths below this one are files, some of which have a slash at the end.
const FILES: &str = "/page/";

/// Middleware that unpacks bodies with `content-encoding: gzip` while they are read, so the limits of size and time of a
/// body hold for the packed and for the unpacked body. Other encodings give status 415.
pub async fn decompress(mut request: Request, next: Next) -> Result<Response, ApiError> {
    let mut encodings = request.headers().get_all(header::CONTENT_ENCODING).iter();
    let (encoding, second) = (encodings.next(), encodings.next());
    let is = |name: &str| encoding.is_some_and(|given| given.as_bytes().eq_ignore_ascii_case(name.as_bytes()));
    if encoding.is_none() || second.is_none() && is("identity") {
        return Ok(next.run(request).await);
    }
    if second.is_some() || !is("gzip") {
        let given: Vec<_> = encoding.into_iter().chain(second).map(|value| value.to_str().unwrap_or("?")).collect();
        let message = format!("content-encoding must be gzip or identity, got {}", given.join(", "));
        return Err(ApiError::bad_request(message).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
    }
    request.headers_mut().remove(header::CONTENT_ENCODING);
    // The length of the compressed body says nothing about the other.
    request.headers_mut().remove(header::CONTENT_LENGTH);
    // A packed body that unpacks to nothing could be endless.
    let request = request.with_limited_body().map(|body| {
        let packed = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
        let mut unpacked = GzipDecoder::new(packed);
        unpacked.multiple_members(true);
        Body::from_stream(ReaderStream::new(unpacked))
    });
    Ok(next.run(request).await)
}

/// Whether `origin` may stand in the list for [`allow_origins`]: `*`, or a scheme and a host with an optional port.
pub fn is_origin(origin: &str) -> bool {
    let named = || {
        let (scheme, rest) = origin.split_once("://")?;
        let uri: Uri = origin.parse().ok()?;
        (!scheme.is_empty() && uri.authority()?.as_str() == rest && !rest.contains('@')).then_some(())
    };
    origin == ANY_ORIGIN || named().is_some()
}

/// A layer that tells browsers that web pages of these origins may use the API (CORS). It also answers the questions that
/// browsers ask before (OPTIONS), which have no API key. Cookies are not used, so none are allowed.
pub fn allow_origins(origins: &[HeaderValue]) -> CorsLayer {
    let origin = match origins.iter().any(|origin| origin == ANY_ORIGIN) {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().cloned()),
    };
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST])
        // `*` would not include `authorization`.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([header::RETRY_AFTER])
        .max_age(MAX_AGE)
}

/// Serves `app` so that a slash at the end of a path makes no difference.
pub fn trim_slashes(app: Router) -> Router {
    let trim = |mut request: Request| {
        if let Some(uri) = trimmed(request.uri()) {
            *request.uri_mut() = uri;
        }
        request
    };
    // The path has to change before the router sees it.
    Router::new().fallback_service(MapRequest::new(app, trim))
}

/// `uri` without slashes at the end of its path. `None`: there are none to drop.
fn trimmed(uri: &Uri) -> Option<Uri> {
    let path = uri.path().strip_suffix('/').filter(|path| !path.is_empty() && !uri.path().starts_with(FILES))?;
    let path = path.trim_end_matches('/');
    let query = uri.query().map_or(String::new(), |query| format!("?{query}"));
    let path = if path.is_empty() { "/" } else { path };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(format!("{path}{query}")).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        for origin in ["*", "http://localhost:3000", "https://example.com", "tauri://localhost", "http://[::1]:80"] {
            assert!(is_origin(origin), "{origin}");
        }
        for origin in
            ["", "example.com", "https://", "https://example.com/", "https://a.com/b", "https://u@a.com", "a b"]
        {
            assert!(!is_origin(origin), "{origin}");
        }
    }

    #[test]
    fn slashes() {
        let path = |uri: &str| trimmed(&uri.parse().unwrap()).map(|uri| uri.to_string());
        assert_eq!(path("/v1/models/"), Some("/v1/models".into()));
        assert_eq!(path("/v1/models//?a=b/"), Some("/v1/models?a=b/".into()));
        assert_eq!(path("http://host/v1/models/"), Some("http://host/v1/models".into()));
        assert_eq!(path("//"), Some("/".into()));
        for unchanged in ["/", "/v1/models", "/v1/models?a=/", "/page/", "/page/a/", "*"] {
            assert_eq!(path(unchanged), None, "{unchanged}");
        }
    }
}
