//! Finds stop strings in streamed text.

/// Forwards streamed text up to the first stop string. Text that may be the beginning of a stop string is held back.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    keep_stop: bool,
    held: String,
    done: bool,
}

/// The stop string that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Index of the stop string in the list passed to [`StopMatcher::new`].
    pub stop: usize,
}

impl StopMatcher {
    /// Looks for any of `stops`. Empty strings are ignored. With `keep_stop` the stop string is part of the text.
    pub fn new(stops: Vec<String>, keep_stop: bool) -> Self {
        Self { stops, keep_stop, held: String::new(), done: false }
    }

    /// Adds text. Returns the text that has become final and the match, if there is one. After a match, all further text
    /// is discarded.
    ///
    /// If several stop strings match, the match that ends first counts, because a stream can't wait for later text. Among
    /// matches with the same end, the one that begins first counts.
    pub fn push(&mut self, text: &str) -> (String, Option<StopMatch>) {
        if self.done {
            return (String::new(), None);
        }
        if self.stops.is_empty() {
            return (text.to_owned(), None);
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(i, stop)| {
                let at = self.held.find(stop.as_str())?;
                Some((at + stop.len(), at, i))
            })
            .min();
        if let Some((_, at, stop)) = found {
            self.done = true;
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.keep_stop { at + self.stops[stop].len() } else { at });
            return (text, Some(StopMatch { stop }));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Ends the stream and returns the text that was held back.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length in bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn a_stop_over_several_pieces() {
        let mut m = StopMatcher::new(stops(&["</end>", "##"]), false);
        assert_eq!(m.push("abc</"), ("abc".into(), None));
        assert_eq!(m.push("en"), ("".into(), None));
        assert_eq!(m.push("t #"), ("</ent ".into(), None));
        assert_eq!(m.push("x</end>tail"), ("#x".into(), Some(StopMatch { stop: 0 })));
        assert_eq!(m.push("more"), ("".into(), None));
        assert_eq!(m.flush(), "");
    }

    #[test]
    fn the_first_complete_match_counts() {
        for pieces in [&["aaé", "b"][..], &["aaéb"], &["a", "a", "é", "b"]] {
            let mut m = StopMatcher::new(stops(&["aéb", "é"]), false);
            let mut out = String::new();
            let mut found = None;
            for piece in pieces {
                let (text, stop) = m.push(piece);
                out += &text;
                found = found.or(stop);
            }
            assert_eq!((out.as_str(), found), ("aa", Some(StopMatch { stop: 1 })));
        }
    }

    #[test]
    fn what_was_held_is_text_at_the_end() {
        let mut m = StopMatcher::new(stops(&["world"]), false);
        assert_eq!(m.push("hello wor"), ("hello ".into(), None));
        assert_eq!(m.flush(), "wor");
    }

    #[test]
    fn the_stop_may_be_kept_and_characters_stay_whole() {
        let mut m = StopMatcher::new(stops(&["é!", ""]), true);
        assert_eq!(m.push("caf"), ("caf".into(), None));
        assert_eq!(m.push("é"), ("".into(), None));
        assert_eq!(m.push("!?"), ("é!".into(), Some(StopMatch { stop: 0 })));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,40}", cut in prop::collection::vec(1usize..5, 1..20),
                                list in prop::collection::vec("[abé]{1,4}", 1..4)) {
            let matches = list.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at)));
            let expected = match matches.min() {
                Some((_, at)) => text[..at].to_owned(),
                None => text.clone(),
            };
            let mut m = StopMatcher::new(list, false);
            let mut out = String::new();
            let chars: Vec<char> = text.chars().collect();
            let (mut at, mut i) = (0, 0);
            while at < chars.len() {
                let n = cut[i % cut.len()].min(chars.len() - at);
                out += &m.push(&chars[at..at + n].iter().collect::<String>()).0;
                prop_assert!(expected.starts_with(&out));
                (at, i) = (at + n, i + 1);
            }
            out += &m.flush();
            prop_assert_eq!(out, expected);
        }
    }
}
