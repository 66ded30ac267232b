//! Where the tokens of an arm are those of the full model's own answers.

use serde::Serialize;

/// Last position of the first range. The ranges behind it are twice as long as all before.
const FIRST_END: usize = 16;

/// Agreement with the full model's greedy answers. At each position, the arm is given the answer up to there.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// By position in the answer. The first token has position 1 and is left out: prefill predicts it.
    pub by_position: Vec<Range>,
    /// Mean length of the answers.
    pub answer_tokens: f64,
    /// Mean number of leading tokens that the arm writes as the full model does.
    pub common_prefix_tokens: f64,
    /// Share of the answers' tokens that belong to such a common prefix.
    pub common_prefix_share: f64,
}

/// Agreement at a range of positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// First position.
    pub first_position: usize,
    /// Last position.
    pub last_position: usize,
    /// Tokens of all answers at these positions.
    pub tokens: usize,
    /// Share of them that the arm chooses as well.
    pub share: f64,
}

impl Agreement {
    /// Counts from one list for each answer: whether the arm chooses the answer's token, at each position from 1.
    pub fn of(answers: &[Vec<bool>]) -> Self {
        let longest = answers.iter().map(Vec::len).max().unwrap_or(0);
        let (mut by_position, mut first, mut last) = (Vec::new(), 2, FIRST_END);
        while first <= longest {
            let at = answers.iter().filter_map(|answer| answer.get(first - 1..answer.len().min(last)));
            let (agreed, tokens) = at.flatten().fold((0, 0), |(a, n), same| (a + usize::from(*same), n + 1));
            let share = agreed as f64 / tokens as f64;
            by_position.push(Range { first_position: first, last_position: last, tokens, share });
            (first, last) = (last + 1, 2 * last);
        }
        let prefix = |answer: &Vec<bool>| answer.iter().take_while(|same| **same).count();
        let (common, all) = answers.iter().fold((0, 0), |(c, n), answer| (c + prefix(answer), n + answer.len()));
        let mean = |sum: usize| sum as f64 / answers.len().max(1) as f64;
        Self {
            by_position,
            answer_tokens: mean(all),
            common_prefix_tokens: mean(common),
            common_prefix_share: common as f64 / all.max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_counted_from_the_second_token_on() {
        let mut long = vec![true; 33];
        (long[1], long[20]) = (false, false);
        let agreement = Agreement::of(&[long, vec![true; 4], vec![false]]);
        let ranges: Vec<(usize, usize, usize)> =
            agreement.by_position.iter().map(|r| (r.first_position, r.last_position, r.tokens)).collect();
        assert_eq!(ranges, [(2, 16, 18), (17, 32, 16), (33, 64, 1)]);
        let shares: Vec<f64> = agreement.by_position.iter().map(|range| range.share).collect();
        assert_eq!(shares, [17.0 / 18.0, 15.0 / 16.0, 1.0]);
        assert_eq!((agreement.answer_tokens, agreement.common_prefix_tokens), (38.0 / 3.0, 5.0 / 3.0));
        assert_eq!(agreement.common_prefix_share, 5.0 / 38.0);
    }
}
