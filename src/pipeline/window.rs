//! One window of a job: rows that are prepared and planned together. Turns them into what the engine is to run, in
//! order, and what is known of each row for its answer. Pure but for the table of seen ids.
//! Invariant: a row's `cached_tokens`, seed and error are functions of the window's rows alone, whatever part of them
//! an earlier run has done already.

use super::answer::RowMeta;
use super::index::JobIndex;
use crate::engine::Submission;
use crate::engine::sampling::SeqParams;
use crate::outcome::{ErrorCode, RowError};
use crate::plan::{Plan, PlanRow, plan};
use crate::prepare::{Origin, Prepared, Prompt};
use crate::window::Class;
use anyhow::Result;
use std::collections::HashMap;
use std::sync::Arc;

/// Output length that an unfinished row is expected to have at most, for the order only.
const EXPECTED_TOKENS: u32 = 256;

/// A prepared row and where it stands.
pub(super) struct WindowRow {
    pub(super) row_idx: u64,
    pub(super) file: Arc<str>,
    pub(super) line: u64,
    pub(super) prepared: Prepared,
    /// What identical rows are found by; `None` if this row is computed in any case.
    pub(super) key: Option<u128>,
    /// The lowest row of the job with that key; itself if there is none.
    pub(super) first: u64,
}

/// What a window comes to.
#[derive(Default)]
pub(super) struct PlannedWindow {
    /// Rows without a prompt.
    pub(super) failed: Vec<(RowMeta, RowError)>,
    /// Rows to be run, each with the rows that get the same completion; the first row's index is the id.
    pub(super) groups: Vec<Vec<RowMeta>>,
    /// What the engine is to run, in plan order, one per group.
    pub(super) submissions: Vec<Submission>,
    /// Rows that get the completion of a row of an earlier window, or of one that an earlier run has done; with that row.
    pub(super) followers: Vec<(u64, RowMeta)>,
    /// Rows that get another row's completion.
    pub(super) n_duplicates: u64,
    /// The fewest tokens that any engine must prefill for them.
    pub(super) trie_tokens: u64,
}

/// Settings of the job that a window needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct WindowSettings {
    /// What derived seeds are derived from.
    pub(super) job_seed: u64,
    /// Whether identical rows are computed once.
    pub(super) dedup: bool,
}

impl WindowRow {
    /// A row as it was prepared.
    pub(super) fn new(row_idx: u64, file: Arc<str>, line: u64, prepared: Prepared, settings: WindowSettings) -> Self {
        let prompt = prepared.prompt.as_ref().ok().filter(|prompt| settings.dedup && prompt.params.is_deterministic());
        let key = prompt.map(|prompt| content_key(prompt, &prepared.origin));
        Self { row_idx, file, line, prepared, key, first: row_idx }
    }
}

/// A row that has a prompt.
struct Ready {
    meta: RowMeta,
    prompt: Prompt,
    first: u64,
    done: bool,
}

/// Fails the rows that use a `custom_id` again. Must see the windows in order, but for those that the index knows.
pub(super) fn refuse_second_uses(rows: &mut [WindowRow], index: &JobIndex) -> Result<()> {
    let id = |row: &WindowRow| match &row.prepared.origin {
        Origin::Request { custom_id: Some(id), .. } => Some(id.clone()),
        _ => None,
    };
    let ids: Vec<(usize, String)> = rows.iter().enumerate().filter_map(|(i, row)| Some((i, id(row)?))).collect();
    let first = index.first_of_ids(ids.iter().map(|(i, id)| (rows[*i].row_idx, id.as_str())))?;
    for ((i, id), first) in ids.iter().zip(first) {
        if first < rows[*i].row_idx {
            let message = format!("{id:?} was used by an earlier row (row {first}, counted from 0)");
            rows[*i].prepared.prompt = Err(RowError::field(ErrorCode::DuplicateCustomId, "custom_id", message));
        }
    }
    Ok(())
}

/// Finds each row's first of the same content. Must see the windows in order, but for those that the index knows.
pub(super) fn find_first(rows: &mut [WindowRow], index: &JobIndex) -> Result<()> {
    let mut keyed: Vec<&mut WindowRow> = rows.iter_mut().filter(|row| row.key.is_some() && row.prepared.prompt.is_ok()).collect();
    let uses: Vec<(u64, u128)> = keyed.iter().filter_map(|row| Some((row.row_idx, row.key?))).collect();
    for (row, first) in keyed.iter_mut().zip(index.first_of_contents(&uses)?) {
        row.first = first;
    }
    Ok(())
}

/// Plans a window; `is_done` rows take part in the plan but are not run.
pub(super) fn plan_window(rows: Vec<WindowRow>, settings: WindowSettings, is_done: impl Fn(u64) -> bool) -> PlannedWindow {
    let mut window = PlannedWindow::default();
    let mut ready = Vec::new();
    let start = rows.first().map_or(0, |row| row.row_idx);
    for row in rows {
        let done = is_done(row.row_idx);
        let mut meta = RowMeta {
            row_idx: row.row_idx,
            file: row.file,
            line: row.line,
            origin: row.prepared.origin,
            prompt_tokens: 0,
            cached_tokens: 0,
            seed: None,
            logprobs: false,
            key: row.key,
        };
        match row.prepared.prompt {
            Err(_) if done => {}
            Err(error) => window.failed.push((RowMeta { key: None, ..meta }, error)),
            Ok(prompt) => {
                meta.prompt_tokens = prompt.tokens.len() as u32;
                meta.seed = (prompt.params.temperature > 0.0)
                    .then(|| prompt.params.seed.unwrap_or_else(|| derived_seed(settings.job_seed, row.row_idx)));
                meta.logprobs = prompt.params.logprobs.is_some();
                if row.first >= start {
                    ready.push(Ready { meta, prompt, first: row.first, done });
                } else if !done {
                    window.follow(row.first, meta);
                }
            }
        }
    }
    let all = Arrangement::of(&ready);
    all.set_cached_tokens(&mut ready);
    // The last row of a window keeps what the next window is likely to begin with.
    let keep_at_end = all.plan.common_tokens;
    if ready.iter().any(|row| row.done) {
        ready.retain(|row| !row.done);
        // Rows whose first is done already need not be run either.
        let (followers, ready): (Vec<_>, Vec<_>) = ready.into_iter().partition(|row| is_done(row.first));
        for row in followers {
            window.follow(row.first, row.meta);
        }
        let left = Arrangement::of(&ready);
        left.submit(ready, keep_at_end, &mut window);
    } else {
        all.submit(ready, keep_at_end, &mut window);
    }
    window
}

impl PlannedWindow {
    /// The row gets the completion of row `first`.
    fn follow(&mut self, first: u64, mut meta: RowMeta) {
        meta.cached_tokens = meta.prompt_tokens;
        meta.key = None;
        self.n_duplicates += 1;
        self.followers.push((first, meta));
    }
}

/// Rows grouped and ordered.
struct Arrangement {
    /// Indices of rows that get the same completion; the first of a group is computed.
    groups: Vec<Vec<usize>>,
    /// The order of the groups.
    plan: Plan,
}

impl Arrangement {
    fn of(ready: &[Ready]) -> Self {
        let groups = group_identical(ready);
        let leaders: Vec<_> = groups.iter().map(|group| plan_row(&ready[group[0]])).collect();
        let plan = plan(&leaders);
        Self { groups, plan }
    }

    /// Sets every row's `cached_tokens` to what the plan shares.
    fn set_cached_tokens(&self, ready: &mut [Ready]) {
        for (&place, &shared) in self.plan.order.iter().zip(&self.plan.shared_tokens) {
            let leader = &mut ready[self.groups[place as usize][0]].meta;
            // The last prompt token is always computed: its logits are the first token's.
            leader.cached_tokens = shared.min(leader.prompt_tokens - 1);
        }
        for &i in self.groups.iter().flat_map(|group| &group[1..]) {
            ready[i].meta.cached_tokens = ready[i].meta.prompt_tokens;
        }
    }

    /// Makes the engine's work of the rows.
    fn submit(self, ready: Vec<Ready>, keep_at_end: u32, window: &mut PlannedWindow) {
        window.trie_tokens = self.plan.trie_tokens;
        for (place, &group) in self.plan.order.iter().enumerate() {
            let row = &ready[self.groups[group as usize][0]];
            let keep_tokens = self.plan.shared_tokens.get(place + 1).copied().unwrap_or(keep_at_end);
            window.submissions.push(submission(row, keep_tokens));
        }
        let mut metas: Vec<Option<RowMeta>> = ready.into_iter().map(|row| Some(row.meta)).collect();
        for group in self.groups {
            window.n_duplicates += group.len() as u64 - 1;
            let mut group: Vec<RowMeta> = group.into_iter().filter_map(|i| metas[i].take()).collect();
            group[1..].iter_mut().for_each(|meta| meta.key = None);
            window.groups.push(group);
        }
    }
}

fn submission(row: &Ready, keep_tokens: u32) -> Submission {
    let params = &row.prompt.params;
    Submission {
        id: row.meta.row_idx,
        prompt: Arc::clone(&row.prompt.tokens),
        params: SeqParams {
            max_tokens: row.prompt.max_tokens,
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            seed: row.meta.seed.unwrap_or(0),
            choice: 0,
            stop: params.stop.clone(),
            ignore_eos: params.ignore_eos,
            logprobs: params.logprobs,
        },
        class: Class::Batch,
        keep_tokens,
        stream: 0,
    }
}

fn plan_row(row: &Ready) -> PlanRow<'_> {
    let output = if row.prompt.params.ignore_eos { row.prompt.max_tokens } else { row.prompt.max_tokens.min(EXPECTED_TOKENS) };
    PlanRow { tokens: &row.prompt.tokens, predicted_tokens: row.meta.prompt_tokens + output }
}

/// Indices of rows that get the same completion, in input order.
fn group_identical(ready: &[Ready]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut group_of: HashMap<u64, usize> = HashMap::new();
    for (i, row) in ready.iter().enumerate() {
        let group = *group_of.entry(row.first).or_insert(groups.len());
        if group == groups.len() {
            groups.push(Vec::new());
        }
        groups[group].push(i);
    }
    groups
}

/// Hash of all that a completion and its form depend on, besides the model: 128 bits of BLAKE3, collisions are out of
/// reach.
fn content_key(prompt: &Prompt, origin: &Origin) -> u128 {
    let mut hasher = blake3::Hasher::new();
    if let Origin::Request { endpoint, .. } = origin {
        hasher.update(format!("{endpoint:?}").as_bytes());
    }
    for id in prompt.tokens.iter() {
        hasher.update(&id.to_le_bytes());
    }
    hasher.update(format!("{:?}/{}", prompt.params, prompt.max_tokens).as_bytes());
    let hash = hasher.finalize();
    let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u128::from_le_bytes(*key)
}

/// The seed of a row that names none (exactness.md, R7).
fn derived_seed(job_seed: u64, row_idx: u64) -> u64 {
    let hash = blake3::hash(format!("valar row seed {job_seed} {row_idx}").as_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    // 53 bits survive JSON readers that keep numbers as doubles.
    u64::from_le_bytes(*head) >> 11
}
