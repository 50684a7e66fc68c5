//! How long kernels should take at best on GPUs that nobody has measured them on: what they move and compute (`costs`) against what
//! the GPUs' maker publishes. A roofline: the slowest of memory, tensor cores and other operations, as if nothing else were in the
//! way. Knows nothing of launches, occupancy, caches' speed or clocks.
//!
//! Invariant: no figure of a measurement is among these.

use super::costs::{self, Asked, Cost, Heads, Piece, Rows};
use super::experts::n_items;
use super::kernels::{SEGMENT, tiles};
use super::work::{Attended, Item, RESUMES, TO_PARTS, UNMAPPED, Work};
use crate::device::batch::{Batch, BatchSeq};
use crate::device::{Activation, BLOCK_TOKENS};

/// A GPU of each architecture that kernels are built for, with its published peaks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    /// As NVRTC names it.
    pub arch: &'static str,
    /// What its maker calls it.
    pub name: &'static str,
    /// Bytes a second of its memory.
    pub bandwidth: f64,
    /// Operations a second of its tensor cores in bfloat16 with sums in f32, without sparsity.
    pub tensor: f64,
    /// Operations a second in f32 outside of them, a fused product and sum counted as two.
    pub f32: f64,
}

const G: f64 = 1e9;
const T: f64 = 1e12;

/// The cards, by architecture.
pub const CARDS: [Card; 6] = [
    // NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM.
    Card { arch: "sm_80", name: "A100 SXM 80GB", bandwidth: 2039.0 * G, tensor: 312.0 * T, f32: 19.5 * T },
    // NVIDIA A40 datasheet.
    Card { arch: "sm_86", name: "A40", bandwidth: 696.0 * G, tensor: 149.7 * T, f32: 37.4 * T },
    // NVIDIA L40S datasheet.
    Card { arch: "sm_89", name: "L40S", bandwidth: 864.0 * G, tensor: 362.05 * T, f32: 91.6 * T },
    // NVIDIA H100 Tensor Core GPU datasheet, SXM; of 1,979 T with sparsity, half.
    Card { arch: "sm_90a", name: "H100 SXM", bandwidth: 3350.0 * G, tensor: 989.5 * T, f32: 67.0 * T },
    // NVIDIA Blackwell architecture technical brief, HGX B200, one GPU; of 4.5 P with sparsity, half.
    Card { arch: "sm_100a", name: "HGX B200", bandwidth: 8000.0 * G, tensor: 2250.0 * T, f32: 80.0 * T },
    // NVIDIA RTX Blackwell GPU architecture, appendix A, GeForce RTX 5090.
    Card { arch: "sm_120", name: "RTX 5090", bandwidth: 1792.0 * G, tensor: 209.5 * T, f32: 104.8 * T },
];

/// What a launch would wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Its memory.
    Memory,
    /// Tensor cores.
    Tensor,
    /// Other operations.
    Scalar,
}

impl Bound {
    /// `memory`, `tensor` or `scalar`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Tensor => "tensor",
            Self::Scalar => "scalar",
        }
    }
}

impl Card {
    /// Whether its attention is by products of warpgroups.
    fn is_wide(&self) -> bool {
        self.arch == "sm_90a"
    }

    /// Seconds of a launch at best, and what for.
    pub fn seconds(&self, cost: &Cost) -> (f64, Bound) {
        let memory = (cost.read + cost.written) as f64 / self.bandwidth;
        let tensor = cost.tensor as f64 / self.tensor;
        // A fused product and sum is one of ours.
        let scalar = cost.scalar as f64 / (self.f32 / 2.0);
        let all = [(memory, Bound::Memory), (tensor, Bound::Tensor), (scalar, Bound::Scalar)];
        all.into_iter().fold((0.0, Bound::Memory), |most, one| if one.0 > most.0 { one } else { most })
    }
}

/// A model's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What it is called.
    pub name: &'static str,
    width: u64,
    ffn_width: u64,
    heads: Heads,
    vocab: u64,
    layers: u64,
    /// Whether heads of queries and keys are normed.
    normed: bool,
    experts: Option<ExpertShape>,
}

/// A model's experts. `ffn_width` is one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ExpertShape {
    all: u64,
    used: u64,
}

const fn shape(name: &'static str, width: u64, ffn_width: u64, (heads, kv_heads, dim): (u64, u64, u64), layers: u64) -> Shape {
    let heads = Heads { heads, kv_heads, dim };
    Shape { name, width, ffn_width, heads, vocab: 128_256, layers, normed: false, experts: None }
}

/// Models that are reckoned with.
pub const SHAPES: [Shape; 5] = [
    shape("1B (Llama 3.2)", 2048, 8192, (32, 8, 64), 16),
    shape("8B (Llama 3.1)", 4096, 14336, (32, 8, 128), 32),
    shape("70B (Llama 3.1)", 8192, 28672, (64, 8, 128), 80),
    Shape {
        vocab: 32_000,
        experts: Some(ExpertShape { all: 8, used: 2 }),
        ..shape("8x7B (Mixtral)", 4096, 14336, (32, 8, 128), 32)
    },
    Shape {
        vocab: 151_936,
        normed: true,
        experts: Some(ExpertShape { all: 128, used: 8 }),
        ..shape("30B-A3B (Qwen3)", 2048, 768, (32, 4, 128), 48)
    },
];

/// A step: sequences of one length, whose last tokens are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// What it is called.
    pub name: &'static str,
    seqs: u32,
    length: u32,
    tokens: u32,
}

/// Steps that are reckoned with.
pub const STEPS: [StepShape; 2] = [
    StepShape { name: "decode, 64 sequences of 2048 tokens", seqs: 64, length: 2048, tokens: 1 },
    StepShape { name: "prefill, 2 prompts of 1024 tokens", seqs: 2, length: 1024, tokens: 1024 },
];

/// Which GPUs launch a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// All.
    Every,
    /// Those whose attention is by products of warpgroups.
    Wide,
    /// The others.
    Narrow,
}

/// A kernel in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Its name, and what it is for.
    pub kernel: String,
    /// How often a step launches it.
    pub times: u64,
    /// Whether the step of a model with weights in bfloat16 does, and one with packed ones.
    pub of: (bool, bool),
    /// Which GPUs do.
    pub on: On,
    /// Of one launch.
    pub cost: Cost,
}

impl Launch {
    /// Whether that GPU launches it.
    pub fn is_on(&self, card: &Card) -> bool {
        match self.on {
            On::Every => true,
            On::Wide => card.is_wide(),
            On::Narrow => !card.is_wide(),
        }
    }
}

/// The launches of attention: prefill, decode, both by products of warpgroups, merge.
fn attention(of: Heads, step: &StepShape) -> [Cost; 5] {
    let n_blocks = step.length.div_ceil(BLOCK_TOKENS as u32);
    let mut batch = Batch::default();
    for seq in 0..step.seqs {
        let (token_start, table_start) = (batch.tokens.len() as u32, batch.block_tables.len() as u32);
        let first_position = step.length - step.tokens;
        batch.seqs.push(BatchSeq { token_start, n_tokens: step.tokens, first_position, table_start, n_blocks });
        batch.block_tables.extend(seq * n_blocks..(seq + 1) * n_blocks);
        batch.positions.extend(first_position..step.length);
        batch.tokens.resize(batch.positions.len(), 0);
    }
    let (group, n_kv_heads) = ((of.heads / of.kv_heads) as u32, of.kv_heads as u32);
    let attended = Attended { group, n_kv_heads, prefill_rows: 128, window: 0, max_parts: 2048 };
    let mut work = Work::default();
    work.plan(&attended, &batch);
    let of_items =
        |items: &[Item], cost: fn(u64, Piece) -> Cost| -> Cost { items.iter().map(|item| cost(of.dim, piece(item))).sum() };
    let with_parts = work.part_starts.iter().filter(|&&start| start != UNMAPPED).count() as u64;
    let merge = match with_parts {
        0 => Cost::default(),
        n => costs::merge(n * of.heads, u64::from(work.n_parts) / n, of.dim),
    };
    // Items of a prompt read the same keys.
    let (keys, queries) = (u64::from(step.seqs * step.length) * of.kv_heads, batch.tokens.len() as u64 * of.heads);
    let distinct = 2 * of.dim * (2 * keys + queries);
    let many = |cost| of_items(&work.prefill, cost).of_distinct(distinct);
    let few = |cost| of_items(&work.decode, cost);
    [many(costs::prefill), few(costs::decode), many(costs::prefill_sm90), few(costs::prefill_sm90), merge]
}

fn piece(item: &Item) -> Piece {
    Piece {
        rows: u64::from(item.n_rows),
        keys: u64::from(item.key_end - item.key_begin),
        segments: u64::from((item.key_end - 1) / SEGMENT - item.key_begin / SEGMENT + 1),
        to_parts: item.flags & TO_PARTS != 0,
        resumes: item.flags & RESUMES != 0,
    }
}

/// What a layer of experts launches for so many rows, besides the norm before it, with the kind of weights that it is of. Tokens use
/// all experts alike.
fn expert_launches(shape: &Shape, of: ExpertShape, rows: u64) -> Vec<(String, (bool, bool), Cost)> {
    let (Shape { width, ffn_width, .. }, ExpertShape { all, used }) = (*shape, of);
    let uses = rows * used;
    let of_each: Vec<u64> = (0..all).map(|expert| uses / all + u64::from(expert < uses % all)).collect();
    let both = (true, true);
    // As many experts as there can be among 32 uses.
    let pairs = uses.div_ceil(32) * all.min(32);
    let mut found = vec![
        ("cuBLASLt, router".to_owned(), both, costs::product((rows, all, width), 4)),
        ("choose_experts".to_owned(), both, costs::choose_experts(rows, all, used, true)),
        ("list_uses".to_owned(), both, costs::list_uses(uses, all, pairs)),
        ("gate_silu".to_owned(), both, costs::gate(Activation::Silu, uses, ffn_width)),
        ("add_experts".to_owned(), both, costs::add_experts(rows, width, used)),
    ];
    let tiles = tiles(uses.div_ceil(all) as usize) as u64;
    let items = n_items(uses as usize, all as usize, 16 * tiles as usize) as u64;
    for (what, n, k, distinct) in [("gate, up", 2 * ffn_width, width, rows), ("down", width, ffn_width, uses)] {
        for (bits, name, is_of) in [(16, "bf16", (true, false)), (4, "q4", (false, true))] {
            let cost = costs::linear_experts(bits, (n, k), &of_each, tiles, items);
            // Several experts read a token's row.
            let weights = cost.read - 2 * uses * k;
            found.push((format!("linear_experts_{name}, {what}"), is_of, cost.of_distinct(weights + 2 * distinct * k)));
        }
    }
    found
}

/// All launches of a step of a model. Products are given for weights in bfloat16 and for 4-bit ones.
pub fn launches(shape: &Shape, step: &StepShape) -> Vec<Launch> {
    let Shape { width, ffn_width, heads: of, vocab, layers, .. } = *shape;
    let (rows, drawn) = (u64::from(step.seqs * step.tokens), u64::from(step.seqs));
    let q_width = of.heads * of.dim;
    let mut all = Vec::new();
    let mut add =
        |kernel: String, times: u64, of: (bool, bool), cost: Cost| all.push(Launch { kernel, times, of, on: On::Every, cost });
    let both = (true, true);
    add("embed_bf16".to_owned(), 1, both, costs::embed(rows, width));
    add("add_norm_bf16".to_owned(), 2 * layers, both, costs::add_norm(rows, width, false, Rows::Bf16));
    let products = [
        ("qkv", q_width + 2 * of.kv_heads * of.dim, width, false),
        ("attention output", width, q_width, true),
        ("gate, up", 2 * ffn_width, width, false),
        ("down", width, ffn_width, true),
    ];
    let n_products = if shape.experts.is_some() { 2 } else { products.len() };
    for (what, n, k, adds) in products.into_iter().take(n_products) {
        let sizes = (rows, n, k);
        // What is added to is read, too.
        let sum = Cost { read: if adds { 4 * rows * n } else { 0 }, ..Cost::default() };
        add(format!("cuBLASLt, {what}"), layers, (true, false), costs::product(sizes, if adds { 4 } else { 2 }) + sum);
        let packed = costs::linear_q(4, sizes, tiles(rows as usize) as u64, adds);
        add(format!("linear_q4, {what}"), layers, (false, true), packed);
    }
    add("finish_qkv".to_owned(), layers, both, costs::finish_qkv(rows, of, of.dim / 2, false, shape.normed));
    match shape.experts {
        None => add("gate_silu".to_owned(), layers, both, costs::gate(Activation::Silu, rows, ffn_width)),
        Some(experts) => {
            for (kernel, is_of, cost) in expert_launches(shape, experts, rows) {
                add(kernel, layers, is_of, cost);
            }
        }
    }
    add("gather_rows".to_owned(), 1, both, costs::gather(drawn, width));
    add("add_norm_bf16".to_owned(), 1, both, costs::add_norm(drawn, width, false, Rows::Bf16));
    add("cuBLASLt, head".to_owned(), 1, both, costs::product((drawn, vocab, width), 4));
    add("sample".to_owned(), 1, both, costs::sample(drawn, vocab, Asked { drawn: true, ..Asked::default() }));
    let [prefill, decode, wide_prefill, wide_decode, merge] = attention(of, step);
    let dim = of.dim;
    let of_attention = [
        (format!("prefill_{dim}"), On::Narrow, prefill),
        (format!("decode_{dim}"), On::Narrow, decode),
        (format!("prefill_sm90_{dim}"), On::Wide, wide_prefill),
        (format!("prefill_sm90_{dim}, few rows"), On::Wide, wide_decode),
        ("merge_parts".to_owned(), On::Every, merge),
    ];
    let there = of_attention.into_iter().filter(|(.., cost)| *cost != Cost::default());
    all.extend(there.map(|(kernel, on, cost)| Launch { kernel, times: layers, of: both, on, cost }));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_takes_as_long_as_the_slowest_part() {
        let card = Card { arch: "", name: "", bandwidth: 100.0, tensor: 1000.0, f32: 20.0 };
        let cost = Cost { read: 300, written: 100, cached: 1_000_000, tensor: 3000, scalar: 10, conflicts: 7 };
        assert_eq!(card.seconds(&cost), (4.0, Bound::Memory));
        assert_eq!(card.seconds(&Cost { tensor: 5000, ..cost }), (5.0, Bound::Tensor));
        assert_eq!(card.seconds(&Cost { scalar: 60, ..cost }), (6.0, Bound::Scalar));
    }

    /// A step reads the weights once, and of keys and values all that there are.
    #[test]
    fn a_step_is_all_of_a_model() {
        let shape = &SHAPES[1];
        let of = |step: &StepShape, packed: bool| -> Cost {
            let all = launches(shape, step).into_iter().filter(|l| l.on != On::Wide && if packed { l.of.1 } else { l.of.0 });
            all.map(|l| l.cost.times(l.times)).sum()
        };
        let decode = of(&STEPS[0], false);
        let parameters = 8_030_261_248u64 - 128_256 * 4096;
        let kv = 64 * 2048 * 32 * 2 * 8 * 128 * 2;
        let share = decode.read as f64 / (2 * parameters + kv) as f64;
        assert!((1.0..1.05).contains(&share), "{share}");
        let packed = of(&STEPS[0], true);
        assert!(packed.read < decode.read && packed.read > kv);
        // Two operations a parameter and token, and attention's, half of whose square is seen.
        let prefill = of(&STEPS[1], false);
        let (products, scores) = (2 * (parameters - 128_256 * 4096) * 2048, 4 * 4096 * 32 * 2 * 1024 * 1024 / 2);
        let share = prefill.tensor as f64 / (products + scores) as f64;
        assert!((1.0..1.05).contains(&share), "{share}");
    }

    /// Of a step of 64 tokens that use experts alike, all experts are read once where there are 8, and where there are 128; each token
    /// is multiplied with those that it uses.
    #[test]
    fn experts_are_read_once() {
        for (shape, parameters, used) in
            [(&SHAPES[3], 46_702_792_704u64, 12_879_925_248u64), (&SHAPES[4], 30_532_122_624, 3_353_032_704)]
        {
            let of = |step: &StepShape| -> Cost {
                let all = launches(shape, step).into_iter().filter(|l| l.on != On::Wide && l.of.0);
                all.map(|l| l.cost.times(l.times)).sum()
            };
            let Shape { vocab, width, layers, heads, .. } = *shape;
            let kv = 64 * 2048 * layers * 2 * heads.kv_heads * heads.dim * 2;
            let share = of(&STEPS[0]).read as f64 / (2 * (parameters - vocab * width) + kv) as f64;
            assert!((1.0..1.05).contains(&share), "{}: {share}", shape.name);
            let (products, scores) =
                (2 * (used - 2 * vocab * width) * 2048, 4 * heads.heads * heads.dim * layers * 2 * 1024 * 1024 / 2);
            let share = of(&STEPS[1]).tensor as f64 / (products + scores) as f64;
            assert!((1.0..1.05).contains(&share), "{}: {share}", shape.name);
        }
    }
}
