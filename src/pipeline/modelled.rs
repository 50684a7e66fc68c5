//! `valar bench kernels --device cuda --model-only`: what the CUDA kernels should take at best, as a table or JSON. Nothing is
//! measured, and each line says so.

use crate::device::cuda::costs::Cost;
use crate::device::cuda::modelled::{CARDS, Card, Launch, SHAPES, STEPS, Shape, StepShape, launches};
use anyhow::Result;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write;

/// What every line is marked with.
const MARK: &str = "modelled, not measured";

/// Prints it.
///
/// # Errors
/// The output can't be written.
pub fn show(json: bool) -> Result<()> {
    let text = if json {
        let steps = SHAPES.iter().flat_map(|shape| STEPS.iter().flat_map(move |step| objects(shape, step)));
        format!("{:#}\n", json!({"is": MARK, "gpus": CARDS.map(|card| gpu(&card)), "kernels": steps.collect::<Vec<_>>()}))
    } else {
        SHAPES.iter().flat_map(|shape| STEPS.iter().map(move |step| table(shape, step))).collect()
    };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

/// Seconds of a step: of the launches that are taken.
fn step_seconds(card: &Card, launches: &[Launch], takes: impl Fn(&Launch) -> bool) -> f64 {
    launches
        .iter()
        .filter(|launch| launch.is_on(card) && takes(launch))
        .map(|launch| launch.times as f64 * card.seconds(&launch.cost).0)
        .sum()
}

/// A launch a line: what it moves and computes, and its microseconds by architecture, with m, t or s for what it waits for.
fn table(shape: &Shape, step: &StepShape) -> String {
    let all = launches(shape, step);
    let mut text = format!("{}: {}\n", shape.name, step.name);
    let _ = write!(text, "  {:<28}{:>6}{:>11}{:>11}{:>11}", "kernel", "times", "MB", "tensor G", "other G");
    for card in CARDS {
        let _ = write!(text, "{:>12}", card.arch);
    }
    let _ = writeln!(text, "  us; {MARK}");
    for launch in &all {
        let Launch { kernel, times, cost, .. } = launch;
        let Cost { read, written, tensor, scalar, .. } = *cost;
        let [bytes, tensor, scalar] = [(read + written) as f64 / 1e6, tensor as f64 / 1e9, scalar as f64 / 1e9];
        let _ = write!(text, "  {kernel:<28}{times:>6}{bytes:>11.3}{tensor:>11.3}{scalar:>11.3}");
        for card in CARDS {
            let (seconds, bound) = card.seconds(cost);
            let _ = if launch.is_on(&card) {
                write!(text, "{:>10.2} {}", seconds * 1e6, &bound.name()[..1])
            } else {
                write!(text, "{:>12}", "- ")
            };
        }
        let _ = writeln!(text, "  {MARK}");
    }
    for (name, takes) in [("step, bfloat16 weights", (|l| l.of.0) as fn(&Launch) -> bool), ("step, 4-bit weights", |l| l.of.1)] {
        let _ = write!(text, "  {name:<67}");
        for card in CARDS {
            let _ = write!(text, "{:>10.0}  ", step_seconds(&card, &all, takes) * 1e6);
        }
        let _ = writeln!(text, "  {MARK}");
    }
    text
}

fn gpu(card: &Card) -> Value {
    let Card { arch, name, bandwidth, tensor, f32 } = card;
    json!({"arch": arch, "name": name, "bytes_per_s": bandwidth, "tensor_operations_per_s": tensor, "f32_operations_per_s": f32})
}

/// A launch an object.
fn objects(shape: &Shape, step: &StepShape) -> Vec<Value> {
    let of = |launch: Launch| {
        let by_arch = CARDS.iter().filter(|card| launch.is_on(card));
        let Launch { kernel, times, cost, .. } = &launch;
        let Cost { read, written, cached, tensor, scalar, .. } = *cost;
        let times_of = |card: &Card| {
            let (seconds, bound) = card.seconds(cost);
            (card.arch.to_owned(), json!({"microseconds": seconds * 1e6, "bound_by": bound.name()}))
        };
        let by_arch: serde_json::Map<String, Value> = by_arch.map(times_of).collect();
        json!({
            "model": shape.name, "step": step.name, "kernel": kernel, "launches": times, "bytes_read": read, "bytes_written": written,
            "bytes_cached": cached, "tensor_operations": tensor, "other_operations": scalar, "by_arch": by_arch, "is": MARK,
        })
    };
    launches(shape, step).into_iter().map(of).collect()
}
