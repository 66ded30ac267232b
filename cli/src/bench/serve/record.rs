//! The requests of a run as a trace: JSON lines as of the Mooncake traces, with latencies.

use serde_json::json;
use tokio::time::Instant;

use super::client::{Arrivals, Outcome};

/// One line for each successful request, in order of sending. Times count from `start`.
pub fn lines(outcomes: &[Outcome], start: Instant) -> String {
    let mut answered: Vec<_> = outcomes.iter().filter_map(|o| Some((o, o.result.as_ref().ok()?))).collect();
    answered.sort_by_key(|(outcome, _)| outcome.sent);
    let line = |(outcome, arrivals): (&Outcome, &Arrivals)| {
        let since = |later: &Instant, earlier: &Instant| later.duration_since(*earlier).as_secs_f64();
        let (first, last) = (arrivals.times.first()?, arrivals.times.last()?);
        let gaps = arrivals.tokens.saturating_sub(1).max(1) as f64;
        let line = json!({
            "timestamp": (since(&outcome.sent, &start) * 1e6).round() / 1e3,
            "input_length": outcome.prompt_tokens,
            "output_length": arrivals.tokens,
            "ttft_seconds": since(first, &outcome.sent),
            "mean_itl_seconds": since(last, first) / gaps,
        });
        Some(format!("{line}\n"))
    };
    answered.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::client::Failure;
    use super::*;
    use crate::plan::trace::Trace;

    #[test]
    fn a_plan_reads_what_is_recorded() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let answered = |sent: u64| Outcome {
            sent: at(sent),
            prompt_tokens: 7,
            result: Ok(Arrivals { tokens: 2, times: vec![at(sent + 20), at(sent + 50)] }),
        };
        let failure = Failure { kind: "timeout".into(), message: String::new() };
        let failed = Outcome { sent: at(0), prompt_tokens: 9, result: Err(failure) };
        let text = lines(&[answered(2000), failed, answered(1000)], start);
        assert!(text.contains("\"ttft_seconds\":0.02,\"mean_itl_seconds\":0.03"), "{text}");
        let trace = Trace::parse(&text, 0).unwrap();
        let seen: Vec<_> = trace.records.iter().map(|r| (r.at_seconds, r.prompt_tokens, r.output_tokens)).collect();
        assert_eq!(seen, [(1.0, 7, 2), (2.0, 7, 2)]);
    }
}
