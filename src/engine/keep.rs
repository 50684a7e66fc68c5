//! KV blocks of sequences that have ended, for those that go on where one of them stopped: the next turn of a conversation.
//! Full blocks only, known by their owner and by all tokens up to their end, compared token by token. Knows nothing of
//! conversations.
//!
//! Invariants: a kept block is full, was written by a step that succeeded, and is never written again, so whoever begins with it
//! has the bits that it would have computed; nobody finds another owner's; a kept block that nobody uses counts as free to all who
//! need one, and goes before anybody loses anything. Blocks go in the order in which they lapse, a prefix never before what
//! follows it.

use std::collections::{BTreeSet, HashMap};

use super::blocks::Blocks;
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use crate::device::BLOCK_TOKENS;
use crate::window::Class;

/// Whose KV a sequence may begin with, and how long its own is kept. Changes when it ends, never a bit of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Sequences find what those of the same owner have left, and share with no others.
    pub owner: u64,
    /// How long after its end its blocks are kept, in milliseconds of the engine's clock; 0: not at all.
    pub for_ms: i64,
}

/// The tokens of a block.
type Tokens = [u32; BLOCK_TOKENS];

/// What a block follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Parent {
    /// Nothing: it is the first one of a sequence of that owner.
    Owner(u64),
    Node(u32),
}

#[derive(Debug)]
struct Node {
    key: (Parent, Tokens),
    block: u32,
    n_children: u32,
    /// When it lapses; of those that lapse at the same time, who was used longest ago goes first.
    until: (i64, u64),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Entries are reused.
    nodes: Vec<Node>,
    /// Entries of `nodes` that are free.
    unused: Vec<u32>,
    index: HashMap<(Parent, Tokens), u32>,
    /// Nodes that nothing follows, in the order in which they lapse.
    leaves: BTreeSet<((i64, u64), u32)>,
    /// Counts uses.
    n_uses: u64,
}

impl Kept {
    /// The nodes of a sequence's leading blocks, of at most so many tokens.
    fn path<'a>(&'a self, seq: &'a Sequence, most: usize) -> impl Iterator<Item = u32> + 'a {
        let mut parent = seq.params.keep.map(|keep| Parent::Owner(keep.owner));
        let blocks = if self.index.is_empty() { 0 } else { most / BLOCK_TOKENS };
        (0..blocks).map_while(move |i| {
            let node = *self.index.get(&(parent?, seq.block_tokens(i)))?;
            parent = Some(Parent::Node(node));
            Some(node)
        })
    }

    /// The blocks that hold a sequence's leading tokens, of at most so many.
    pub(super) fn find<'a>(&'a self, seq: &'a Sequence, most: usize) -> impl Iterator<Item = u32> + 'a {
        self.path(seq, most).map(|node| self.nodes[node as usize].block)
    }

    /// Keeps what a sequence begins with, as far as it is there, for as long as the sequence's own; says how many tokens that is.
    pub(super) fn touch(&mut self, seq: &Sequence, now_ms: i64) -> usize {
        let path: Vec<u32> = self.path(seq, seq.n_tokens()).collect();
        let for_ms = seq.params.keep.map_or(0, |keep| keep.for_ms);
        self.n_uses += 1;
        for &node in &path {
            self.use_until(node, now_ms.saturating_add(for_ms));
        }
        path.len() * BLOCK_TOKENS
    }

    fn use_until(&mut self, node: u32, until_ms: i64) {
        let own = &mut self.nodes[node as usize];
        let before = own.until;
        own.until = (before.0.max(until_ms), self.n_uses);
        if own.n_children == 0 {
            self.leaves.remove(&(before, node));
            self.leaves.insert((own.until, node));
        }
    }

    /// Keeps the full blocks that a row has computed and whose tokens are known, if it wants that.
    pub(super) fn add(&mut self, row: &Sequence, now_ms: i64, blocks: &mut Blocks) {
        let Some(Keep { owner, for_ms }) = row.params.keep.filter(|keep| keep.for_ms > 0) else { return };
        let mut parent = Parent::Owner(owner);
        self.n_uses += 1;
        for i in 0..row.computed.min(row.n_known()) / BLOCK_TOKENS {
            let key = (parent, row.block_tokens(i));
            let node = match self.index.get(&key) {
                Some(&node) => node,
                None => self.insert(key, row.buffers.table[i], blocks),
            };
            self.use_until(node, now_ms.saturating_add(for_ms));
            parent = Parent::Node(node);
        }
    }

    fn insert(&mut self, key: (Parent, Tokens), block: u32, blocks: &mut Blocks) -> u32 {
        blocks.keep(block);
        let until = (i64::MIN, self.n_uses);
        let new = Node { key, block, n_children: 0, until };
        let node = if let Some(node) = self.unused.pop() {
            self.nodes[node as usize] = new;
            node
        } else {
            self.nodes.push(new);
            self.nodes.len() as u32 - 1
        };
        if let Parent::Node(parent) = key.0 {
            let own = &mut self.nodes[parent as usize];
            own.n_children += 1;
            self.leaves.remove(&(own.until, parent));
        }
        self.leaves.insert((until, node));
        self.index.insert(key, node);
        node
    }

    /// Forgets a node that nothing follows.
    fn forget(&mut self, node: u32, blocks: &mut Blocks) {
        let Node { key, block, until, .. } = self.nodes[node as usize];
        self.index.remove(&key);
        self.leaves.remove(&(until, node));
        self.unused.push(node);
        blocks.unkeep(block);
        if let Parent::Node(parent) = key.0 {
            let own = &mut self.nodes[parent as usize];
            own.n_children -= 1;
            if own.n_children == 0 {
                self.leaves.insert((own.until, parent));
            }
        }
    }

    /// Forgets what lapses first, if anything is kept; rather what nobody uses, since only that gives a block.
    fn evict(&mut self, blocks: &mut Blocks) {
        let is_idle = |&&(_, node): &&((i64, u64), u32)| blocks.is_idle(self.nodes[node as usize].block);
        let first = self.leaves.iter().find(is_idle).or_else(|| self.leaves.first());
        if let Some(&(_, node)) = first {
            self.forget(node, blocks);
        }
    }

    /// Forgets what has lapsed; how many blocks that is.
    fn lapse(&mut self, now_ms: i64, blocks: &mut Blocks) -> usize {
        let before = self.index.len();
        while let Some(&((until_ms, _), node)) = self.leaves.first() {
            if until_ms > now_ms {
                break;
            }
            self.forget(node, blocks);
        }
        before - self.index.len()
    }

    /// When the first block lapses.
    pub(super) fn next_lapse_ms(&self) -> Option<i64> {
        self.leaves.first().map(|&((until_ms, _), _)| until_ms)
    }

    /// All kept blocks, having asserted that its books add up.
    pub(super) fn audit(&self) -> impl Iterator<Item = u32> + '_ {
        let mut n_children = vec![0; self.nodes.len()];
        for (&(parent, _), &node) in &self.index {
            let own = &self.nodes[node as usize];
            if let Parent::Node(parent) = parent {
                n_children[parent as usize] += 1;
                let until_ms = self.nodes[parent as usize].until.0;
                assert!(until_ms >= own.until.0, "a prefix lapses before what follows it");
            }
            assert_eq!(self.leaves.contains(&(own.until, node)), own.n_children == 0, "a node that nothing follows");
        }
        assert!(self.index.values().all(|&node| n_children[node as usize] == self.nodes[node as usize].n_children));
        assert_eq!(self.index.len() + self.unused.len(), self.nodes.len());
        assert!(self.leaves.len() <= self.index.len());
        self.index.values().map(|&node| self.nodes[node as usize].block)
    }
}

/// What the first row of a queue would begin with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Beginning {
    /// Leading tokens that are in the KV cache.
    pub(super) n_tokens: usize,
    /// Whether they are an ended sequence's, and not the trunk's.
    pub(super) is_kept: bool,
    /// Blocks of them that nobody else uses.
    n_idle: usize,
}

impl Beginning {
    /// Full blocks of it.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_tokens / BLOCK_TOKENS
    }

    /// Those that are in use whether the row begins with them or not.
    pub(super) fn n_used_blocks(&self) -> usize {
        self.n_blocks() - self.n_idle
    }

    /// Those that others are bound to hold.
    pub(super) fn n_trunk_blocks(&self) -> usize {
        if self.is_kept { 0 } else { self.n_blocks() }
    }
}

impl Scheduler {
    /// What the first row of the queue would begin with, of its trunk or of what is kept: all but its last token, which must be
    /// computed to draw from it.
    pub(super) fn beginning(&self, class: Class) -> Beginning {
        let row = &self.waiting[class as usize][0];
        // The logits of the token before the first scored one are wanted too.
        let most = row.params.score_from.map_or(row.n_tokens(), |first| first as usize).min(row.n_tokens()) - 1;
        let of_trunk = self.streams[row.stream_idx].trunk.common_tokens(row).min(most);
        let (mut n_blocks, mut n_idle) = (0, 0);
        for block in self.kept.find(row, most) {
            n_blocks += 1;
            n_idle += usize::from(self.blocks.is_idle(block));
        }
        if n_blocks * BLOCK_TOKENS > of_trunk {
            return Beginning { n_tokens: n_blocks * BLOCK_TOKENS, is_kept: true, n_idle };
        }
        Beginning { n_tokens: of_trunk, ..Beginning::default() }
    }

    /// Whether so many blocks can be had without anybody losing any, besides those that a row begins with.
    pub(super) fn has_blocks(&self, n_blocks: usize, beginning: Beginning) -> bool {
        n_blocks <= self.blocks.n_total() - self.blocks.n_used() - beginning.n_idle
    }

    /// A block for a row, a free one or one that is kept and not used.
    pub(super) fn take_block(&mut self) -> Option<u32> {
        while self.blocks.n_free() == 0 && self.blocks.n_idle() > 0 {
            self.kept.evict(&mut self.blocks);
            self.stats.evicted_blocks += 1;
        }
        self.blocks.alloc()
    }

    /// Keeps no more than there is room for.
    pub(super) fn trim_kept(&mut self) {
        while self.blocks.n_idle() > self.config.max_kept_blocks {
            self.kept.evict(&mut self.blocks);
            self.stats.evicted_blocks += 1;
        }
    }

    /// Forgets what has lapsed.
    pub(super) fn lapse_kept(&mut self) {
        self.stats.lapsed_blocks += self.kept.lapse(self.policy.now_ms(), &mut self.blocks) as u64;
    }

    /// Forgets all that is kept.
    pub(super) fn drop_kept(&mut self) {
        self.stats.lapsed_blocks += self.kept.lapse(i64::MAX, &mut self.blocks) as u64;
    }
}
