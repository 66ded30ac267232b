//! One model or a pair on the serving engine: it reads given texts, or writes its own, in each mode.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use overfill_kv::{BLOCK_TOKENS, BlockId, OutputToken, blocks_for};
use overfill_model::{LoadOptions, Rows};
use serde::Serialize;

use super::runner::{Runner, Span, Wanted, hand_over};

/// How an answer comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One model does everything.
    Alone,
    /// Mode draft: the decode model writes all but the first token.
    Draft,
    /// Mode refresh.
    Refresh,
    /// Mode exact, with this number of drafts for each verdict.
    Exact {
        /// Number of drafts.
        drafts: usize,
    },
}

/// What became of the drafts in mode exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Drafting {
    /// Drafts that the full model was given.
    pub drafted_tokens: usize,
    /// Drafts that stand.
    pub accepted_tokens: usize,
    /// Tokens that came out of verdicts: drafts that stand, and one more for each verdict.
    pub verdict_tokens: usize,
    /// Number of verdicts of the full model, each on one answer.
    pub verdicts: usize,
}

impl Drafting {
    /// Adds those of another batch.
    pub(super) fn add(&mut self, other: &Self) {
        self.drafted_tokens += other.drafted_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.verdict_tokens += other.verdict_tokens;
        self.verdicts += other.verdicts;
    }
}

/// A full model that prefills, and a decode model over its KV. Or one model that does both.
pub struct Stages {
    full: Runner,
    decode: Option<Runner>,
    kv_blocks: usize,
    /// Block table of each prompt, the same in both models.
    tables: Vec<Vec<BlockId>>,
}

impl Stages {
    /// Loads a model, and a decode model over its KV if there is one, with room for `kv_blocks` blocks of KV.
    ///
    /// # Errors
    /// A model can't be loaded, or the decode model can't use the full model's KV.
    pub fn load(full: &Path, decode: Option<&Path>, options: &LoadOptions, kv_blocks: usize) -> Result<Self> {
        // As on a prefill node and on a decode node.
        let of = |rows| LoadOptions { rows, ..*options };
        let full = Runner::load(full, &of(Rows::Many), kv_blocks)?;
        let decode = decode.map(|decode| Runner::load(decode, &of(Rows::Few), kv_blocks)).transpose()?;
        if let Some(decode) = &decode {
            full.model().producer_schema().check_consumer(&decode.model().kv_schema())?;
        }
        Ok(Self { full, decode, kv_blocks, tables: Vec::new() })
    }

    /// Ids of the tokens that end a text.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        self.full.model().eos_token_ids().to_vec()
    }

    /// Computes the full model's KV of prompts, but for their last tokens, with room for `lengths[i]` tokens after prompt
    /// `i`. [`Self::read`] and [`Self::write`] go on from there, with the same prompts.
    ///
    /// # Errors
    /// A prompt is empty, there is not enough room, or the computation failed.
    pub fn prefill(&mut self, prompts: &[&[u32]], lengths: &[usize]) -> Result<()> {
        let Self { full, tables, kv_blocks, .. } = self;
        ensure!(prompts.iter().all(|prompt| !prompt.is_empty()), "a prompt has no token");
        let longest = prompts.iter().zip(lengths).map(|(prompt, length)| prompt.len() + length).max().unwrap_or(0);
        let context = full.model().max_context_tokens();
        ensure!(longest <= context, "a prompt and its answer need {longest} tokens, the model's context has {context}");
        let mut end = 0;
        let mut table = |(prompt, length): (&&[u32], &usize)| {
            let start = end;
            end += blocks_for(prompt.len() + length) as u32;
            (start..end).map(BlockId).collect()
        };
        *tables = prompts.iter().zip(lengths).map(&mut table).collect();
        ensure!(end as usize <= *kv_blocks, "the prompts and answers need {end} KV blocks, there are {kv_blocks}");
        let spans: Vec<Span<'_>> = tables
            .iter()
            .zip(prompts)
            .map(|(blocks, prompt)| Span {
                blocks,
                start: 0,
                tokens: &prompt[..prompt.len() - 1],
                want: Wanted::Nothing,
            })
            .collect();
        full.run(&spans).map(drop)
    }

    /// The scores of given texts after the prompts: for each token its log-probability, and the most likely token in its
    /// place. In mode exact, they are the full model's.
    ///
    /// # Errors
    /// There is no decode model, a text is empty, or the computation failed.
    pub fn read(&mut self, way: Way, prompts: &[&[u32]], texts: &[&[u32]]) -> Result<Vec<Vec<OutputToken>>> {
        let Self { full, decode, tables, .. } = self;
        ensure!(texts.iter().all(|text| !text.is_empty()), "a text has no token");
        // In mode draft, the full model predicts the first token only.
        let texts_of_full = texts.iter().map(|text| if way == Way::Draft { &text[..1] } else { text });
        let inputs: Vec<(Vec<u32>, &[u32])> = prompts
            .iter()
            .zip(texts_of_full)
            .map(|(prompt, text)| {
                (prompt[prompt.len() - 1..].iter().chain(text).copied().take(text.len()).collect(), text)
            })
            .collect();
        let spans: Vec<Span<'_>> = (0..inputs.len())
            .map(|i| Span {
                blocks: &tables[i],
                start: prompts[i].len() - 1,
                tokens: &inputs[i].0,
                want: Wanted::Scores(inputs[i].1),
            })
            .collect();
        let mut scores = full.run(&spans)?;
        if matches!(way, Way::Alone | Way::Exact { .. }) {
            return Ok(scores);
        }
        let decode = decode.as_mut().context("there is no decode model")?;
        for ((scores, table), prompt) in scores.iter_mut().zip(&*tables).zip(prompts) {
            scores.truncate(1);
            hand_over(full.model(), decode.model(), &table[..blocks_for(prompt.len())])?;
        }
        // In mode refresh, the tokens of one block are computed together: they attend to the same blocks of the full model.
        for part in 0.. {
            let mut spans = Vec::new();
            for (i, text) in texts.iter().enumerate() {
                let (start, end) = (prompts[i].len(), prompts[i].len() + text.len() - 1);
                let block = start / BLOCK_TOKENS + part;
                let range = match way {
                    Way::Refresh => start.max(block * BLOCK_TOKENS)..end.min((block + 1) * BLOCK_TOKENS),
                    _ if part == 0 => start..end,
                    _ => 0..0,
                };
                if range.is_empty() {
                    continue;
                }
                if part >= 2 {
                    hand_over(full.model(), decode.model(), &tables[i][block - 2..block - 1])?;
                }
                let (from, to) = (range.start - start, range.end - start);
                let want = Wanted::Scores(&text[from + 1..to + 1]);
                spans.push((i, Span { blocks: &tables[i], start: range.start, tokens: &text[from..to], want }));
            }
            if spans.is_empty() {
                break;
            }
            let (of, spans): (Vec<usize>, Vec<Span<'_>>) = spans.into_iter().unzip();
            for (i, found) in of.into_iter().zip(decode.run(&spans)?) {
                scores[i].extend(found);
            }
        }
        Ok(scores)
    }

    /// Writes at most `most[i]` tokens after prompt `i`, greedily. A token of `stop` ends an answer and belongs to it.
    ///
    /// # Errors
    /// There is no decode model, or the computation failed.
    pub fn write(
        &mut self,
        way: Way,
        prompts: &[&[u32]],
        most: &[usize],
        stop: &[u32],
    ) -> Result<(Vec<Vec<u32>>, Drafting)> {
        let Self { full, decode, tables, .. } = self;
        let spans: Vec<Span<'_>> = tables
            .iter()
            .zip(prompts)
            .map(|(blocks, prompt)| {
                let start = prompt.len() - 1;
                Span { blocks, start, tokens: &prompt[start..], want: Wanted::Choose(1) }
            })
            .collect();
        let first = full.run(&spans)?;
        let mut texts: Vec<Text<'_>> = (0..prompts.len())
            .map(|i| {
                let tokens: Vec<u32> = prompts[i].iter().copied().chain(first[i].iter().map(|t| t.token)).collect();
                let (prompt, landed) = (prompts[i].len(), prompts[i].len() / BLOCK_TOKENS);
                let (blocks, standing, most) = (&tables[i][..], tokens.len(), most[i]);
                Text { blocks, prompt, tokens, standing, computed: prompt, given: prompt, landed, most, stop }
            })
            .collect();
        let mut drafting = Drafting::default();
        if way == Way::Alone {
            while Text::step(full, texts.iter_mut().filter(|text| !text.is_over()))? {}
            return Ok((texts.into_iter().map(Text::into_output).collect(), drafting));
        }
        let decode = decode.as_mut().context("there is no decode model")?;
        for text in &texts {
            hand_over(full.model(), decode.model(), &text.blocks[..blocks_for(text.prompt)])?;
        }
        while texts.iter().any(|text| !text.is_over()) {
            match way {
                Way::Alone | Way::Draft => {}
                Way::Refresh => Text::refresh(full, decode, &mut texts)?,
                Way::Exact { drafts } => {
                    for _ in 0..drafts {
                        Text::step(decode, texts.iter_mut().filter(|text| text.drafts_on()))?;
                    }
                    Text::verdict(full, decode, &mut texts, &mut drafting)?;
                    continue;
                }
            }
            Text::step(decode, texts.iter_mut().filter(|text| !text.is_over()))?;
        }
        Ok((texts.into_iter().map(Text::into_output).collect(), drafting))
    }
}

/// A text that is being written.
struct Text<'a> {
    blocks: &'a [BlockId],
    /// Number of tokens of the prompt.
    prompt: usize,
    /// Prompt and output. In mode exact, the last ones may be drafts.
    tokens: Vec<u32>,
    /// Number of tokens that the full model has decided on, in mode exact.
    standing: usize,
    /// Number of leading tokens whose KV is there, in the model that writes.
    computed: usize,
    /// Number of leading tokens that the full model was given for mode refresh.
    given: usize,
    /// Number of leading blocks with KV of the full model.
    landed: usize,
    /// Maximum number of output tokens.
    most: usize,
    stop: &'a [u32],
}

impl<'a> Text<'a> {
    /// Whether the first `end` tokens are all of the text.
    fn ends_at(&self, end: usize) -> bool {
        end >= self.prompt + self.most || self.stop.contains(&self.tokens[end - 1])
    }

    fn is_over(&self) -> bool {
        self.ends_at(self.tokens.len())
    }

    /// Whether another token is drafted. A verdict adds one more.
    fn drafts_on(&self) -> bool {
        !self.is_over() && self.tokens.len() + 1 < self.prompt + self.most
    }

    fn into_output(mut self) -> Vec<u32> {
        self.tokens.truncate(self.prompt + self.most);
        self.tokens.split_off(self.prompt)
    }

    /// Computes the next token of each text. Returns false if there is no text.
    fn step<'t>(runner: &mut Runner, texts: impl Iterator<Item = &'t mut Self>) -> Result<bool>
    where
        'a: 't,
    {
        let mut texts: Vec<&mut Self> = texts.collect();
        let spans: Vec<Span<'_>> = texts
            .iter()
            .map(|text| {
                let (start, want) = (text.computed, Wanted::Choose(1));
                Span { blocks: text.blocks, start, tokens: &text.tokens[start..], want }
            })
            .collect();
        let chosen = runner.run(&spans)?;
        for (text, chosen) in texts.iter_mut().zip(&chosen) {
            text.computed = text.tokens.len();
            text.tokens.extend(chosen.iter().map(|chosen| chosen.token));
        }
        Ok(!texts.is_empty())
    }

    /// Takes over the full model's KV of a block where the next step attends to it, in mode refresh.
    fn refresh(full: &mut Runner, decode: &mut Runner, texts: &mut [Self]) -> Result<()> {
        let is_due = |text: &&mut Self| !text.is_over() && (text.tokens.len() - 1) / BLOCK_TOKENS >= text.landed + 2;
        let due: Vec<&mut Self> = texts.iter_mut().filter(is_due).collect();
        let spans: Vec<Span<'_>> = due
            .iter()
            .map(|text| {
                let tokens = &text.tokens[text.given..(text.landed + 1) * BLOCK_TOKENS];
                Span { blocks: text.blocks, start: text.given, tokens, want: Wanted::Nothing }
            })
            .collect();
        full.run(&spans)?;
        for text in due {
            hand_over(full.model(), decode.model(), &text.blocks[text.landed..text.landed + 1])?;
            text.landed += 1;
            text.given = text.landed * BLOCK_TOKENS;
        }
        Ok(())
    }

    /// The full model decides on the drafts of each text, in mode exact. What it has not chosen is rolled back.
    fn verdict(full: &mut Runner, decode: &mut Runner, texts: &mut [Self], drafting: &mut Drafting) -> Result<()> {
        let judged: Vec<&mut Self> = texts.iter_mut().filter(|text| !text.ends_at(text.standing)).collect();
        let spans: Vec<Span<'_>> = judged
            .iter()
            .map(|text| {
                let start = text.standing - 1;
                let tokens = &text.tokens[start..];
                Span { blocks: text.blocks, start, tokens, want: Wanted::Choose(tokens.len()) }
            })
            .collect();
        let chosen = full.run(&spans)?;
        for (text, chosen) in judged.into_iter().zip(&chosen) {
            let (before, drafts) = (text.standing, &text.tokens[text.standing..]);
            let accepted = drafts.iter().zip(chosen).take_while(|(draft, chosen)| **draft == chosen.token).count();
            drafting.drafted_tokens += drafts.len();
            drafting.accepted_tokens += accepted;
            let known = before + accepted;
            text.tokens.truncate(known);
            text.tokens.extend(chosen.get(accepted).map(|chosen| chosen.token));
            if let Some(at) = text.tokens[before..].iter().position(|token| text.stop.contains(token)) {
                text.tokens.truncate(before + at + 1);
            }
            text.standing = text.tokens.len();
            drafting.verdict_tokens += text.standing - before;
            drafting.verdicts += 1;
            // Whole blocks get the full model's KV, so that later drafts are better.
            text.computed = text.computed.min(known);
            let whole = known / BLOCK_TOKENS;
            if whole > text.landed {
                hand_over(full.model(), decode.model(), &text.blocks[text.landed..whole])?;
                text.landed = whole;
                text.computed = text.computed.max(whole * BLOCK_TOKENS);
            }
        }
        Ok(())
    }
}
