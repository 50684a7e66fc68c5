//! How fast the `tokenizers` crate alone makes ids of the prompts of a request file, on all cores: the yardstick beside
//! which `tests/bench/pipeline.sh` says how fast the pipeline is on the same machine.
//!
//! usage: tokenizers-alone TOKENIZER_JSON REQUESTS_JSONL

use rayon::prelude::*;
use std::time::Instant;
use tokenizers::Tokenizer;

fn main() {
    let [tokenizer, requests] = [1, 2].map(|i| std::env::args().nth(i).expect("two files"));
    let tokenizer = Tokenizer::from_file(tokenizer).expect("a tokenizer.json");
    let requests = std::fs::read_to_string(requests).expect("a request file");
    let prompt = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a JSON line");
        line["body"]["prompt"].as_str().expect("a text prompt").to_owned()
    };
    let prompts: Vec<String> = requests.par_lines().map(prompt).collect();
    let best = (0..3).map(|_| {
        let start = Instant::now();
        let n_tokens: usize = prompts.par_iter().map(|text| tokenizer.encode_fast(text.as_str(), false).unwrap().len()).sum();
        (prompts.len() as f64 / start.elapsed().as_secs_f64(), n_tokens)
    });
    let (rows, n_tokens) = best.max_by(|a, b| a.0.total_cmp(&b.0)).expect("three rounds");
    println!("the tokenizers crate alone: {rows:.0} rows/s, of {:.0} tokens", n_tokens as f64 / prompts.len() as f64);
}
