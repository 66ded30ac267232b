//! Traces in OpenTelemetry's form, sent over OTLP. Without the feature `traces` these functions do nothing.
//!
//! Which spans exist is decided where they are made, with `tracing`. This module connects them over process boundaries, in
//! the headers of W3C Trace Context, and exports them.

pub use imp::{Exporter, carry, continue_from};

#[cfg(feature = "traces")]
mod imp {
    use std::{collections::HashMap, env, time::Duration};

    use http::HeaderMap;
    use opentelemetry::{
        KeyValue,
        propagation::{Extractor, TextMapPropagator as _},
        trace::{TraceContextExt as _, TracerProvider as _},
    };
    use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
    use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
    use overfill_kv::handoff::TRACE_TARGET;
    use tracing::{Span, Subscriber, level_filters::LevelFilter};
    use tracing_opentelemetry::OpenTelemetrySpanExt as _;
    use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

    /// Time limit of one export, and of the last one at the end of the process.
    const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);

    /// Exports finished spans in the background. Spans that the collector does not take in time are dropped.
    pub struct Exporter(SdkTracerProvider);

    impl Exporter {
        /// Creates the exporter of `service` to the collector at `url`. Must be called within a tokio runtime.
        ///
        /// # Errors
        /// `url` is no URL.
        pub fn new(service: &'static str, url: &str) -> Result<Self, String> {
            let exporter = SpanExporter::builder().with_tonic().with_endpoint(url).with_timeout(EXPORT_TIMEOUT).build();
            let exporter = exporter.map_err(|e| e.to_string())?;
            let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
            let mut resource = Resource::builder().with_attribute(version);
            if env::var_os("OTEL_SERVICE_NAME").is_none() {
                resource = resource.with_service_name(service);
            }
            let provider = SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter);
            Ok(Self(provider.build()))
        }

        /// The layer that turns this program's spans into exported ones.
        pub(crate) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
            let targets = Targets::new()
                .with_target("overfill", LevelFilter::INFO)
                .with_target(TRACE_TARGET, LevelFilter::DEBUG)
                // The spans of background tasks last as long as the process.
                .with_target("overfill_cluster::shutdown", LevelFilter::OFF);
            let layer = tracing_opentelemetry::layer().with_tracer(self.0.tracer("overfill"));
            // Threads, source lines and the executor's times say nothing about a request.
            let layer = layer.with_threads(false).with_location(false).with_target(false);
            layer.with_tracked_inactivity(false).with_filter(targets)
        }

        /// Exports what is left. Takes a few seconds at most, also if there is no collector.
        pub async fn end(self) {
            // Ignored: the process ends, and the collector may be gone.
            let _ = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(EXPORT_TIMEOUT)).await;
        }
    }

    struct Headers<'a>(&'a HeaderMap);

    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.to_str().ok()
        }

        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(http::HeaderName::as_str).collect()
        }
    }

    /// Makes `span` a part of the trace that `headers` name, if they name one. Sets its field `trace_id`.
    pub fn continue_from(span: &Span, headers: &HeaderMap) {
        let context = TraceContextPropagator::new().extract(&Headers(headers));
        if context.span().span_context().is_valid() {
            // Fails if nothing is exported.
            let _ = span.set_parent(context);
        }
        let context = span.context();
        let id = context.span().span_context().trace_id();
        if id != opentelemetry::TraceId::INVALID {
            span.record("trace_id", tracing::field::display(id));
        }
    }

    /// Names and values of the headers that continue the trace of `span` in another process.
    pub fn carry(span: &Span) -> HashMap<String, String> {
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
        headers
    }
}

#[cfg(not(feature = "traces"))]
mod imp {
    use std::collections::HashMap;

    use http::HeaderMap;
    use tracing::Span;

    /// Exports nothing: this program was built without traces.
    pub struct Exporter(());

    impl Exporter {
        /// Always fails.
        ///
        /// # Errors
        /// This program was built without traces.
        pub fn new(_: &'static str, _: &str) -> Result<Self, String> {
            Err("this program was built without the feature traces".into())
        }

        /// Does nothing.
        pub async fn end(self) {
            let Self(()) = self;
        }
    }

    /// Does nothing.
    pub fn continue_from(_: &Span, _: &HeaderMap) {}

    /// No headers.
    pub fn carry(_: &Span) -> HashMap<String, String> {
        HashMap::new()
    }
}
