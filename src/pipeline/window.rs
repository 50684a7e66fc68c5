//! One window of a job: rows that are prepared and planned together. Turns them into what the engine is to run, in
//! order, and what is known of each row for its answer. Pure but for the job's index.
//! Invariant: a row's `cached_tokens`, seed and error are functions of the window's rows alone, whatever part of them
//! an earlier run has done already.

use super::answer::RowMeta;
use super::index::{JobIndex, NOBODY, id_key};
use crate::engine::Submission;
use crate::outcome::{ErrorCode, RowError};
use crate::plan::{Plan, PlanRow, plan};
use crate::prepare::sequences::{PromptMeta, draw_number, n_computed, submission};
use crate::prepare::{Origin, Prepared, Prompt};
use crate::request::{AnswerFormat, Params};
use anyhow::Result;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;

/// Output length that an unfinished row is expected to have at most, for the order only.
const EXPECTED_TOKENS: u32 = 256;

/// A prepared row and where it stands.
pub(super) struct WindowRow {
    pub(super) row_idx: u64,
    pub(super) file: Arc<str>,
    pub(super) line: u64,
    pub(super) prepared: Prepared,
    /// What its `custom_id` is known by.
    pub(super) id_key: Option<u128>,
    /// What identical rows are found by; `None` if this row is computed in any case.
    pub(super) key: Option<u128>,
    /// The lowest row of the job with that key; itself if there is none.
    pub(super) first: u64,
    /// The lowest of the rows that this run is to complete.
    pub(super) own_first: u64,
}

/// What a window comes to.
#[derive(Default)]
pub(super) struct PlannedWindow {
    /// Rows without a prompt.
    pub(super) failed: Vec<(RowMeta, RowError)>,
    /// Rows to be run, each with the rows that get the same completion; in input order.
    pub(super) groups: Vec<Group>,
    /// What the engine is to run, in plan order, named by numbers without gaps.
    pub(super) submissions: Vec<Submission>,
    /// The first of these names.
    pub(super) first_id: u64,
    /// What each of them completes: its group, and which of the row's prompts. Of one prompt, in the order of choices.
    pub(super) sequences: Vec<(u32, u32)>,
    /// Rows that get the completion of a row of an earlier window, or of one that an earlier run has done; with that row.
    pub(super) followers: Vec<(u64, RowMeta)>,
    /// Where in the inputs it ends, as the journal is told.
    pub(super) end: String,
    /// Rows that get another row's completion.
    pub(super) n_duplicates: u64,
    /// The fewest tokens that any engine must prefill for them, given what the window before leaves.
    pub(super) trie_tokens: u64,
}

/// Rows that get the same completion.
pub(super) struct Group {
    /// Its prompts are run.
    pub(super) leader: RowMeta,
    /// The others.
    pub(super) same: Vec<RowMeta>,
    /// How many sequences complete its prompts.
    pub(super) n_sequences: u32,
    /// Its prompts, where they may have to be run again; else none.
    pub(super) prompts: Vec<Prompt>,
}

/// Settings of the job that a window needs.
#[derive(Debug, Clone)]
pub(super) struct WindowSettings {
    /// What derived seeds are derived from.
    pub(super) job_seed: u64,
    /// Whether identical rows are computed once.
    pub(super) dedup: bool,
    /// Whether some prompts are made of others' answers.
    pub(super) has_steps: bool,
    /// Whether completions are checked: then prompts may be run again, and other columns may give another outcome.
    pub(super) has_policy: bool,
    /// The rows of a shard; `None` if the job is run as a whole.
    pub(super) shard_rows: Option<Range<u64>>,
}

impl WindowSettings {
    /// Whether this run is to complete a row.
    pub(super) fn is_own(&self, row_idx: u64) -> bool {
        self.shard_rows.as_ref().is_none_or(|rows| rows.contains(&row_idx))
    }
}

impl WindowRow {
    /// A row as it was prepared.
    pub(super) fn new(row_idx: u64, file: Arc<str>, line: u64, prepared: Prepared, settings: &WindowSettings) -> Self {
        let prompts = prepared.prompts.as_ref().ok();
        let prompts = prompts.filter(|prompts| settings.dedup && prompts.iter().all(|p| p.params.is_deterministic()));
        let key = prompts.map(|prompts| content_key(prompts, &prepared.origin, settings.has_steps || settings.has_policy));
        let id_key = match &prepared.origin {
            Origin::Request { custom_id: Some(id), .. } => Some(id_key(id)),
            _ => None,
        };
        Self { row_idx, file, line, prepared, id_key, key, first: row_idx, own_first: row_idx }
    }
}

/// A row that has prompts.
struct Ready {
    meta: RowMeta,
    prompts: Vec<Prompt>,
    first: u64,
    own_first: u64,
    done: bool,
}

/// Fails the rows that use a `custom_id` again. Must see the windows in order, but for those that the index knows.
pub(super) fn refuse_second_uses(rows: &mut [WindowRow], index: &JobIndex) -> Result<()> {
    let uses: Vec<(u64, u128)> = rows.iter().filter_map(|row| Some((row.row_idx, row.id_key?))).collect();
    if uses.is_empty() {
        return Ok(());
    }
    let (first, keeper) = (index.first_of_ids(&uses)?, index.keepers_of_ids(&uses)?);
    for (row, (first, keeper)) in rows.iter_mut().filter(|row| row.id_key.is_some()).zip(first.into_iter().zip(keeper)) {
        let Origin::Request { custom_id: Some(id), .. } = &row.prepared.origin else { continue };
        let message = if keeper != NOBODY && keeper > row.row_idx {
            // This row's id could not be read before.
            format!("{id:?} is the id of a later row that has completed (row {keeper}, counted from 0)")
        } else if first < row.row_idx && keeper != row.row_idx {
            format!("{id:?} was used by an earlier row (row {first}, counted from 0)")
        } else {
            continue;
        };
        row.prepared.prompts = Err(RowError::field(ErrorCode::DuplicateCustomId, "custom_id", message));
    }
    Ok(())
}

/// Finds each row's first of the same content. Must see the windows in order, but for those that the index knows.
pub(super) fn find_first(rows: &mut [WindowRow], settings: &WindowSettings, index: &JobIndex) -> Result<()> {
    let may_share = |row: &WindowRow| row.key.is_some() && row.prepared.prompts.is_ok() && index.may_share(row.row_idx);
    let mut keyed: Vec<&mut WindowRow> = rows.iter_mut().filter(|row| may_share(row)).collect();
    let uses: Vec<(u64, u128)> = keyed.iter().filter_map(|row| Some((row.row_idx, row.key?))).collect();
    if uses.is_empty() {
        return Ok(());
    }
    for (row, first) in keyed.iter_mut().zip(index.first_of_contents(&uses)?) {
        (row.first, row.own_first) = (first, first);
    }
    if settings.shard_rows.is_some() {
        keyed.retain(|row| settings.is_own(row.row_idx));
        let uses: Vec<(u64, u128)> = keyed.iter().filter_map(|row| Some((row.row_idx, row.key?))).collect();
        for (row, first) in keyed.iter_mut().zip(index.first_of_own_contents(&uses)?) {
            row.own_first = first;
        }
    }
    Ok(())
}

/// Plans a window; `is_done` rows, and those of other shards, take part in the plan but are not run. Sequences are named
/// from `next_id` on.
pub(super) fn plan_window(
    rows: Vec<WindowRow>,
    settings: &WindowSettings,
    next_id: &mut u64,
    is_done: impl Fn(u64) -> bool,
) -> PlannedWindow {
    let mut window = PlannedWindow::default();
    let mut ready = Vec::with_capacity(rows.len());
    // Rows whose first is another shard's, in an earlier window: they are no part of this one's plan, but must be run.
    let mut late = Vec::new();
    let start = rows.first().map_or(0, |row| row.row_idx);
    for row in rows {
        let done = is_done(row.row_idx) || !settings.is_own(row.row_idx);
        let WindowRow { row_idx, file, line, prepared, key, id_key: id, first, own_first } = row;
        let mut meta = RowMeta { row_idx, file, line, origin: prepared.origin, prompts: Vec::new(), key, id };
        match prepared.prompts {
            Err(_) if done => {}
            Err(error) => window.failed.push((RowMeta { key: None, ..meta }, error)),
            Ok(prompts) => {
                meta.prompts =
                    prompts.iter().map(|prompt| PromptMeta::new(prompt, || derived_seed(settings.job_seed, row_idx))).collect();
                if first >= start {
                    ready.push(Ready { meta, prompts, first, own_first, done });
                } else if !done && own_first < start {
                    window.follow(own_first, meta);
                } else if !done {
                    meta.share_all();
                    late.push(Ready { meta, prompts, first, own_first, done });
                }
            }
        }
    }
    let all = Arrangement::of(&ready);
    all.set_cached_tokens(&mut ready);
    // The last row of a window keeps what the next window is likely to begin with.
    let keep_at_end = all.plan.common_tokens;
    if !late.is_empty() || ready.iter().any(|row| row.done) {
        ready.retain(|row| !row.done);
        ready.append(&mut late);
        ready.sort_unstable_by_key(|row| row.meta.row_idx);
        for row in &mut ready {
            row.first = row.own_first;
        }
        // Rows whose first is done already need not be run either.
        let (followers, ready): (Vec<_>, Vec<_>) = ready.into_iter().partition(|row| is_done(row.first));
        for row in followers {
            window.follow(row.first, row.meta);
        }
        let left = Arrangement::of(&ready);
        left.submit(ready, (keep_at_end, settings.has_policy), next_id, &mut window);
    } else {
        all.submit(ready, (keep_at_end, settings.has_policy), next_id, &mut window);
    }
    window
}

impl PlannedWindow {
    /// The row gets the completion of row `first`.
    fn follow(&mut self, first: u64, mut meta: RowMeta) {
        meta.share_all();
        meta.key = None;
        self.n_duplicates += 1;
        self.followers.push((first, meta));
    }
}

/// Rows grouped and ordered.
struct Arrangement {
    /// By group, the row that is computed: the first of those that get the same completion.
    leaders: Vec<u32>,
    /// By row, its group.
    group_of: Vec<u32>,
    /// The (group, prompt) of each of the plan's rows.
    prompts: Vec<(u32, u32)>,
    /// The order of the prompts.
    plan: Plan,
}

impl Arrangement {
    fn of(ready: &[Ready]) -> Self {
        let (leaders, group_of) = group_identical(ready);
        let mut prompts = Vec::with_capacity(leaders.len());
        for (group, &leader) in (0..).zip(&leaders) {
            prompts.extend((0..).take(ready[leader as usize].prompts.len()).map(|prompt| (group, prompt)));
        }
        let prompt = |&(group, prompt): &(u32, u32)| &ready[leaders[group as usize] as usize].prompts[prompt as usize];
        let rows: Vec<_> = prompts.iter().map(|at| plan_row(prompt(at))).collect();
        let plan = plan(&rows);
        Self { leaders, group_of, prompts, plan }
    }

    /// Sets every row's `cached_tokens` to what the plan shares.
    fn set_cached_tokens(&self, ready: &mut [Ready]) {
        for (&place, &shared) in self.plan.order.iter().zip(&self.plan.shared_tokens) {
            let (group, prompt) = self.prompts[place as usize];
            let leader = &mut ready[self.leaders[group as usize] as usize];
            // The last prompt token is always computed: its logits are the first token's. So are scored ones.
            let Prompt { tokens, score_from, .. } = &leader.prompts[prompt as usize];
            let most = score_from.unwrap_or(u32::MAX).min(tokens.len() as u32) - 1;
            leader.meta.prompts[prompt as usize].cached_tokens = shared.min(most);
        }
        for ((i, row), &group) in (0..).zip(ready).zip(&self.group_of) {
            if self.leaders[group as usize] != i {
                row.meta.share_all();
            }
        }
    }

    /// Makes the engine's work of the rows.
    fn submit(self, ready: Vec<Ready>, (keep_at_end, keeps_prompts): (u32, bool), next_id: &mut u64, window: &mut PlannedWindow) {
        window.trie_tokens = self.plan.trie_tokens;
        window.first_id = *next_id;
        window.submissions.reserve(self.prompts.len());
        window.sequences.reserve(self.prompts.len());
        let mut n_sequences = vec![0; self.leaders.len()];
        for (place, &planned) in self.plan.order.iter().enumerate() {
            let (group, prompt_idx) = self.prompts[planned as usize];
            let row = &ready[self.leaders[group as usize] as usize];
            let prompt = &row.prompts[prompt_idx as usize];
            let keep_tokens = self.plan.shared_tokens.get(place + 1).copied().unwrap_or(keep_at_end);
            let n_choices = n_computed(prompt);
            for choice in 0..n_choices {
                // All choices but the last are followed by one with the same prompt.
                let keep_tokens = if choice + 1 < n_choices { prompt.tokens.len() as u32 } else { keep_tokens };
                let seed = row.meta.prompts[prompt_idx as usize].seed;
                let draw = (seed, draw_number(prompt, prompt_idx as usize, choice));
                window.submissions.push(submission(*next_id, prompt, draw, keep_tokens));
                window.sequences.push((group, prompt_idx));
                *next_id += 1;
            }
            n_sequences[group as usize] += n_choices as u32;
        }
        window.n_duplicates += (ready.len() - self.leaders.len()) as u64;
        window.groups.reserve(self.leaders.len());
        // A group's first row is the first of its rows that comes by.
        for (row, group) in ready.into_iter().zip(self.group_of) {
            if let Some(known) = window.groups.get_mut(group as usize) {
                known.same.push(RowMeta { key: None, ..row.meta });
            } else {
                let n_sequences = n_sequences[group as usize];
                let prompts = if keeps_prompts { row.prompts } else { Vec::new() };
                window.groups.push(Group { leader: row.meta, same: Vec::new(), n_sequences, prompts });
            }
        }
    }
}

fn plan_row(prompt: &Prompt) -> PlanRow<'_> {
    let output = if prompt.params.ignore_eos { prompt.max_tokens } else { prompt.max_tokens.min(EXPECTED_TOKENS) };
    PlanRow { tokens: &prompt.tokens, predicted_tokens: prompt.tokens.len() as u32 + output }
}

/// Groups rows that get the same completion: the first row of each group, and the group of each row.
fn group_identical(ready: &[Ready]) -> (Vec<u32>, Vec<u32>) {
    let (mut leaders, mut group_of) = (Vec::with_capacity(ready.len()), Vec::with_capacity(ready.len()));
    // Most rows are their own first, and nobody has come to need their group before.
    let mut known: HashMap<u64, u32> = HashMap::new();
    let shared: HashSet<u64> = ready.iter().filter(|row| row.first != row.meta.row_idx).map(|row| row.first).collect();
    for (i, row) in (0..).zip(ready) {
        let new = leaders.len() as u32;
        let is_shared = !shared.is_empty() && shared.contains(&row.first);
        let group = if is_shared { *known.entry(row.first).or_insert(new) } else { new };
        if group == new {
            leaders.push(i);
        }
        group_of.push(group);
    }
    (leaders, group_of)
}

/// Hash of all that a row's completions and their form depend on, besides the model: 128 bits of BLAKE3, collisions are
/// out of reach. It stands in journals: another way to make it is another `FORMAT_VERSION`. Where later prompts are made of the row's columns, of all of them.
fn content_key(prompts: &[Prompt], origin: &Origin, has_steps: bool) -> u128 {
    thread_local! {
        // What is hashed is as long as the prompts; rows come one after the other.
        static CONTENT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    CONTENT.with_borrow_mut(|content| {
        content.clear();
        add_content(content, prompts, origin, has_steps);
        short_hash(content)
    })
}

/// Adds all that a row's completions and their form depend on, besides the model.
fn add_content(content: &mut Vec<u8>, prompts: &[Prompt], origin: &Origin, has_steps: bool) {
    let mut add = |text: std::fmt::Arguments<'_>| content.write_fmt(text).expect("memory takes text");
    match origin {
        Origin::Request { endpoint, echo: None, .. } => content.push(*endpoint as u8),
        Origin::Request { endpoint, echo, .. } => add(format_args!("{endpoint:?}{echo:?}")),
        Origin::Dataset { columns } if has_steps => add(format_args!("{columns:?}")),
        Origin::Dataset { .. } => {}
    }
    for prompt in prompts {
        let Prompt { step, tokens, params, max_tokens, score_from, call_format, one_call, thinking, grammar: _ } = prompt;
        for number in [*step as u64, tokens.len() as u64, u64::from(*max_tokens), u64::from(score_from.unwrap_or(0))] {
            content.extend_from_slice(&number.to_le_bytes());
        }
        add_params(content, params);
        let calls = call_format.is_some() || *one_call;
        content.push(u8::from(calls));
        if let Some(thinking) = thinking {
            write!(content, "{thinking:?}").expect("memory takes text");
        }
        if calls {
            write!(content, "{call_format:?}/{one_call}").expect("memory takes text");
        }
        // Most vocabularies fit in two bytes, and hashing is most of what this costs.
        let is_short = tokens.iter().all(|&id| u16::try_from(id).is_ok());
        content.push(u8::from(is_short));
        if is_short {
            content.extend(tokens.iter().flat_map(|&id| (id as u16).to_le_bytes()));
        } else {
            content.extend(tokens.iter().flat_map(|id| id.to_le_bytes()));
        }
    }
}

/// 128 bits of BLAKE3.
fn short_hash(content: &[u8]) -> u128 {
    let hash = blake3::hash(content);
    let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u128::from_le_bytes(*key)
}

/// Adds parameters to what is hashed; other ones give other bytes.
fn add_params(content: &mut Vec<u8>, params: &Params) {
    // All fields by name: whoever adds one must say here what becomes of it.
    let Params {
        max_tokens,
        min_tokens,
        n,
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed,
        stop,
        stop_tokens,
        ignore_eos,
        repetition,
        logprobs,
        echo,
        format,
    } = params;
    let floats = [temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty].map(|x| x.to_bits());
    let flags = [max_tokens.is_some(), seed.is_some(), logprobs.is_some(), *ignore_eos, *echo].map(u32::from);
    let numbers = [max_tokens.unwrap_or(0), *min_tokens, *n, *top_k, u32::from(logprobs.unwrap_or(0))];
    for number in floats.into_iter().chain(flags).chain(numbers) {
        content.extend_from_slice(&number.to_le_bytes());
    }
    content.extend_from_slice(&seed.unwrap_or(0).to_le_bytes());
    if let Some(repetition) = repetition {
        write!(content, "{repetition:?}/").expect("memory takes text");
    }
    let is_plain = logit_bias.is_empty() && stop.is_empty() && stop_tokens.is_empty() && *format == AnswerFormat::Text;
    content.push(u8::from(is_plain));
    if !is_plain {
        write!(content, "{logit_bias:?}/{stop:?}/{stop_tokens:?}/{format:?}/").expect("memory takes text");
    }
}

/// The seed of a row that names none (exactness.md, R7).
pub(super) fn derived_seed(job_seed: u64, row_idx: u64) -> u64 {
    let hash = blake3::hash(format!("valar row seed {job_seed} {row_idx}").as_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    // 53 bits survive JSON readers that keep numbers as doubles.
    u64::from_le_bytes(*head) >> 11
}
