//! The pool of KV blocks: which are free, and how many tables refer to each of the others. Knows nothing of what is in
//! them. Invariant: a block is on the free list exactly when nothing refers to it.

/// Reference counts of the pool's blocks.
pub(super) struct Blocks {
    /// `[n_blocks]`: tables (of sequences and trunks, and of copies while a step is planned) that refer to the block, and whether it is kept.
    refs: Vec<u32>,
    /// `[n_blocks]`: whether one of the references is that it is kept (see `keep`).
    is_kept: Vec<bool>,
    /// Blocks that are kept and that nothing else refers to.
    n_idle: usize,
    /// Blocks without references; the last one freed is the first one reused.
    free: Vec<u32>,
}

impl Blocks {
    /// A pool of `n_blocks` free blocks.
    pub(super) fn new(n_blocks: usize) -> Self {
        Self { refs: vec![0; n_blocks], is_kept: vec![false; n_blocks], n_idle: 0, free: (0..n_blocks as u32).rev().collect() }
    }

    /// Takes a free block, with one reference.
    pub(super) fn alloc(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        let refs = &mut self.refs[block as usize];
        assert_eq!(*refs, 0, "block {block} was free and referred to");
        *refs = 1;
        Some(block)
    }

    /// Adds a reference to a block in use.
    pub(super) fn share(&mut self, block: u32) {
        self.n_idle -= usize::from(self.is_idle(block));
        let refs = &mut self.refs[block as usize];
        assert!(*refs > 0, "block {block} is free and can't be shared");
        *refs += 1;
    }

    /// Drops a reference; the last one frees the block.
    pub(super) fn release(&mut self, block: u32) {
        let refs = &mut self.refs[block as usize];
        assert!(*refs > 0, "block {block} was freed twice");
        *refs -= 1;
        if *refs == 0 {
            assert!(!self.is_kept[block as usize], "block {block} is kept and was freed");
            self.free.push(block);
        }
        self.n_idle += usize::from(self.is_idle(block));
    }

    /// Keeps a block that something refers to.
    pub(super) fn keep(&mut self, block: u32) {
        self.share(block);
        let is_kept = &mut self.is_kept[block as usize];
        assert!(!*is_kept, "block {block} was kept twice");
        *is_kept = true;
    }

    /// Keeps a block no more; it is free if nothing else refers to it.
    pub(super) fn unkeep(&mut self, block: u32) {
        assert!(self.is_kept[block as usize], "block {block} was not kept");
        self.n_idle -= usize::from(self.is_idle(block));
        self.is_kept[block as usize] = false;
        self.release(block);
    }

    /// Whether a block is kept and nothing else refers to it.
    pub(super) fn is_idle(&self, block: u32) -> bool {
        self.is_kept[block as usize] && self.refs[block as usize] == 1
    }

    /// Blocks that are kept and that nothing else refers to.
    pub(super) fn n_idle(&self) -> usize {
        self.n_idle
    }

    /// How many tables refer to a block.
    pub(super) fn n_tables(&self, block: u32) -> u32 {
        self.refs[block as usize] - u32::from(self.is_kept[block as usize])
    }

    /// Blocks of the pool.
    pub(super) fn n_total(&self) -> usize {
        self.refs.len()
    }

    /// Blocks that nothing refers to.
    pub(super) fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that something refers to besides that they are kept, each counted once.
    pub(super) fn n_used(&self) -> usize {
        self.refs.len() - self.free.len() - self.n_idle
    }

    /// Asserts that the counts are `refs` (recounted by the caller, `[n_blocks]`) and that the free list agrees.
    pub(super) fn check(&self, refs: &[u32]) {
        for (block, (&kept, &counted)) in self.refs.iter().zip(refs).enumerate() {
            assert_eq!(kept, counted, "block {block}: the pool counts {kept} references, the tables hold {counted}");
        }
        assert_eq!(refs.iter().filter(|&&r| r == 0).count(), self.free.len(), "free list and counts disagree");
        assert!(self.free.iter().all(|&b| refs[b as usize] == 0), "a block on the free list is referred to");
        assert_eq!((0..refs.len() as u32).filter(|&b| self.is_idle(b)).count(), self.n_idle, "idle blocks");
    }
}
