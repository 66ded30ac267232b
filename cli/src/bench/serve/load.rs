//! The requests and their arrival times. The same seed gives the same requests.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp, LogNormal};

/// Longest prompt or answer.
const MOST_TOKENS: usize = 1 << 20;
/// 95th percentile of the standard normal distribution.
const NORMAL_P95: f64 = 1.644_853_626_951_472;

/// Length of prompts or answers, in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// The same length for all.
    Fixed(usize),
    /// Equally likely between `low` and `high`.
    Uniform { low: usize, high: usize },
    /// Lognormal: many short and few long ones, like real traffic. Lengths above `most` are cut to it.
    LogNormal { median: usize, p95: usize, most: usize },
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("must be N, uniform:LOW,HIGH or lognormal:MEDIAN,P95[,MAX], got {text:?}");
        let numbers = |list: &str| -> Result<Vec<usize>, String> {
            let numbers: Vec<usize> = list.split(',').map(str::parse).collect::<Result<_, _>>().map_err(|_| form())?;
            match numbers.iter().find(|n| !(1..=MOST_TOKENS).contains(n)) {
                Some(n) => Err(format!("every length must be in [1, {MOST_TOKENS}], got {n}")),
                None => Ok(numbers),
            }
        };
        let (kind, list) = text.split_once(':').unwrap_or(("fixed", text));
        let lengths = match (kind, numbers(list)?.as_slice()) {
            ("fixed", &[n]) => Self::Fixed(n),
            ("uniform", &[low, high]) => Self::Uniform { low, high },
            ("lognormal", &[median, p95]) => Self::LogNormal { median, p95, most: MOST_TOKENS },
            ("lognormal", &[median, p95, most]) => Self::LogNormal { median, p95, most },
            _ => return Err(form()),
        };
        match lengths {
            Self::Uniform { low, high } if low > high => Err(format!("LOW must be at most HIGH, got {low} and {high}")),
            Self::LogNormal { median, p95, .. } if median >= p95 => {
                Err(format!("MEDIAN must be below P95, got {median} and {p95}"))
            }
            lengths => Ok(lengths),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Uniform { low, high } => write!(f, "uniform:{low},{high}"),
            Self::LogNormal { median, p95, most: MOST_TOKENS } => write!(f, "lognormal:{median},{p95}"),
            Self::LogNormal { median, p95, most } => write!(f, "lognormal:{median},{p95},{most}"),
        }
    }
}

impl Lengths {
    /// Draws a length.
    pub fn draw(self, rng: &mut StdRng) -> usize {
        match self {
            Self::Fixed(n) => n,
            Self::Uniform { low, high } => rng.random_range(low..=high),
            Self::LogNormal { median, p95, most } => {
                let (mu, upper) = ((median as f64).ln(), (p95 as f64).ln());
                // Only an infinite or negative spread is refused. `from_str` rejects both.
                let drawn = LogNormal::new(mu, (upper - mu) / NORMAL_P95).map_or(median as f64, |d| d.sample(rng));
                (drawn.round() as usize).clamp(1, most)
            }
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Number of tokens to generate.
    pub output_tokens: usize,
}

/// An endless sequence of requests.
pub struct Workload {
    pub prompt: Lengths,
    pub output: Lengths,
    /// Prompt tokens are drawn from the ids below this.
    pub vocabulary: u32,
    rng: StdRng,
}

impl Workload {
    /// The same `seed` gives the same requests.
    pub fn new(prompt: Lengths, output: Lengths, vocabulary: u32, seed: u64) -> Self {
        Self { prompt, output, vocabulary, rng: StdRng::seed_from_u64(seed) }
    }
}

impl Iterator for Workload {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let (length, output_tokens) = (self.prompt.draw(&mut self.rng), self.output.draw(&mut self.rng));
        let prompt = (0..length).map(|_| self.rng.random_range(0..self.vocabulary)).collect();
        Some(Request { prompt, output_tokens })
    }
}

/// An endless sequence of times between independent arrivals (a Poisson process).
pub fn gaps(requests_per_second: f64, seed: u64) -> impl Iterator<Item = Duration> {
    // Only a negative rate or NaN is refused. The command line rejects both.
    let exponential = Exp::new(requests_per_second).ok();
    let mut rng = StdRng::seed_from_u64(seed);
    std::iter::from_fn(move || Some(Duration::from_secs_f64(exponential?.sample(&mut rng))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(lengths: &str, count: usize) -> Vec<usize> {
        let lengths: Lengths = lengths.parse().unwrap();
        let mut rng = StdRng::seed_from_u64(1);
        let mut drawn: Vec<usize> = (0..count).map(|_| lengths.draw(&mut rng)).collect();
        drawn.sort_unstable();
        drawn
    }

    #[test]
    fn lengths_survive_a_round_trip_through_text() {
        for text in ["7", "uniform:1,1", "uniform:3,900", "lognormal:200,1000", "lognormal:200,1000,4096"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn faults_name_the_limit_and_the_value() {
        let fault = |text: &str| text.parse::<Lengths>().unwrap_err();
        assert!(fault("0").starts_with("every length must be in [1, 1048576], got 0"));
        assert!(fault("uniform:5").starts_with("must be N, uniform:LOW,HIGH or"));
        assert!(fault("normal:5,6").ends_with("got \"normal:5,6\""));
        assert!(fault("-3").starts_with("must be N"));
        assert_eq!(fault("uniform:9,3"), "LOW must be at most HIGH, got 9 and 3");
        assert_eq!(fault("lognormal:9,9"), "MEDIAN must be below P95, got 9 and 9");
    }

    #[test]
    fn fixed_and_uniform_lengths_stay_within_their_bounds_and_reach_them() {
        assert_eq!(draws("5", 3), [5, 5, 5]);
        let drawn = draws("uniform:10,13", 1000);
        for length in 10..=13 {
            let count = drawn.iter().filter(|n| **n == length).count();
            assert!((200..300).contains(&count), "{length} drawn {count} times of 1000");
        }
        assert_eq!((drawn[0], drawn[999]), (10, 13));
    }

    #[test]
    fn lognormal_lengths_have_their_median_and_p95() {
        let drawn = draws("lognormal:200,1000", 20_000);
        assert!((190..210).contains(&drawn[10_000]), "median {}", drawn[10_000]);
        assert!((940..1060).contains(&drawn[19_000]), "p95 {}", drawn[19_000]);
        assert_eq!(draws("lognormal:200,1000,300", 1000).last(), Some(&300));
    }

    #[test]
    fn arrivals_come_at_their_rate_and_at_random() {
        let times: Vec<f64> = gaps(50.0, 3).take(20_000).map(|gap| gap.as_secs_f64()).collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        // In an exponential distribution, a fraction 1 / e of all values is above the mean.
        let above = times.iter().filter(|t| **t > 0.02).count() as f64 / times.len() as f64;
        assert!((above - 0.368).abs() < 0.02, "{above}");
    }

    #[test]
    fn a_seed_gives_the_same_requests() {
        let make = |seed| {
            let (prompt, output) = ("uniform:1,50".parse().unwrap(), "lognormal:5,9".parse().unwrap());
            Workload::new(prompt, output, 200, seed).take(20).collect::<Vec<_>>()
        };
        assert_eq!(make(4), make(4));
        assert_ne!(make(4), make(5));
        assert!(make(4).iter().flat_map(|r| &r.prompt).all(|id| *id < 200));
    }
}
