//! Decoded instructions: what an executor meets in its inner loop. All names and types are resolved here.

/// A register of a warp: one value a lane, zero-extended. Immediates, special registers and addresses are registers that
/// are set when a warp begins.
pub(crate) type R = usize;
/// A predicate register of a warp: one bit a lane.
pub(crate) type P = usize;
pub(crate) type Lanes = [u64; 32];
pub(crate) type F1 = fn(&mut Lanes, &Lanes);
pub(crate) type F2 = fn(&mut Lanes, &Lanes, &Lanes);
pub(crate) type F3 = fn(&mut Lanes, &Lanes, &Lanes, &Lanes);
/// A comparison: a bit for each lane.
pub(crate) type Compare = fn(&Lanes, &Lanes) -> u32;
/// A logical operation of predicates.
pub(crate) type Logic = fn(u32, u32) -> u32;
/// What an atomic operation makes of the old value and its one or two operands.
pub(crate) type Update = fn(u64, u64, u64) -> u64;

/// A predicate that is read, perhaps negated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cond {
    pub(crate) p: P,
    pub(crate) negate: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Inst {
    pub(crate) guard: Option<Cond>,
    pub(crate) op: Op,
    /// Line of the PTX text.
    pub(crate) line: u32,
    /// File and line of the source, as numbered by `.file` and `.loc`; 0: unknown.
    pub(crate) loc: (u32, u32),
    /// Index into the kernel's list of opcodes.
    pub(crate) opcode: usize,
    /// Operands of products of warpgroups that it touches and is none itself, by the numbers of the text: nobody may while such a
    /// product is under way.
    pub(crate) held: Vec<R>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// An address: a register and a constant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address {
    pub(crate) space: Space,
    pub(crate) base: R,
    pub(crate) offset: i64,
}

/// How memory operations order others (PTX memory consistency model). `Strong` ones are `volatile` or `relaxed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    Strong,
    /// Through the cache of what is never written (`ld.global.nc`).
    Constant,
    Acquire,
    Release,
    AcqRel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// What a bar does besides waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduction {
    And,
    Or,
    Popc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    Bf16,
    F16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

/// `mma.sync.aligned.m16n8k*`: a warp's product. Fragments as the ISA lays them out.
#[derive(Debug, Clone)]
pub(crate) struct Mma {
    pub(crate) k: usize,
    pub(crate) a_type: Element,
    pub(crate) b_type: Element,
    /// The accumulators are f16 pairs (two registers), not f32 or s32 (four).
    pub(crate) half_sums: bool,
    pub(crate) d: Vec<R>,
    pub(crate) a: Vec<R>,
    pub(crate) b: Vec<R>,
    pub(crate) c: Vec<R>,
}

/// The first factor of a product of a warpgroup.
#[derive(Debug, Clone)]
pub(crate) enum Factor {
    /// Of shared memory, by its descriptor.
    Shared(R),
    Registers([R; 4]),
}

/// `wgmma.mma_async.m64nNk16`, of bf16 with sums in f32.
#[derive(Debug, Clone)]
pub(crate) struct Product {
    pub(crate) n: usize,
    pub(crate) d: Vec<R>,
    pub(crate) a: Factor,
    /// Descriptor.
    pub(crate) b: R,
    /// Columns of `b` lie together, not its k.
    pub(crate) b_by_columns: bool,
    /// Whether it is added to what is there: not if this is false.
    pub(crate) adds: Option<Cond>,
    /// `d` and `a` by the numbers of the text.
    pub(crate) sums: Vec<R>,
    pub(crate) factors: Vec<R>,
    /// Some of them may have been touched since the last `wgmma.fence`.
    pub(crate) unfenced: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Nop,
    Un {
        f: F1,
        g: Option<F1>,
        d: R,
        a: R,
    },
    Bin {
        f: F2,
        d: R,
        a: R,
        b: R,
    },
    Tri {
        f: F3,
        d: R,
        a: R,
        b: R,
        c: R,
    },
    Lop3 {
        table: u8,
        d: R,
        a: R,
        b: R,
        c: R,
    },
    Select {
        d: R,
        a: R,
        b: R,
        cond: Cond,
    },
    Setp {
        f: Compare,
        p: P,
        q: Option<P>,
        a: R,
        b: R,
        with: Option<(Logic, Cond)>,
    },
    /// A logical operation of predicates; `mov.pred` and `not.pred` are ones whose operands are the same.
    Logic {
        f: Logic,
        d: P,
        a: Cond,
        b: Cond,
    },
    SetPred {
        d: P,
        value: bool,
    },
    Pack {
        d: R,
        parts: Vec<R>,
        bits: u32,
    },
    Unpack {
        parts: Vec<Option<R>>,
        a: R,
        bits: u32,
    },
    Branch {
        target: usize,
        uniform: bool,
    },
    BranchTable {
        index: R,
        targets: Vec<usize>,
    },
    Exit,
    Trap,
    Load {
        at: Address,
        d: Vec<Option<R>>,
        bytes: usize,
        extend: F1,
        order: Order,
    },
    Store {
        at: Address,
        a: Vec<R>,
        bytes: usize,
        order: Order,
    },
    Atomic {
        at: Address,
        d: Option<R>,
        a: R,
        b: R,
        bytes: usize,
        f: Update,
        order: Order,
    },
    Shuffle {
        mode: Shuffle,
        d: R,
        p: Option<P>,
        a: R,
        b: R,
        c: R,
        members: R,
    },
    Vote {
        mode: Vote,
        d: R,
        p: P,
        cond: Cond,
        members: R,
    },
    Match {
        d: R,
        p: Option<P>,
        a: R,
        members: R,
        all: bool,
    },
    Redux {
        f: fn(u64, u64) -> u64,
        d: R,
        a: R,
        members: R,
    },
    ActiveMask {
        d: R,
    },
    Elect {
        d: R,
        p: P,
        members: R,
    },
    WarpSync {
        members: R,
    },
    Bar {
        id: R,
        threads: Option<R>,
        waits: bool,
        reduce: Option<(Reduction, Cond, usize)>,
    },
    /// `gpu`: orders what other blocks see.
    Fence {
        gpu: bool,
    },
    Copy {
        to: Address,
        from: Address,
        bytes: usize,
        read: Option<R>,
        ignore: Option<Cond>,
    },
    CopyCommit,
    /// Of a thread's committed groups all but the newest `keep` are waited for; `None`: everything, committed or not.
    CopyWait {
        keep: Option<u32>,
    },
    CopyArrive {
        bar: Address,
        counted: bool,
    },
    LoadMatrix {
        at: Address,
        d: Vec<R>,
        transpose: bool,
    },
    StoreMatrix {
        at: Address,
        a: Vec<R>,
        transpose: bool,
    },
    MoveMatrix {
        d: R,
        a: R,
    },
    Mma(Box<Mma>),
    BarInit {
        bar: Address,
        count: R,
    },
    BarInvalidate {
        bar: Address,
    },
    BarArrive {
        bar: Address,
        state: Option<R>,
        count: Option<R>,
        expect: Option<R>,
        arrive: bool,
        drop: bool,
    },
    BarTest {
        bar: Address,
        p: P,
        by: Phase,
        blocking: bool,
    },
    Bulk {
        to: Address,
        from: Address,
        bytes: R,
        bar: Option<Address>,
    },
    /// `cp.async.bulk.tensor.2d` to shared memory.
    BulkBox {
        to: Address,
        map: Address,
        place: [R; 2],
        bar: Address,
    },
    /// `fence.proxy.async`; or `fence.mbarrier_init`, which is one of the mbarriers alone.
    FenceAsync {
        barriers_only: bool,
    },
    Product(Box<Product>),
    ProductFence,
    ProductCommit,
    ProductWait {
        keep: u32,
    },
    BulkCommit,
    BulkWait {
        keep: u32,
    },
}

/// Which phase of an mbarrier is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Phase {
    State(R),
    Parity(R),
}

/// What a register holds when a warp begins.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Const {
    Value(u64),
    Special(Special),
    /// Address of a module's variable in global or constant memory.
    Variable(usize, i64),
    /// Address of dynamic shared memory.
    Dynamic(i64),
    /// Part of the arguments: offset and bytes.
    Param(usize, usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
    Warp,
    Nwarp,
    /// Lanes that are equal, lower or higher: `%lanemask_*`.
    MaskEq,
    MaskLt,
    MaskLe,
    MaskGt,
    MaskGe,
    DynamicSharedSize,
    TotalSharedSize,
}
