//! What the CUDA kernels ask of memory and of tensor cores, in the PTX interpreter: as much as `costs` says, of each family and
//! over several shapes; and that no order of warps and blocks races, or changes a bit.

use crate::common::Sandbox;
use crate::cuda_attention::{Item, KV_HEADS, Layer, Loaded, RESUMES, SEGMENT, Seq, TO_PARTS, WIDE_DIMS, seq};
use crate::cuda_machine::{Launch, Machine, Noise, bytes, module_for};
use ptx::{Arg, Counters};
use serde_json::Value;
use valar::device::Activation;
use valar::device::cuda::costs::{self, Asked, Cost, Heads, Piece, Rows};

/// Orders that each launch is tried in.
const SCHEDULES: u64 = 20;

/// What a launch leaves, and what was counted.
struct Done {
    counters: Counters,
    bytes: Vec<u8>,
}

/// A launch in some order holds to its cost; in others it gives the same bits.
fn hold(what: &str, cost: &Cost, run: impl Fn(u64) -> Done) {
    let first = run(0);
    check(what, cost, &first.counters);
    for seed in 1..SCHEDULES {
        assert!(run(seed).bytes == first.bytes, "{what}: order {seed} changes bits");
    }
}

/// Bytes and operations are what is said, to a twentieth; passes for conflicts at most so many. Operations that depend on data
/// (drawing a token's) are at most so many, too.
fn check(what: &str, cost: &Cost, counters: &Counters) {
    let moved = 32 * (counters.global_read_sectors + counters.global_written_sectors);
    let near = |counted: u64, said: u64| counted * 100 <= said * 105 && counted * 105 >= said * 100;
    assert!(near(moved, cost.traffic()), "{what}: {moved} bytes are moved, not {}", cost.traffic());
    assert_eq!(counters.tensor_flops, cost.tensor, "{what}: operations of tensor cores");
    let scalar = scalar(counters);
    let is_said = near(scalar, cost.scalar) || (what.starts_with("sample") && scalar <= cost.scalar);
    assert!(is_said, "{what}: {scalar} operations, not {}", cost.scalar);
    let conflicts = counters.shared_conflicts;
    assert!(conflicts <= cost.conflicts, "{what}: {conflicts} passes for conflicts, over {}", cost.conflicts);
}

/// Operations of lanes on floats. A kernel's few operations on addresses and tests are not counted.
fn scalar(counters: &Counters) -> u64 {
    let is_one = |opcode: &str| {
        let mut words = opcode.split('.');
        let operation = words
            .next()
            .is_some_and(|name| ["add", "sub", "mul", "fma", "div", "sqrt", "max", "min", "ex2", "rcp", "cvt"].contains(&name));
        operation && words.any(|word| word == "f32" || word == "f64")
    };
    counters.instructions.iter().filter(|(opcode, _)| is_one(opcode)).map(|(_, n)| 32 * n).sum()
}

/// One launch of a kernel in a machine of its own, and what it has written.
pub(crate) struct Case {
    pub(crate) launch: Launch,
    pub(crate) args: Vec<Arg>,
    pub(crate) outs: Vec<(u64, usize)>,
}

pub(crate) fn hold_case(program: &str, kernel: &str, what: &str, cost: &Cost, case: impl Fn(&mut Machine) -> Case) {
    // There are floats of 8 bits from compute capability 8.9 on.
    let program = module_for(program, if kernel.contains("e4m3") { "compute_89" } else { "compute_80" });
    hold(&format!("{kernel}, {what}"), cost, |seed| {
        let mut m = Machine::seeded(seed);
        let Case { launch, args, outs } = case(&mut m);
        m.run(&program, kernel, launch, &args);
        let bytes = outs.iter().flat_map(|&(at, n)| m.read(at, n)).collect();
        Done { counters: m.counters, bytes }
    });
}

#[test]
fn rows_are_moved_once() {
    for (rows, width) in [(3usize, 576usize), (2, 2048)] {
        let what = format!("{rows} rows of {width}");
        hold_case("embed", "embed_bf16", &what, &costs::embed(rows as u64, width as u64), |m| {
            let mut noise = Noise(1);
            let (ids, table, x) = (m.u32s(&[2, 0, 3][..rows]), m.bf16s(&noise.bf16s(4 * width)), m.room(4 * rows * width));
            let (drawn, n_words) = (Arg::U64(0), Arg::U32(43));
            let args = [Arg::U64(ids), drawn, n_words, Arg::U64(table), Arg::U64(x), Arg::U32(width as u32), Arg::F32(3.0)];
            Case { launch: ((rows as u32, 1), 128, 0), args: args.to_vec(), outs: vec![(x, 4 * rows * width)] }
        });
        hold_case("embed", "gather_rows", &what, &costs::gather(rows as u64, width as u64), |m| {
            let (numbers, x) = (m.u32s(&[2, 0, 3][..rows]), m.f32s(&Noise(2).f32s(4 * width)));
            let out = m.room(4 * rows * width);
            let args = [Arg::U64(numbers), Arg::U64(x), Arg::U64(out), Arg::U32(width as u32)];
            Case { launch: ((rows as u32, 1), 128, 0), args: args.to_vec(), outs: vec![(out, 4 * rows * width)] }
        });
        for (kernel, f) in [("gate_silu", Activation::Silu), ("gate_gelu", Activation::GeluTanh)] {
            hold_case("gate", kernel, &what, &costs::gate(f, rows as u64, width as u64), |m| {
                let (x, out) = (m.bf16s(&Noise(3).bf16s(2 * rows * width)), m.room(2 * rows * width));
                let args = vec![Arg::U64(x), Arg::U64(out), Arg::U32(width as u32)];
                let grid = (rows as u32, (width as u32).div_ceil(2048));
                Case { launch: (grid, 256, 0), args, outs: vec![(out, 2 * rows * width)] }
            });
        }
    }
}

#[test]
fn values_are_cast_in_one_pass() {
    for n in [2048usize, 3 * 576] {
        for (kernel, to_f16) in [("bf16_to_f16", true), ("f16_to_bf16", false)] {
            hold_case("cast", kernel, &format!("{n} values"), &costs::cast(n as u64, to_f16), |m| {
                let x = m.bf16s(&Noise(30).bf16s(n));
                let out = if to_f16 { m.room(2 * n) } else { x };
                let args = vec![Arg::U64(x), Arg::U64(out), Arg::U32(n as u32)];
                Case { launch: ((n.div_ceil(2048) as u32, 1), 256, 0), args, outs: vec![(out, 2 * n)] }
            });
        }
    }
}

#[test]
fn norms_read_rows_once() {
    for (rows, width, rounds) in [(3usize, 1024usize, 1), (2, 2048, 4)] {
        let (what, n) = (format!("{rows} rows of {width}"), rows * width);
        let add_norm = |m: &mut Machine, summed: bool, out_bytes: usize| {
            let mut noise = Noise(4);
            let (x, y, weight) = (m.f32s(&noise.f32s(n)), m.bf16s(&noise.bf16s(n)), m.f32s(&noise.f32s(width)));
            let (out, scales) = (m.room(out_bytes * n), m.room(4 * rows));
            let pointers = [x, if summed { y } else { 0 }, weight, out, scales].map(Arg::U64);
            let args = pointers.into_iter().chain([Arg::U32(width as u32), Arg::F32(1e-5)]).collect();
            Case { launch: ((rows as u32, 1), 256, 0), args, outs: vec![(x, 4 * n), (out, out_bytes * n), (scales, 4 * rows)] }
        };
        for summed in [false, true] {
            for (form, out_bytes, rows_as) in [("bf16", 2, Rows::Bf16), ("int8", 1, Rows::Int8), ("e4m3", 1, Rows::E4m3)] {
                let kernel = format!("add_norm_{form}_{rounds}");
                let cost = costs::add_norm(rows as u64, width as u64, summed, rows_as);
                hold_case("norm", &kernel, &format!("{what}, summed: {summed}"), &cost, |m| add_norm(m, summed, out_bytes));
            }
        }
        hold_case("norm", &format!("norm_add_{rounds}"), &what, &costs::norm_add(rows as u64, width as u64), |m| {
            let mut noise = Noise(5);
            let (y, weight, x) = (m.bf16s(&noise.bf16s(n)), m.f32s(&noise.f32s(width)), m.f32s(&noise.f32s(n)));
            let args = [y, weight, x].map(Arg::U64).into_iter().chain([Arg::U32(width as u32), Arg::F32(1e-5)]).collect();
            Case { launch: ((rows as u32, 1), 256, 0), args, outs: vec![(x, 4 * n)] }
        });
        for (form, rows_as) in [("int8", Rows::Int8), ("e4m3", Rows::E4m3)] {
            let kernel = format!("quant_rows_{form}_16");
            hold_case("norm", &kernel, &what, &costs::quant_rows(rows as u64, width as u64, rows_as), |m| {
                let (y, out, scales) = (m.bf16s(&Noise(6).bf16s(n)), m.room(n), m.room(4 * rows));
                let args = [y, out, scales].map(Arg::U64).into_iter().chain([Arg::U32(width as u32)]).collect();
                Case { launch: ((rows as u32, 1), 256, 0), args, outs: vec![(out, n), (scales, 4 * rows)] }
            });
        }
    }
}

#[test]
fn scales_are_multiplied_in_one_pass() {
    for (rows, width) in [(3usize, 576usize), (2, 2048)] {
        for (kernel, bytes, adds) in [("scale_bf16", 2, false), ("scale_f32", 4, false), ("scale_add", 4, true)] {
            let cost = costs::scale(rows as u64, width as u64, bytes as u64, adds);
            hold_case("scale", kernel, &format!("{rows} rows of {width}"), &cost, |m| {
                let (mut noise, n) = (Noise(31), rows * width);
                let x = if bytes == 2 { m.bf16s(&noise.bf16s(n)) } else { m.f32s(&noise.f32s(n)) };
                let (of_rows, of_columns, out) = (m.f32s(&noise.f32s(rows)), m.f32s(&noise.f32s(width)), m.f32s(&noise.f32s(n)));
                let pointers = [of_rows, of_columns].map(Arg::U64).into_iter().chain([Arg::U32(width as u32)]);
                let args = adds.then_some(Arg::U64(out)).into_iter().chain([Arg::U64(x)]).chain(pointers).collect();
                let grid = (rows as u32, width.div_ceil(1024) as u32);
                Case { launch: (grid, 256, 0), args, outs: vec![(if adds { out } else { x }, bytes * n)] }
            });
        }
    }
}

#[test]
fn heads_are_finished_in_one_pass() {
    for (dim, pairs, interleaved, extra) in
        [(64usize, 32usize, 0u32, true), (128, 64, 0, false), (128, 64, 1, true), (80, 40, 0, false), (256, 128, 0, true)]
    {
        let (tokens, of) = (3usize, Heads { heads: 4, kv_heads: 2, dim: dim as u64 });
        let what = format!("heads of {dim}, interleaved: {interleaved}, bias and norms: {extra}");
        let cost = costs::finish_qkv(tokens as u64, of, pairs as u64, extra, extra);
        hold_case("qkv", "finish_qkv", &what, &cost, |m| {
            let (mut noise, width) = (Noise(7), 8 * dim);
            let or_none = |m: &mut Machine, values: Vec<f32>| if extra { m.f32s(&values) } else { 0 };
            let (qkv, bias) = (m.bf16s(&noise.bf16s(tokens * width)), or_none(m, noise.f32s(width)));
            let (q_norm, k_norm) = (or_none(m, noise.f32s(dim)), or_none(m, noise.f32s(dim)));
            let turns = m.f32s(&noise.f32s(2 * 9 * pairs));
            let (positions, slots) = (m.u32s(&[0, 5, 8]), m.u32s(&[3, 17, 40]));
            let (q, keys, values) = (m.room(2 * tokens * 4 * dim), m.room(2 * 3 * 2 * 16 * dim), m.room(2 * 3 * 2 * 16 * dim));
            let pointers = [qkv, bias, q_norm, k_norm, turns, positions, slots, q, keys, values].map(Arg::U64);
            let mut sizes = bytes([4, 2, dim as u32, pairs as u32, interleaved].map(u32::to_le_bytes));
            sizes.extend(1e-5f32.to_le_bytes());
            let args = pointers.into_iter().chain([Arg::Bytes(sizes)]).collect();
            let outs = vec![(q, 2 * tokens * 4 * dim), (keys, 2 * 3 * 2 * 16 * dim), (values, 2 * 3 * 2 * 16 * dim)];
            Case { launch: ((tokens as u32, 2), 128, 0), args, outs }
        });
    }
}

#[test]
fn blocks_are_copied_once() {
    for dim in [64usize, 128] {
        let (of, slots) = (Heads { heads: 0, kv_heads: 2, dim: dim as u64 }, [16u64, 5, 16]);
        hold_case("copy", "copy_blocks", &format!("heads of {dim}"), &costs::copy_blocks(&slots, of), |m| {
            let (mut noise, n) = (Noise(8), 5 * 2 * 16 * dim);
            let (keys, values) = (m.bf16s(&noise.bf16s(n)), m.bf16s(&noise.bf16s(n)));
            let list = m.u32s(&[0, 1, 16, 1, 4, 5, 2, 3, 16]);
            let args = [Arg::U64(keys), Arg::U64(values), Arg::U64(list), Arg::U32(3), Arg::U32(dim as u32)];
            Case { launch: ((2, 2), 256, 0), args: args.to_vec(), outs: vec![(keys, 2 * n), (values, 2 * n)] }
        });
    }
}

#[test]
fn packed_weights_are_read_once_for_each_block_of_rows() {
    for (bits, stored) in [(4u64, 4u64), (8, 8), (6, 8)] {
        for (rows, n, k, tiles) in [(1usize, 64usize, 256usize, 1usize), (16, 128, 512, 1), (70, 128, 128, 4)] {
            for (out_form, adds) in [("bf16", false), ("add", true)] {
                let kernel = format!("linear_q{bits}_{out_form}_{tiles}");
                let cost = costs::linear_q(stored, (rows as u64, n as u64, k as u64), tiles as u64, adds);
                hold_case("linear_q", &kernel, &format!("{rows} rows, {n} of {k}"), &cost, |m| {
                    let mut noise = Noise(9);
                    let words: Vec<u32> = (0..n * k * stored as usize / 32).map(|_| noise.next().to_bits()).collect();
                    let (x, q, scales) = (m.bf16s(&noise.bf16s(rows * k)), m.u32s(&words), m.f32s(&noise.f32s(n * k / 16)));
                    let out_bytes = rows * n * if adds { 4 } else { 2 };
                    let out = m.put(&vec![0; out_bytes]);
                    let sizes = Arg::Bytes(bytes([rows, n, k].map(|v| (v as u32).to_le_bytes())));
                    let args = [x, q, scales, out].map(Arg::U64).into_iter().chain([sizes]).collect();
                    let grid = (n.div_ceil(64) as u32, rows.div_ceil(16 * tiles) as u32);
                    Case { launch: (grid, 128, 0), args, outs: vec![(out, out_bytes)] }
                });
            }
        }
    }
}

/// A launch of attention: of all rows by prefill; by decode, to parts or straight to outputs; the merge of parts; of a shared
/// prefix, and of what comes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Prefill,
    Decode,
    Whole,
    Merge,
    Prefix(u32),
    Rest(u32),
}

impl Kernel {
    /// What the launch has to do.
    fn items(self, layer: &Layer) -> Vec<Item> {
        match self {
            Self::Prefill => layer.prefill_items(if layer.dim == 256 { 64 } else { 128 }),
            Self::Decode | Self::Merge => layer.decode_items(0),
            Self::Whole => layer.decode_items(0).into_iter().map(|item| Item { flags: 0, ..item }).collect(),
            Self::Prefix(keys) => layer.prefix_items(keys),
            Self::Rest(keys) => layer.decode_items(keys),
        }
    }

    fn cost(self, layer: &Layer, wide: bool) -> Cost {
        let of = match self {
            _ if wide => costs::prefill_sm90,
            Self::Prefill | Self::Prefix(_) => costs::prefill,
            _ => costs::decode,
        };
        pieces(&self.items(layer)).into_iter().map(|piece| of(u64::from(layer.dim), piece)).sum()
    }
}

fn pieces(items: &[Item]) -> Vec<Piece> {
    let piece = |item: &Item| Piece {
        rows: u64::from(item.n_rows),
        keys: u64::from(item.key_end - item.key_begin),
        segments: u64::from((item.key_end - 1) / SEGMENT - item.key_begin / SEGMENT + 1),
        to_parts: item.flags & TO_PARTS != 0,
        resumes: item.flags & RESUMES != 0,
    };
    items.iter().map(piece).collect()
}

/// The launch of one kernel, with those that come before and after it; by products of warpgroups or not.
fn attend(layer: &Layer, kernel: Kernel, wide: bool, seed: u64) -> Done {
    let mut loaded = Loaded::on(Machine::seeded(seed), layer);
    let items = kernel.items(layer);
    let n_items = items.len() as u32;
    let mut counters = None;
    match kernel {
        // Fewer blocks than items, so that a block takes several.
        Kernel::Prefill => loaded.many(wide, &items, (n_items / 2).max(1)),
        Kernel::Prefix(keys) => {
            loaded.many(wide, &items, n_items);
            counters = Some(loaded.machine.counters.clone());
            loaded.few(wide, &layer.decode_items(keys));
        }
        Kernel::Rest(keys) => {
            loaded.many(wide, &layer.prefix_items(keys), 2);
            loaded.few(wide, &items);
        }
        Kernel::Decode | Kernel::Whole | Kernel::Merge => loaded.few(wide, &items),
    }
    if !matches!(kernel, Kernel::Prefill | Kernel::Whole) {
        if kernel != Kernel::Merge {
            counters = counters.or(Some(loaded.machine.counters.clone()));
        }
        loaded.merge();
    }
    let bytes = bytes(loaded.out().into_iter().map(half::bf16::to_le_bytes));
    Done { counters: counters.unwrap_or(loaded.machine.counters), bytes }
}

fn hold_attention(layer: &Layer, kernel: Kernel) {
    for wide in [false, true].into_iter().filter(|wide| !wide || WIDE_DIMS.contains(&layer.dim)) {
        let what = format!("{kernel:?}, heads of {}, by warpgroups: {wide}", layer.dim);
        hold(&what, &kernel.cost(layer, wide), |seed| attend(layer, kernel, wide, seed));
    }
}

#[test]
fn keys_are_read_once_for_a_group() {
    for dim in [64u32, 80, 96, 128, 256] {
        hold_attention(&Layer::new(dim, 4, 0, 0.0, &[seq(1, 300), seq(2, 190)]), Kernel::Decode);
        hold_attention(&Layer::new(dim, 1, 0, 0.0, &[seq(1, 255)]), Kernel::Whole);
    }
}

#[test]
fn chunks_read_keys_once_for_each_block_of_rows() {
    for dim in [64u32, 80, 96, 128, 256] {
        hold_attention(&Layer::new(dim, 4, 0, 0.0, &[seq(32, 64), seq(9, 150)]), Kernel::Prefill);
    }
    // Of two segments, whose states the block merges.
    hold_attention(&Layer::new(64, 2, 0, 0.0, &[seq(2, 1030)]), Kernel::Prefill);
}

#[test]
fn a_shared_prefix_is_read_once() {
    let rest = |first| Seq { n: 1, first, shared: 20 };
    let layer = Layer::new(64, 2, 0, 0.0, &[seq(1, 430), rest(441), rest(500)]);
    // To the end of a tile, not of a segment: what comes after goes on from the states.
    for kernel in [Kernel::Prefix(320), Kernel::Rest(320)] {
        hold_attention(&layer, kernel);
    }
}

#[test]
fn parts_are_read_once() {
    for dim in [64u32, 128] {
        let layer = Layer::new(dim, 2, 0, 0.0, &[seq(1, 1100)]);
        let cost = costs::merge(u64::from(2 * KV_HEADS), 2, u64::from(dim));
        hold(&format!("merge_parts, heads of {dim}"), &cost, |seed| attend(&layer, Kernel::Merge, false, seed));
    }
}

#[test]
fn logits_are_read_once_a_pass() {
    let n_vocab = 4096u32;
    let (nothing, drawn) = (Asked::default(), Asked { drawn: true, ..Asked::default() });
    // Of struct Want: temperature, top_p, min_p, top_k, whether the log-probability is asked for, top tokens.
    for (temperature, top_p, min_p, top_k, logprob, n_top, asked) in [
        (0.0f32, 1.0f32, 0.0f32, 0u32, 0u32, 0u32, nothing),
        (0.0, 1.0, 0.0, 0, 1, 0, Asked { logprob: true, ..nothing }),
        (0.0, 1.0, 0.0, 0, 1, 5, Asked { logprob: true, top: true, ..nothing }),
        (1.0, 1.0, 0.0, 0, 0, 0, drawn),
        (1.0, 0.9, 0.0, 0, 0, 0, Asked { top_p: true, ..drawn }),
        (1.0, 1.0, 0.01, 40, 0, 0, Asked { top_k: true, min_p: true, ..drawn }),
    ] {
        let what =
            format!("temperature {temperature}, top-p {top_p}, min-p {min_p}, top-k {top_k}, logprob {logprob}, top {n_top}");
        hold_case("sample", "sample", &what, &costs::sample(2, u64::from(n_vocab), asked), |m| {
            let logits: Vec<f32> = Noise(10).f32s(2 * n_vocab as usize).into_iter().map(|x| 12.0 * x).collect();
            let mut want = bytes([temperature, top_p, min_p].map(f32::to_le_bytes));
            want.extend(top_k.to_le_bytes());
            want.extend(0x1234_5678_9abc_def0u64.to_le_bytes());
            want.extend(bytes([0, 7, u32::MAX, logprob, n_top, 0, 0, u32::MAX].map(u32::to_le_bytes)));
            let wants = [want.clone(), want].concat();
            let (logits, wants, nothing, out) = (m.f32s(&logits), m.put(&wants), m.room(16), m.room(2 * 172));
            let mut args = vec![Arg::U64(logits), Arg::U32(n_vocab), Arg::F32(0.0)];
            args.extend([wants, nothing, nothing, nothing, out].map(Arg::U64));
            Case { launch: ((2, 1), 512, 0), args, outs: vec![(out, 12), (out + 172, 12)] }
        });
    }
}

/// The model of speed prints every kernel for every architecture, says of each line that it is no measurement, and multiplies what
/// the tests above have counted.
#[test]
fn what_is_modelled_is_marked_as_such() {
    let sandbox = Sandbox::new();
    let command = ["bench", "kernels", "--device", "cuda", "--model-only"];
    let table = sandbox.run(&command);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(table.status.success());
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("  ")).collect();
    assert!(lines.len() > 80 && lines.iter().all(|line| line.ends_with("modelled, not measured")), "{text}");
    let json = sandbox.run(&[&command[..], &["--json"]].concat());
    let all: Value = serde_json::from_slice(&json.stdout).unwrap();
    let kernels = all["kernels"].as_array().unwrap();
    for model in ["1B", "8B", "70B", "8x7B", "30B-A3B"] {
        let of = kernels.iter().filter(|kernel| kernel["model"].as_str().unwrap().starts_with(model));
        let has_experts = model.contains('x') || model.contains('A');
        let names: Vec<&str> = of.map(|kernel| kernel["kernel"].as_str().unwrap()).collect();
        for family in [
            "embed",
            "add_norm",
            "finish_qkv",
            "prefill",
            "prefill_sm90",
            "decode",
            "merge",
            "gate",
            "gather",
            "sample",
            "linear_q",
            "cuBLASLt",
        ] {
            assert!(names.iter().any(|name| name.starts_with(family)), "{model} has no {family}: {names:?}");
        }
        for kernel in ["choose_experts", "list_uses", "linear_experts_bf16", "linear_experts_q4", "add_experts"] {
            assert_eq!(names.iter().any(|name| name.starts_with(kernel)), has_experts, "{model}: {kernel}");
        }
    }
    for kernel in kernels {
        let (name, archs) = (kernel["kernel"].as_str().unwrap(), kernel["by_arch"].as_object().unwrap());
        // Products of warpgroups are for one architecture, and what they replace for the others.
        let wide = name.starts_with("prefill_sm90");
        let narrow = name.starts_with("prefill_") && !wide || name.starts_with("decode_");
        assert!(kernel["is"] == "modelled, not measured" && archs.contains_key("sm_90a") != narrow, "{name}");
        assert_eq!(archs.len(), if wide { 1 } else { 6 - usize::from(narrow) }, "{name}");
    }
    // The gate of the 1B model's decoding: 64 rows of 8192, six bytes each, over 2039 GB/s.
    let gate = kernels.iter().find(|kernel| kernel["kernel"] == "gate_silu").unwrap();
    let cost = costs::gate(Activation::Silu, 64, 8192);
    assert_eq!((gate["bytes_read"].as_u64(), gate["bytes_written"].as_u64()), (Some(cost.read), Some(cost.written)));
    let microseconds = gate["by_arch"]["sm_80"]["microseconds"].as_f64().unwrap();
    assert!((microseconds - 64.0 * 8192.0 * 6.0 / 2039e3).abs() < 1e-6, "{microseconds}");
    for (args, words) in [(&command[..4], "--model-only"), (&["bench", "kernels", "--model-only"][..], "--device cuda")] {
        let output = sandbox.run(args);
        assert!(output.status.code() == Some(2) && String::from_utf8_lossy(&output.stderr).contains(words));
    }
}
