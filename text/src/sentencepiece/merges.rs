//! SentencePiece's BPE as ranked merges.
//!
//! SentencePiece merges the two neighbours whose concatenation is the piece with the best score, the leftmost of several. The
//! `tokenizers` crate merges the two neighbours whose pair has the best rank, the leftmost of several. So each split of a
//! piece into two pieces is a pair, ranked by the piece's score.
//!
//! Pairs of the same score, such as the splits of one piece, need an order. It matters only where two of them overlap: for
//! neighbours x, y, z, SentencePiece merges x and y. So the pair (x, y) comes before the pair (y, z).

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
};

type Pair<'a> = (&'a str, &'a str);

/// The pairs that merge into each of `pieces`, best rank first. `pieces` are texts and their scores, in the order of their
/// ids. Fails with two pieces of the same score if no order of pairs is SentencePiece's.
///
/// The splits of a text that repeats another, such as a run of spaces, have no such order: `x|xx` and `xx|x`. Such texts are
/// merged from the left, so one of the two does not occur, and any order will do.
pub fn ranked_merges<'a>(pieces: &[(&'a str, f32)]) -> Result<Vec<Pair<'a>>, [&'a str; 2]> {
    let scores: HashMap<&str, f32> = pieces.iter().copied().collect();
    let mut found: Vec<(f32, &str, Pair<'_>)> = Vec::new();
    // Pieces that merge into a piece with a better score than their own.
    let mut promoted = HashSet::new();
    for &(text, score) in pieces {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            let (Some(left_score), Some(right_score)) = (scores.get(left), scores.get(right)) else { continue };
            found.push((score, text, (left, right)));
            promoted.extend((*left_score < score).then_some(left));
            promoted.extend((*right_score < score).then_some(right));
        }
    }
    // Stable: pairs of the same score stay in the order of ids and splits.
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut merges = Vec::with_capacity(found.len());
    for ties in found.chunk_by(|a, b| a.0 == b.0) {
        let pairs: Vec<Pair<'_>> = ties.iter().map(|(.., pair)| *pair).collect();
        let other = ties.iter().find(|(_, text, _)| *text != ties[0].1);
        let second = other.map_or(ties[0].1, |(_, text, _)| text);
        // After one of these merges there may be a better one than the rest, so their order in the text would matter.
        if let Some((_, text, _)) = other.and(ties.iter().find(|(_, text, _)| promoted.contains(text))) {
            return Err([text, if *text == second { ties[0].1 } else { second }]);
        }
        merges.extend(left_first(&pairs).ok_or([ties[0].1, second])?);
    }
    Ok(merges)
}

/// Sorts pairs so that (x, y) comes before (y, z), and pairs that need no order stay in theirs. `None` if there is no such
/// order.
fn left_first<'a>(pairs: &[Pair<'a>]) -> Option<Vec<Pair<'a>>> {
    if pairs.len() < 2 {
        return Some(pairs.to_vec());
    }
    // For each text y, one node follows all pairs (x, y), and one precedes all pairs (y, z). The pair (y, y) is between them.
    let mut texts: HashMap<&str, usize> = HashMap::new();
    for text in pairs.iter().flat_map(|(left, right)| [left, right]) {
        let next = texts.len();
        texts.entry(text).or_insert(next);
    }
    let after = |text: &str| pairs.len() + 2 * texts[text];
    let before = |text: &str| after(text) + 1;
    let count = pairs.len() + 2 * texts.len();
    let mut edges = vec![Vec::new(); count];
    texts.keys().for_each(|text| edges[after(text)].push(before(text)));
    for (index, (left, right)) in pairs.iter().enumerate() {
        let (from, to) = if left == right { (after(left), before(left)) } else { (before(left), after(right)) };
        edges[from].push(index);
        edges[index].push(to);
    }
    let mut waits_for = vec![0_usize; count];
    edges.iter().flatten().for_each(|to| waits_for[*to] += 1);
    let mut ready: BinaryHeap<_> = (0..count).filter(|node| waits_for[*node] == 0).map(Reverse).collect();
    let (mut sorted, mut done) = (Vec::with_capacity(pairs.len()), vec![false; count]);
    let mut repeated = (0..pairs.len()).filter(|index| repeats(pairs[*index]));
    while sorted.len() < pairs.len() {
        let node = match ready.pop() {
            Some(Reverse(node)) => node,
            // What is left has no order. The next text that repeats another begins.
            None => repeated.find(|index| waits_for[*index] > 0)?,
        };
        // A pair that was taken so may become ready later.
        if std::mem::replace(&mut done[node], true) {
            continue;
        }
        sorted.extend(pairs.get(node));
        for to in &edges[node] {
            waits_for[*to] -= 1;
            if waits_for[*to] == 0 {
                ready.push(Reverse(*to));
            }
        }
    }
    Some(sorted)
}

/// Whether both parts repeat the same text: only then do they give the same in both orders.
fn repeats((left, right): Pair<'_>) -> bool {
    let (left, right) = (left.bytes(), right.bytes());
    left.clone().chain(right.clone()).eq(right.chain(left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_pairs_are_ranked_as_the_leftmost_merge() {
        // "anana" becomes an, a, na. The left pair of the overlapping ones is an|a.
        let pieces = [("a", -9.0), ("n", -9.1), ("an", -1.0), ("na", -1.5), ("ana", -2.0)];
        assert_eq!(ranked_merges(&pieces), Ok(vec![("a", "n"), ("n", "a"), ("an", "a"), ("a", "na")]));
        // Nothing overlaps here.
        let pieces = [("xyz", 0.0), ("x", -1.0), ("yz", -2.0), ("xy", -3.0), ("z", -4.0), ("y", -5.0)];
        assert_eq!(ranked_merges(&pieces).unwrap()[..2], [("x", "yz"), ("xy", "z")]);
        // Runs of one character.
        for (pieces, first) in [
            ([("xx", -1.0), ("xxxx", -2.0), ("xxx", -3.0), ("x", -4.0)], ("x", "x")),
            ([("xx", -1.0), ("xxxx", -1.0), ("xxx", -1.0), ("x", -4.0)], ("x", "x")),
        ] {
            let merges = ranked_merges(&pieces).unwrap();
            assert_eq!((merges.len(), merges[0]), (6, first));
        }
        let pieces = [("ab", -1.0), ("abab", -2.0), ("ababab", -3.0), ("a", -4.0), ("b", -5.0)];
        assert_eq!(ranked_merges(&pieces).unwrap(), [("a", "b"), ("ab", "ab"), ("ab", "abab"), ("abab", "ab")]);
    }

    #[test]
    fn pieces_may_have_the_same_score_if_there_is_an_order() {
        let letters = [("a", -9.0), ("b", -9.1), ("c", -9.2)];
        let with = |more: &[(&'static str, f32)]| ranked_merges(&[&letters, more].concat());
        assert_eq!(with(&[("bc", 0.0), ("ab", 0.0)]), Ok(vec![("a", "b"), ("b", "c")]));
        assert_eq!(with(&[("bc", 0.0), ("bb", 0.0), ("ab", 0.0)]), Ok(vec![("a", "b"), ("b", "b"), ("b", "c")]));
        // In "aba", either may be the left one.
        assert_eq!(with(&[("ab", 0.0), ("ba", 0.0)]), Err(["ab", "ba"]));
        // In "abaca", the merge of "ab" makes a better one possible.
        assert_eq!(with(&[("ab", 0.0), ("ac", 0.0), ("aba", 1.0)]), Err(["ab", "ac"]));
    }
}
