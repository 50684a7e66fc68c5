//! A runner without a model, for tests of the engine. Its KV cache holds what a real one's contents depend on, in two
//! "layers": the token and position of each slot, and the hash of the whole prefix as read through the block table. It
//! asserts that every slot a sequence reads is its own prefix, and draws tokens from that hash: a wrong share, a missing
//! copy, a stale or twice-written block fails at once. [`expected`] is what each row must give, computed alone.

use std::sync::Arc;

use valar::device::BLOCK_TOKENS;
use valar::device::batch::{Batch, BatchSeq, BlockCopy, HeadOut, StepOutput, Want};
use valar::engine::sampling::SeqParams;
use valar::engine::{Finished, SeqLogprob, TokenTable};
use valar::model::{Runner, RunnerLimits};
use valar::outcome::FinishReason;
use valar::request::MAX_TOP_LOGPROBS;

/// Bytes of each token: two end tokens, a mark, letters, pieces of letters, bytes that are never text.
const VOCAB: [&[u8]; 24] = [
    b"",
    b"</s>",
    b"<|mark|>",
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aab",
    b" ",
    b"\n",
    b"c",
    b"cab",
    "é".as_bytes(),
    b"\xc3",
    b"\xa9",
    b"\xe6\xbc",
    b"\xa2",
    b"\xf0\x9f",
    b"\x99\x82a",
    b"\xff",
    b"b\xc3",
    "🙂b".as_bytes(),
    b"ca",
    b"bb",
];
/// Ids below this are in `VOCAB`; above, they repeat it without its first three.
pub(crate) const N_VOCAB: usize = 64;

/// The tokenizer that goes with it.
pub(crate) struct FakeTokens;

impl TokenTable for FakeTokens {
    fn token_bytes(&self, id: u32) -> &[u8] {
        let n = VOCAB.len() as u32;
        let idx = if id < n { id } else { 3 + id % (n - 3) };
        VOCAB[idx as usize]
    }

    fn is_end(&self, id: u32) -> bool {
        id < 2
    }

    fn is_special(&self, id: u32) -> bool {
        id < 3
    }

    fn end_ids(&self) -> &[u32] {
        &[0, 1]
    }
}

/// A generator of test cases (splitmix64).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0, 0)
    }

    /// A number in `low..=high`.
    pub(crate) fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.range(0, from.len() - 1)]
    }

    /// True in `percent` of the cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

fn mix(h: u64, x: u64) -> u64 {
    let mut z = h.rotate_left(23) ^ x.wrapping_mul(0xd6e8_feb8_6659_fd93).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the "model" draws after a prefix.
fn draw(prefix: u64, seed: u64, choice: u32, position: u32) -> u32 {
    (mix(mix(mix(prefix, seed), u64::from(choice)), u64::from(position)) % N_VOCAB as u64) as u32
}

/// Its "log-probability" of a token, and the likeliest ones.
fn logprob(prefix: u64, token: u32) -> f32 {
    -((mix(prefix, 1000 + u64::from(token)) % 4096) as f32) / 64.0
}

fn top(prefix: u64) -> [(u32, f32); MAX_TOP_LOGPROBS] {
    std::array::from_fn(|i| (i as u32, logprob(prefix, i as u32)))
}

/// What the row must become: the model's tokens one by one, the text by definition.
pub(crate) fn expected(id: u64, prompt: &[u32], params: &SeqParams, max_context: usize) -> Finished {
    let mut h = prompt.iter().fold(0, |h, &t| mix(h, u64::from(t)));
    let (mut tokens, mut bytes, mut logprobs) = (Vec::new(), Vec::new(), Vec::new());
    let (text, finish_reason) = loop {
        let n = prompt.len() + tokens.len();
        let token = draw(h, params.seed, params.choice, n as u32);
        if let Some(n_top) = params.logprobs {
            logprobs.push(SeqLogprob { token, logprob: logprob(h, token), top: top(h)[..n_top as usize].to_vec() });
        }
        tokens.push(token);
        h = mix(h, u64::from(token));
        if FakeTokens.is_end(token) && !params.ignore_eos {
            break (String::from_utf8_lossy(&bytes).into_owned(), FinishReason::Stop);
        }
        if params.ignore_eos || !FakeTokens.is_special(token) {
            bytes.extend_from_slice(FakeTokens.token_bytes(token));
        }
        if let Some(text) = stopped(&bytes, &params.stop) {
            break (text, FinishReason::Stop);
        }
        if tokens.len() == params.max_tokens as usize || n + 1 == max_context {
            break (String::from_utf8_lossy(&bytes).into_owned(), FinishReason::Length);
        }
    };
    Finished { id, tokens, text, finish_reason, logprobs, broken: None }
}

/// The text before the stop string that is complete first, looking at every prefix of the characters complete so far.
fn stopped(bytes: &[u8], stop: &[String]) -> Option<String> {
    let mut whole = String::from_utf8_lossy(bytes).into_owned();
    if bytes.utf8_chunks().last().is_some_and(|c| std::str::from_utf8(c.invalid()).is_err_and(|e| e.error_len().is_none())) {
        whole.pop(); // a character that may still become complete
    }
    for end in (0..=whole.len()).filter(|&end| whole.is_char_boundary(end)) {
        let complete = stop.iter().filter(|s| !s.is_empty() && whole[..end].ends_with(s.as_str()));
        if let Some(n) = complete.map(String::len).max() {
            return Some(whole[..end - n].to_owned());
        }
    }
    None
}

/// See the module.
pub(crate) struct FakeRunner {
    limits: RunnerLimits,
    /// Most tokens it wants to see in a step.
    budget_tokens: usize,
    /// Per slot: token and position.
    layer0: Vec<(u32, u32)>,
    /// Per slot: hash of the prefix that ends there.
    layer1: Vec<u64>,
    /// Per slot: the last step that stored to it.
    stored_in: Vec<u64>,
    step: u64,
    /// Fails from this step on, if any; see `Fault`.
    fault: Option<(u64, Fault)>,
    /// At which position of sequences that begin with this token it fails, having stored some.
    poison: Option<(u32, u32)>,
}

/// How it fails.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    Error,
    Panic,
    /// In this step alone.
    Once,
}

impl FakeRunner {
    pub(crate) fn new(limits: RunnerLimits, budget_tokens: usize) -> Self {
        let n_slots = limits.n_blocks * BLOCK_TOKENS;
        let layer0 = vec![(u32::MAX, u32::MAX); n_slots];
        let (layer1, stored_in) = (vec![0; n_slots], vec![0; n_slots]);
        Self { limits, budget_tokens, layer0, layer1, stored_in, step: 0, fault: None, poison: None }
    }

    pub(crate) fn failing(limits: RunnerLimits, step: u64, fault: Fault) -> Self {
        Self { fault: Some((step, fault)), ..Self::new(limits, limits.max_step_tokens) }
    }

    pub(crate) fn poisoned(limits: RunnerLimits, budget_tokens: usize, first: u32, position: u32) -> Self {
        Self { poison: Some((first, position)), ..Self::new(limits, budget_tokens) }
    }
}

fn slot(table: &[u32], position: usize) -> usize {
    table[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
}

fn copy<T: Copy>(layer: &mut [T], copies: &[BlockCopy]) {
    for c in copies {
        let (src, dst) = (c.src as usize * BLOCK_TOKENS, c.dst as usize * BLOCK_TOKENS);
        layer.copy_within(src..src + c.n_slots as usize, dst);
    }
}

impl Runner for FakeRunner {
    fn limits(&self) -> RunnerLimits {
        self.limits
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        self.step += 1;
        match self.fault {
            Some((step, Fault::Error)) if step <= self.step => anyhow::bail!("the device is on fire"),
            Some((step, Fault::Panic)) if step <= self.step => panic!("the kernel has a bug"),
            Some((step, Fault::Once)) if step == self.step => panic!("a bit flipped"),
            _ => {}
        }
        batch.check(self.limits.n_blocks, self.limits.n_vocab);
        assert!(
            batch.tokens.len() <= self.budget_tokens,
            "{} tokens over a budget of {}",
            batch.tokens.len(),
            self.budget_tokens
        );
        assert!(batch.seqs.len() <= self.limits.max_step_seqs);
        assert!(!batch.tokens.is_empty());
        for seq in &batch.seqs {
            let table = batch.block_table(seq);
            for t in seq.token_start as usize..(seq.token_start + seq.n_tokens) as usize {
                let at = slot(table, batch.positions[t] as usize);
                assert_ne!(self.stored_in[at], self.step, "slot {at} is stored twice in a step");
                self.stored_in[at] = self.step;
                self.layer0[at] = (batch.tokens[t], batch.positions[t]);
            }
        }
        copy(&mut self.layer0, &batch.copies);
        if let Some((first, position)) = self.poison {
            let computes = |seq: &BatchSeq| (seq.first_position..seq.first_position + seq.n_tokens).contains(&position);
            let begins = |seq: &BatchSeq| self.layer0[slot(batch.block_table(seq), 0)].0 == first;
            assert!(!batch.seqs.iter().any(|seq| computes(seq) && begins(seq)), "poison at position {position}");
        }
        let prefixes: Vec<Vec<u64>> =
            batch.seqs.iter().map(|seq| self.read(batch.block_table(seq), seq.first_position + seq.n_tokens)).collect();
        for (seq, prefixes) in batch.seqs.iter().zip(&prefixes) {
            for (position, &prefix) in prefixes.iter().enumerate().skip(seq.first_position as usize) {
                self.layer1[slot(batch.block_table(seq), position)] = prefix;
            }
        }
        copy(&mut self.layer1, &batch.copies);
        for (seq, prefixes) in batch.seqs.iter().zip(&prefixes) {
            for (position, &prefix) in prefixes.iter().enumerate() {
                let held = self.layer1[slot(batch.block_table(seq), position)];
                assert_eq!(held, prefix, "the slot of position {position} holds another prefix");
            }
        }
        for head in &batch.heads {
            let idx = batch.seqs.iter().position(|s| (s.token_start..s.token_start + s.n_tokens).contains(&head.token_idx));
            let position = batch.positions[head.token_idx as usize];
            let prefix = prefixes[idx.expect("every token has a sequence")][position as usize];
            let Want::Draw(want) = head.want else { panic!("the engine only draws") };
            assert_eq!(want.position, position + 1);
            let token = draw(prefix, want.seed, want.choice, want.position);
            let logprob = if want.logprob { logprob(prefix, token) } else { f32::NAN };
            out.rows.push(HeadOut { token, logprob, top: top(prefix), n_top: head.n_top });
        }
        Ok(())
    }
}

impl FakeRunner {
    /// "Attention": the prefix hash of every position, by reading all slots through the table.
    fn read(&self, table: &[u32], end: u32) -> Vec<u64> {
        let mut h = 0;
        let hash = |position| {
            let (token, held) = self.layer0[slot(table, position)];
            assert_eq!(held as usize, position, "the slot of position {position} holds position {held}");
            h = mix(h, u64::from(token));
            h
        };
        (0..end as usize).map(hash).collect()
    }
}

/// The table as the engine wants it.
pub(crate) fn fake_tokens() -> Arc<dyn TokenTable> {
    Arc::new(FakeTokens)
}
