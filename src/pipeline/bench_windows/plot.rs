//! A picture of both orders: standard's mean turn through the day, and the batches with their deadlines. Plain SVG, read by
//! every browser.

use super::load::Load;
use super::run::{BIN_MS, Outcome};
use crate::window::{Class, STANDARD_TARGET_S};
use std::fmt::Write as _;

/// Sizes in pixels.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 70.0;
const TURNS_TOP: f64 = 40.0;
const TURNS_HEIGHT: f64 = 240.0;
const BATCHES_TOP: f64 = 330.0;
const BATCH_HEIGHT: f64 = 14.0;
/// Turns are drawn from 1 to 10,000 s, by their logarithm.
const DECADES: f64 = 4.0;
/// Of both orders.
const COLOURS: [&str; 2] = ["#1663a8", "#c7432b"];
const NAMES: [&str; 2] = ["windows", "first come, first served"];

struct Picture {
    out: String,
    end_ms: f64,
}

impl Picture {
    fn x(&self, ms: i64) -> f64 {
        LEFT + (WIDTH - LEFT - 20.0) * ms as f64 / self.end_ms
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        writeln!(self.out, r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {style}/>"#).expect("memory takes text");
    }

    fn text(&mut self, x: f64, y: f64, style: &str, text: &str) {
        writeln!(self.out, r#"<text x="{x:.1}" y="{y:.1}" {style}>{text}</text>"#).expect("memory takes text");
    }
}

fn turn_y(seconds: f64) -> f64 {
    TURNS_TOP + TURNS_HEIGHT * (1.0 - seconds.max(1.0).log10().min(DECADES) / DECADES)
}

/// Draws outcomes of the load: of windows, then of arrival.
pub(super) fn draw(load: &Load, outcomes: [&Outcome; 2]) -> String {
    let height = BATCHES_TOP + BATCH_HEIGHT * load.batches.len() as f64 + 40.0;
    let due_ms = load.batches.iter().map(|batch| batch.due_ms);
    let last_ms = outcomes.iter().map(|outcome| outcome.end_ms).max().unwrap_or(1).max(1);
    // Deadlines after all is done need no room.
    let end_ms = due_ms.filter(|&due| due <= last_ms).max().unwrap_or(last_ms).max(last_ms) as f64;
    let out = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
"#
    );
    let mut picture = Picture { out, end_ms };
    draw_turns(&mut picture, load, outcomes);
    draw_batches(&mut picture, load, outcomes, height);
    picture.out + "</svg>\n"
}

fn draw_turns(picture: &mut Picture, load: &Load, outcomes: [&Outcome; 2]) {
    picture.text(LEFT, TURNS_TOP - 20.0, r#"font-weight="bold""#, "Mean turn of standard calls, by when they came (seconds)");
    for seconds in [1.0, 10.0, 100.0, 1000.0, 10_000.0] {
        let y = turn_y(seconds);
        picture.line((LEFT, y), (WIDTH - 20.0, y), r##"stroke="#ddd""##);
        picture.text(LEFT - 8.0, y + 4.0, r#"text-anchor="end""#, &format!("{seconds}"));
    }
    let y = turn_y(STANDARD_TARGET_S as f64);
    picture.line((LEFT, y), (WIDTH - 20.0, y), r#"stroke="black" stroke-dasharray="5 4""#);
    picture.text(LEFT + 4.0, y - 4.0, "", &format!("target of the mean: {STANDARD_TARGET_S} s"));
    for (i, (outcome, colour)) in outcomes.iter().zip(COLOURS).enumerate() {
        let mut bins: Vec<(f64, f64)> = Vec::new();
        for (row, &turn_ms) in load.rows.iter().zip(&outcome.turns_ms).filter(|(row, _)| row.class == Class::Standard) {
            let bin = (row.request.at_ms / BIN_MS) as usize;
            bins.resize(bins.len().max(bin + 1), (0.0, 0.0));
            bins[bin] = (bins[bin].0 + turn_ms as f64 / 1000.0, bins[bin].1 + 1.0);
        }
        let mut points = String::new();
        for (bin, (sum, _)) in bins.iter().enumerate().filter(|(_, (_, n))| *n > 0.0) {
            let x = picture.x(bin as i64 * BIN_MS + BIN_MS / 2);
            write!(points, "{x:.1},{:.1} ", turn_y(sum / bins[bin].1)).expect("memory takes text");
        }
        let points = format!(r#"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>"#);
        writeln!(picture.out, "{points}").expect("memory takes text");
        let style = format!(r#"fill="{colour}" text-anchor="end""#);
        picture.text(WIDTH - 20.0, TURNS_TOP - 20.0 + 14.0 * i as f64, &style, NAMES[i]);
    }
}

fn draw_batches(picture: &mut Picture, load: &Load, outcomes: [&Outcome; 2], height: f64) {
    let title = "Batches, from when they came to their ends; the mark is the deadline, if it is in the picture";
    picture.text(LEFT, BATCHES_TOP - 14.0, r#"font-weight="bold""#, title);
    for (i, batch) in load.batches.iter().enumerate() {
        let y = BATCHES_TOP + BATCH_HEIGHT * i as f64;
        for (k, (outcome, colour)) in outcomes.iter().zip(COLOURS).enumerate() {
            let y = y + 4.0 * k as f64;
            let style = format!(r#"stroke="{colour}" stroke-width="3""#);
            picture.line((picture.x(batch.at_ms), y), (picture.x(outcome.ends_ms[i]), y), &style);
        }
        if (batch.due_ms as f64) <= picture.end_ms {
            let x = picture.x(batch.due_ms);
            picture.line((x, y - 4.0), (x, y + 8.0), r#"stroke="black" stroke-width="1.5""#);
        }
        let hours = (batch.due_ms - batch.at_ms) as f64 / 3_600_000.0;
        picture.text(LEFT - 8.0, y + 6.0, r#"text-anchor="end" font-size="10""#, &format!("{hours} h"));
    }
    for hour in (0..=(picture.end_ms / 3_600_000.0) as i64).step_by(3) {
        let x = picture.x(hour * 3_600_000);
        picture.line((x, TURNS_TOP), (x, height - 30.0), r##"stroke="#eee""##);
        picture.text(x, height - 14.0, r#"text-anchor="middle""#, &format!("{hour} h"));
    }
}
