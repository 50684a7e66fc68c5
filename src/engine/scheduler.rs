//! Who runs in a step: queues, admission, the order of classes, and preemption. Knows nothing of devices, text or why a
//! sequence ends.
//!
//! A step is filled in this order, until its budget of tokens is used: asap decodes, asap prefills; one row of a class that
//! is owed (`policy`); what is urgent, decodes before prefills; standard decodes, batch decodes, standard prefills, batch
//! prefills. Admission is a prefill's first chunk, in the order of `policy`. What nobody before has used goes down to the
//! next. An asap row finds blocks and places that are kept for it (`reserve`), and takes more from rows of other classes, an urgent one from batch rows that have time (see
//! `preemption`); others only when a forecast was wrong.
//!
//! Invariants: no step passes its budget; a row that has tokens in the step is not preempted in it; one that is
//! preempted comes back in a later step, before any row of its class that is due when it is and never ran; whenever there is
//! work, a step does some.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::blocks::Blocks;
use super::keep::Kept;
use super::policy::Policy;
use super::reserve::Reserve;
use super::sequence::{Phase, Sequence, Submission};
use super::stream::Stream;
use super::{EngineConfig, EngineStats, Scheduled, StepLimits, TokenTable};
use crate::device::BLOCK_TOKENS;
use crate::device::batch::BlockCopy;
use crate::model::RunnerLimits;
use crate::window::Class;
use crate::window::turns::Turns;

/// See the module.
pub(super) struct Scheduler {
    pub(super) config: EngineConfig,
    pub(super) limits: RunnerLimits,
    pub(super) blocks: Blocks,
    /// What ended rows have left.
    pub(super) kept: Kept,
    /// Entries are reused, never removed: sequences hold their index.
    pub(super) streams: Vec<Stream>,
    /// By class, as [`Sequence::order`] has them.
    pub(super) waiting: [VecDeque<Sequence>; 3],
    /// By class: waiting rows that never ran.
    pub(super) n_queued: [usize; 3],
    /// In the order of admission. Between steps all are live, but for those that were cancelled while one was under way.
    pub(super) running: Vec<Sequence>,
    /// Live rows of `running`.
    pub(super) n_running: usize,
    /// Steps so far, this one included.
    pub(super) step: u64,
    /// Who goes first.
    pub(super) policy: Policy,
    /// By class: whose turn it is, among rows of the same rank.
    pub(super) turns: [Turns; 3],
    /// What this step runs, in order.
    pub(super) scheduled: Vec<Scheduled>,
    /// What this step copies, in order.
    pub(super) copies: Vec<BlockCopy>,
    /// Sources of `copies`: not to be reused in this step.
    pub(super) held: Vec<u32>,
    /// What is kept for asap rows.
    pub(super) reserve: Reserve,
    /// How long steps may be.
    pub(super) step_limits: Arc<StepLimits>,
    /// Tokens that this step can still take.
    room_tokens: usize,
    /// Blocks ran out in this step, or a row had to wait for them: nobody below asap is admitted.
    pub(super) is_tight: bool,
    /// This step, or the one before, had no room for a row that decodes.
    is_short: bool,
    was_short: bool,
    pub(super) stats: EngineStats,
}

impl Scheduler {
    /// Reserves everything that a step needs.
    pub(super) fn new(config: EngineConfig, limits: RunnerLimits) -> Self {
        let queue = || VecDeque::with_capacity(config.max_waiting + config.max_running);
        Self {
            blocks: Blocks::new(limits.n_blocks),
            kept: Kept::default(),
            streams: Vec::new(),
            waiting: [queue(), queue(), queue()],
            n_queued: [0; 3],
            running: Vec::with_capacity(2 * config.max_running),
            n_running: 0,
            step: 0,
            policy: Policy::new(config.share_floors.map(|percent| f64::from(percent) / 100.0)),
            turns: Default::default(),
            scheduled: Vec::with_capacity(limits.max_step_seqs),
            copies: Vec::with_capacity(limits.max_step_seqs),
            held: Vec::with_capacity(limits.max_step_seqs),
            reserve: Reserve::new(config.asap_reserve, limits.n_blocks, config.max_running),
            step_limits: Arc::default(),
            room_tokens: 0,
            is_tight: false,
            is_short: false,
            was_short: false,
            stats: EngineStats { blocks_total: limits.n_blocks, ..EngineStats::default() },
            config,
            limits,
        }
    }

    /// Queues a row, unless its class's queue is full.
    #[expect(clippy::result_large_err, reason = "a refused submission comes back whole, to be submitted again")]
    pub(super) fn submit(&mut self, submission: Submission, tokens: &dyn TokenTable) -> Result<(), Submission> {
        let class = submission.class as usize;
        if self.n_queued[class] >= self.config.max_waiting {
            return Err(submission);
        }
        let stream_idx = self.stream_idx(submission.stream);
        self.streams[stream_idx].n_live += 1;
        self.n_queued[class] += 1;
        let most = submission.params.max_tokens;
        let expected = self.streams[stream_idx].lengths.expected(self.config.cold_output_tokens).min(most);
        let n_drawn = if submission.params.ignore_eos { most } else { expected };
        let mut row = Sequence::new(submission, stream_idx, self.limits.max_context);
        // What is there must not lapse while it waits.
        let n_computed = row.prompt.len().saturating_sub(self.kept.touch(&row, self.policy.now_ms()));
        row.predict(self.policy.service_ms(n_computed, n_drawn as usize));
        row.restore(tokens);
        row.turn = self.turns[class].take(row.params.share, 1);
        self.enqueue(row);
        Ok(())
    }

    /// The stream's entry. A new stream takes the place of one without rows once there are as many as rows can be live.
    fn stream_idx(&mut self, id: u32) -> usize {
        if let Some(known) = self.streams.iter().position(|s| s.id == id) {
            return known;
        }
        if self.streams.len() < 3 * (self.config.max_waiting + self.config.max_running) {
            self.streams.push(Stream::new(id, self.limits.max_context));
            return self.streams.len() - 1;
        }
        let idle = self.streams.iter().position(|s| s.n_live == 0).expect("more streams than live rows");
        self.streams[idle].trunk.truncate(0, &mut self.blocks);
        self.streams[idle] = Stream::new(id, self.limits.max_context);
        idle
    }

    /// Fills `scheduled` and `copies` for the next step.
    pub(super) fn schedule(&mut self) {
        self.step += 1;
        self.scheduled.clear();
        self.copies.clear();
        self.room_tokens = self.config.budget_tokens;
        self.is_tight = false;
        self.was_short = std::mem::take(&mut self.is_short);
        self.lapse_kept();
        let limit = self.step_limits.tokens.load(Relaxed);
        self.decode(Class::Asap);
        // Whoever waits for tokens gets them in every step; what else is in it gets the rest, never less than a quarter.
        let n_decoding = self.config.budget_tokens - self.room_tokens;
        self.room_tokens = self.room_tokens.min(limit.saturating_sub(n_decoding).max(limit / 4).max(1));
        let before = self.room_tokens;
        self.prefill(Class::Asap);
        let n_prompt = before - self.room_tokens;
        if n_prompt > 0 {
            // Nobody waits much longer for a first token than alone: others add half of what the step takes without them.
            let own_tokens = n_decoding + n_prompt + self.step_limits.base_tokens.load(Relaxed);
            self.room_tokens = self.room_tokens.min((own_tokens / 2).max(1));
        }
        self.keep_for_asap();
        self.run_owed();
        self.run_urgent();
        self.decode(Class::Standard);
        self.decode(Class::Batch);
        self.prefill(Class::Standard);
        self.prefill(Class::Batch);
        let has_work = self.n_running > 0 || self.waiting.iter().any(|q| !q.is_empty());
        // Those that end with the step under way may keep all others from beginning.
        let any_ends = self.running.iter().any(|row| row.phase == Phase::Live && row.remaining() == 0);
        assert!(!self.scheduled.is_empty() || !has_work || any_ends, "a step without work while {} rows run", self.n_running);
        // No other step's stores come before this one's copies.
        self.held.drain(..).for_each(|block| self.blocks.release(block));
    }

    /// Ends a step: finished rows leave, preempted ones go back to their queue in the order they ran in. `next` is what the step runs
    /// that has begun already.
    pub(super) fn settle(&mut self, next: &mut [Scheduled]) {
        self.renumber(next);
        for idx in (0..self.running.len()).rev() {
            match self.running[idx].phase {
                Phase::Live => {}
                Phase::Preempted => {
                    let mut row = self.running.remove(idx);
                    row.phase = Phase::Live;
                    self.enqueue(row);
                }
                Phase::Finished => {
                    self.release_blocks(idx);
                    self.streams[self.running[idx].stream_idx].n_live -= 1;
                }
            }
        }
        // All at once: many finish in one step, and each would move all that stand behind it.
        self.running.retain(|row| row.phase == Phase::Live);
        self.n_running = self.running.len();
    }

    /// Brings the gauges up to date, and what is kept within its bound.
    pub(super) fn measure(&mut self) {
        self.trim_kept();
        self.stats.blocks_used = self.blocks.n_used();
        self.stats.blocks_kept = self.blocks.n_idle();
        self.stats.running = self.n_running;
        self.stats.waiting = self.waiting.iter().map(VecDeque::len).sum();
    }

    fn has_room(&self) -> bool {
        self.room_tokens > 0 && self.scheduled.len() < self.limits.max_step_seqs
    }

    /// Lets each class that is owed go on, and begin with one row.
    fn run_owed(&mut self) {
        for class in [Class::Standard, Class::Batch] {
            let has_queue = !self.waiting[class as usize].is_empty();
            let has_prompt = |row: &Sequence| row.phase == Phase::Live && row.class == class && row.remaining() > 1;
            if !has_queue && !self.running.iter().any(has_prompt) {
                // What only decodes takes a token a row, and must not stand still while others' prompts fill the steps.
                if self.policy.is_owed(class) {
                    self.run_where(true, |_, row| row.class == class);
                }
                self.policy.excuse(class);
            } else if self.policy.is_owed(class) {
                self.run_where(true, |_, row| row.class == class);
                self.run_where(false, |_, row| row.class == class);
                if has_queue && self.admit_next(class, &mut None) {
                    // What a class got as its floor is not taken from it again, or the floor would be spent on prompts.
                    self.running.last_mut().expect("it was admitted").n_preemptions = self.config.max_preemptions;
                }
            }
        }
    }

    /// Goes on with what is urgent, then admits what is, least slack first.
    fn run_urgent(&mut self) {
        self.run_where(true, |own, row| own.policy.is_urgent(row.rank));
        self.run_where(false, |own, row| own.policy.is_urgent(row.rank));
        let mut growth = None;
        loop {
            let firsts = [Class::Standard, Class::Batch].into_iter().filter_map(|class| {
                let rank = self.waiting[class as usize].front()?.rank;
                self.policy.is_urgent(rank).then_some((rank.order(), class))
            });
            let Some((_, class)) = firsts.min() else { return };
            if !self.admit_next(class, &mut growth) {
                return;
            }
        }
    }

    /// Gives a token each to the rows of the class that need just one, if they have a slot for it.
    fn decode(&mut self, class: Class) {
        self.run_where(true, |_, row| row.class == class);
    }

    /// Goes on with the class's prefills, then admits from its queue.
    fn prefill(&mut self, class: Class) {
        self.run_where(false, |_, row| row.class == class);
        // Reckoned once, then with each admitted row, which are many in a step.
        let mut growth = None;
        while !self.waiting[class as usize].is_empty() && self.admit_next(class, &mut growth) {}
    }

    /// Goes on with rows that decode, or with those that are in their prompts.
    fn run_where(&mut self, decodes: bool, is_meant: impl Fn(&Self, &Sequence) -> bool) {
        let wants = |row: &Sequence| row.phase == Phase::Live && row.remaining() > 0 && (row.remaining() == 1) == decodes;
        let n_rows = self.running.len();
        // Where steps have no room for all that decode, they take turns; prompts are computed one after the other.
        let rows = self.running.iter().enumerate().filter(|(_, row)| decodes && self.was_short && wants(row));
        let first = rows.min_by_key(|(_, row)| row.in_step).map_or(0, |(idx, _)| idx);
        for idx in (first..n_rows).chain(0..first) {
            let row = &self.running[idx];
            if !(wants(row) && is_meant(self, row)) {
                continue;
            }
            if !self.has_room() {
                self.is_short |= decodes;
                return;
            }
            // Prompts have their slots.
            if !decodes || self.ensure_slot(idx) {
                self.take_chunk(idx);
            }
        }
    }

    /// Lets the first row of the class's queue begin; false if that is not to be in this step.
    fn admit_next(&mut self, class: Class, growth: &mut Option<usize>) -> bool {
        if !self.has_room() {
            return false;
        }
        if !self.can_admit(class, growth) {
            self.is_tight = true; // or smaller rows of lower classes would overtake it for ever
            return false;
        }
        self.admit(class);
        let row = &self.running[self.running.len() - 1];
        *growth = growth.map(|growth| growth + self.growth_of(row));
        self.take_chunk(self.running.len() - 1);
        true
    }

    /// Puts as much of a row into the step as there is room for.
    fn take_chunk(&mut self, idx: usize) {
        let row = &mut self.running[idx];
        let start = row.computed;
        let end = start + row.remaining().min(self.room_tokens);
        // The blocks that others may share by reference are full; this store is past them.
        assert!(start >= row.n_shared_blocks * BLOCK_TOKENS && end <= row.buffers.table.len() * BLOCK_TOKENS && start < end);
        let seen = row.high_water.clamp(start, end);
        let prompt_end = row.prompt.len().clamp(seen, end);
        let restored_end = row.restored_end.clamp(prompt_end, end);
        let counts = [seen - start + restored_end - prompt_end, prompt_end - seen, end - restored_end];
        row.computed = end;
        row.high_water = row.high_water.max(end);
        row.in_step = self.step;
        self.room_tokens -= end - start;
        let draws = end == row.n_tokens() && row.params.max_tokens > 0;
        let scores = row.scores_within(start, end);
        let (id, class) = (row.id, row.class);
        self.scheduled.push(Scheduled {
            id,
            class,
            first_position: start,
            n_tokens: end - start,
            draws,
            first_score: scores.start,
            n_scores: scores.len(),
            counts,
            running_idx: idx,
        });
        self.streams[row.stream_idx].trunk.note_computed(id, end);
    }

    /// Whether the first row of the class's queue gets in; makes room for it as far as its class allows.
    /// `growth` is what [`Scheduler::growth`] gives, once it is known.
    fn can_admit(&mut self, class: Class, growth: &mut Option<usize>) -> bool {
        match class {
            Class::Asap => {
                let has_place = self.n_running < self.config.max_running;
                self.asap_fits() && (has_place || self.preempt_below_asap()) && self.make_room_for_asap()
            }
            Class::Standard | Class::Batch => {
                (self.has_place_below_asap(self.n_running)
                    && !self.is_tight
                    && self.forecast_fits(class, *growth.get_or_insert_with(|| self.growth())))
                    || self.make_room_for_urgent(class, growth)
            }
        }
    }

    /// Moves the first row of the queue to the running ones and gives it blocks for all its tokens.
    fn admit(&mut self, class: Class) {
        let beginning = self.beginning(class);
        let n_shared = beginning.n_tokens;
        let mut row = self.waiting[class as usize].pop_front().expect("the caller looked");
        let is_new = !row.is_admitted;
        if is_new {
            row.is_admitted = true;
            row.n_cached = n_shared;
            row.start_constraint();
            self.turns[class as usize].pass(row.params.share, row.turn);
            self.n_queued[class as usize] -= 1;
        }
        row.n_shared_blocks = beginning.n_blocks();
        if beginning.is_kept {
            row.n_kept_blocks = row.n_shared_blocks;
            let found = self.kept.find(&row, n_shared).collect::<Vec<_>>();
            row.buffers.table.extend(found);
            self.stats.found_tokens += n_shared.min(row.prompt.len()).saturating_sub(row.high_water) as u64;
        } else {
            let trunk = &self.streams[row.stream_idx].trunk;
            row.buffers.table.extend_from_slice(&trunk.blocks()[..row.n_shared_blocks]);
        }
        row.buffers.table.iter().for_each(|&block| self.blocks.share(block));
        for _ in row.n_shared_blocks..row.n_blocks() {
            row.buffers.table.push(self.take_block().expect("the caller counted"));
        }
        let trunk = &mut self.streams[row.stream_idx].trunk;
        if !n_shared.is_multiple_of(BLOCK_TOKENS) {
            let src = trunk.blocks()[row.n_shared_blocks];
            let dst = row.buffers.table[row.n_shared_blocks];
            self.blocks.share(src);
            self.held.push(src);
            self.copies.push(BlockCopy { src, dst, n_slots: (n_shared % BLOCK_TOKENS) as u32 });
        }
        row.computed = n_shared;
        self.stats.shared_tokens += n_shared.min(row.prompt.len()).saturating_sub(row.high_water) as u64;
        row.high_water = row.high_water.max(n_shared);
        if is_new || trunk.is_owner(row.id) {
            trunk.grow_from(&row, &mut self.blocks);
        }
        self.n_running += 1;
        self.running.push(row);
    }

    /// Sees that a decoding row has a slot for its token; if blocks ran out, somebody loses theirs. False if the row
    /// has to wait, or was itself the one.
    fn ensure_slot(&mut self, idx: usize) -> bool {
        if self.running[idx].computed < self.running[idx].buffers.table.len() * BLOCK_TOKENS {
            return true;
        }
        loop {
            if let Some(block) = self.take_block() {
                self.running[idx].buffers.table.push(block);
                return true;
            }
            if self.drop_idle_trunks() {
                continue;
            }
            if self.blocks_come() {
                self.is_tight = true;
                return false;
            }
            let victim = self.victim_for(idx);
            if let Some(other) = victim.filter(|&v| v != idx) {
                self.preempt(other);
            } else if !self.drop_trunks() {
                self.is_tight = true;
                if victim.is_some() {
                    self.preempt(idx);
                }
                return false;
            }
        }
    }

    pub(super) fn release_blocks(&mut self, idx: usize) {
        let row = &mut self.running[idx];
        self.streams[row.stream_idx].trunk.note_lost(row.id, &mut self.blocks);
        row.buffers.table.drain(..).for_each(|block| self.blocks.release(block));
        (row.n_shared_blocks, row.n_kept_blocks) = (0, 0);
        row.computed = 0;
    }

    /// Frees the trunks of streams without rows; says whether that freed any reference.
    pub(super) fn drop_idle_trunks(&mut self) -> bool {
        self.drop_trunks_where(|s| s.n_live == 0)
    }

    /// Frees all trunks; says whether that freed any reference.
    pub(super) fn drop_trunks(&mut self) -> bool {
        self.drop_trunks_where(|_| true)
    }

    fn drop_trunks_where(&mut self, is_dropped: impl Fn(&Stream) -> bool) -> bool {
        let mut any = false;
        for stream in self.streams.iter_mut().filter(|s| is_dropped(s)) {
            any |= !stream.trunk.blocks().is_empty();
            stream.trunk.truncate(0, &mut self.blocks);
        }
        any
    }
}
