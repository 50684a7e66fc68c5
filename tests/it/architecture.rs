//! Tidiness as tests: which module may use which, how long files and functions are, where `unsafe` may stand, and that
//! README, pipelines and datasets belong together.

use clap::Parser;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use valar::cli::{Cli, Command};
use valar::config::Config;
use valar::pipeline::spec;

/// Modules and what each may use besides the vocabulary. A line is an edge that somebody meant to make.
const EDGES: &[(&str, &[&str])] = &[
    ("cache", &["engine", "storage"]),
    ("cli", &["journal", "pipeline"]),
    ("config", &["cli", "device", "format", "hub", "journal", "pipeline", "server"]),
    ("device", &["tensor"]),
    ("engine", &["model", "text", "device"]),
    ("fingerprint", &[]),
    ("format", &["storage"]),
    ("gguf", &["map", "tensor"]),
    ("grammar", &["engine", "text"]),
    ("hf", &["device", "map", "model", "tensor"]),
    ("hub", &["storage"]),
    ("journal", &["storage", "format"]),
    ("main", &["allocator", "cache", "cli", "config", "device", "journal", "pipeline", "hub", "server"]),
    ("model", &["device", "gguf", "tensor"]),
    (
        "pipeline",
        &[
            "cache",
            "config",
            "device",
            "engine",
            "fingerprint",
            "format",
            "gguf",
            "grammar",
            "hf",
            "hub",
            "journal",
            "model",
            "plan",
            "prepare",
            "storage",
            "tensor",
            "text",
        ],
    ),
    ("plan", &["text"]),
    ("prepare", &["text", "format", "hub", "engine", "grammar"]),
    ("server", &["config", "engine", "format", "grammar", "pipeline", "prepare", "store", "text"]),
    ("storage", &[]),
    ("store", &[]),
    ("text", &["allocator", "gguf"]),
];
/// Imported by all, imports nothing of the crate.
const VOCABULARY: &[&str] = &["request", "outcome", "window"];
const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// (path relative to the root, text) of every file under a folder with that ending.
fn files(folder: &str, ending: &str) -> Vec<(PathBuf, String)> {
    list(folder, ending).into_iter().map(|path| (path.clone(), fs::read_to_string(root().join(path)).unwrap())).collect()
}

/// Paths, relative to the root, of every file under a folder with that ending.
fn list(folder: &str, ending: &str) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == ending) {
                found.insert(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found
}

/// `src/engine/blocks.rs` -> `engine`, `src/journal.rs` -> `journal`.
fn module(path: &Path) -> String {
    let first = path.iter().nth(1).unwrap();
    Path::new(first).file_stem().unwrap().to_string_lossy().into_owned()
}

/// The file without its unit tests, which may use whatever they like.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap()
}

#[test]
fn modules_use_only_what_they_may() {
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        let own = module(&path);
        if own == "lib" {
            continue;
        }
        let allowed = EDGES.iter().find(|(name, _)| *name == own).map_or(&[][..], |(_, uses)| uses);
        for line in without_tests(&text).lines().filter(|l| !l.trim_start().starts_with("//")) {
            for start in line
                .match_indices("crate::")
                .map(|(i, m)| i + m.len())
                .chain(line.match_indices("valar::").map(|(i, m)| i + m.len()))
            {
                let used: String = line[start..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let fine =
                    used.is_empty() || used == own || VOCABULARY.contains(&used.as_str()) || allowed.contains(&used.as_str());
                if !fine {
                    wrong.push(format!("{}: {own} uses {used}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "edges that EDGES does not list:\n{}", wrong.join("\n"));
}

#[test]
fn the_inner_modules_know_no_outside() {
    for (path, text) in files("src", "rs") {
        if ["text", "plan", "engine", "model", "device"].contains(&module(&path).as_str()) {
            for word in ["tokio", "object_store", "async fn", "std::net"] {
                assert!(!without_tests(&text).contains(word), "{} knows {word}", path.display());
            }
        }
    }
}

#[test]
fn files_and_functions_stay_short() {
    let mut long = Vec::new();
    for (path, text) in files("src", "rs").into_iter().chain(files("tests/it", "rs")) {
        let n_lines = text.lines().count();
        if n_lines > MAX_FILE_LINES {
            long.push(format!("{}: {n_lines} lines, over {MAX_FILE_LINES}", path.display()));
        }
        for (name, n) in functions(&text) {
            if n > MAX_FUNCTION_LINES {
                long.push(format!("{}: fn {name} has {n} lines, over {MAX_FUNCTION_LINES}", path.display()));
            }
        }
    }
    assert!(long.is_empty(), "these may be two nouns:\n{}", long.join("\n"));
}

/// (name, lines) of every function, by indentation as rustfmt writes it.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let is_function = ["fn ", "pub fn ", "pub(super) fn ", "pub(crate) fn ", "unsafe fn ", "pub unsafe fn ", "async fn "];
        if !is_function.iter().any(|start| code.starts_with(start)) {
            continue;
        }
        // A declaration has no body.
        let signature_end = lines[i..].iter().position(|l| l.ends_with('{') || l.ends_with(';') || l.ends_with('}')).unwrap_or(0);
        if lines[i + signature_end].ends_with(';') {
            continue;
        }
        let name = code.split("fn ").nth(1).unwrap_or("").split(['(', '<']).next().unwrap_or("").to_owned();
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        if let Some(n) = lines[i..].iter().position(|l| *l == end) {
            found.push((name, n + 1));
        }
    }
    found
}

#[test]
fn unsafe_stands_where_it_may_and_says_why() {
    for (path, text) in files("src", "rs") {
        let may = path.starts_with("src/device") || ["src/map.rs", "src/allocator.rs"].map(Path::new).contains(&path.as_path());
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if !code.contains("unsafe ") {
                continue;
            }
            assert!(may, "{}:{} has unsafe outside src/device", path.display(), i + 1);
            let block = code.contains("unsafe {") || code.contains("unsafe impl");
            // The reason stands above the statement that the block is part of.
            let said = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY:"));
            assert!(!block || said, "{}:{}: an unsafe block without a SAFETY reason", path.display(), i + 1);
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in files("src", "rs").into_iter().chain(files("tests/it", "rs")) {
        let first = text.lines().next().unwrap_or("");
        assert!(first.starts_with("//!") || first.starts_with("#![doc"), "{} opens without a //! comment", path.display());
        for word in ["TO-DO", "FIX-ME", "to-do!(", "unimpl-emented!("].map(|word| word.replace('-', "")) {
            assert!(!text.contains(&word), "{} has a {word}", path.display());
        }
    }
}

#[test]
fn every_dataset_is_used_and_described() {
    let pipelines: String = files("pipelines", "toml").into_iter().map(|(_, text)| text).collect();
    let readme = fs::read_to_string(root().join("datasets/README.md")).unwrap();
    for ending in ["jsonl", "parquet"] {
        for path in list("datasets", ending) {
            let name = path.to_string_lossy().into_owned();
            assert!(pipelines.contains(&name), "no pipeline uses {name}");
            assert!(readme.contains(name.trim_start_matches("datasets/")), "datasets/README.md does not describe {name}");
        }
    }
}

/// Every command of the README parses, names files that are there, and makes a job that makes sense.
#[test]
fn the_readme_can_be_typed() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let blocks = readme.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).map(|line| line.split('#').next().unwrap().trim());
    let mut n_commands = 0;
    for line in lines.filter(|line| !line.is_empty() && *line != "cargo test") {
        let line = line.strip_prefix("cargo run --release -- ").map_or_else(|| line.to_owned(), |rest| format!("valar {rest}"));
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|e| panic!("{line}: {e}"));
        n_commands += 1;
        for word in line.split_whitespace().filter(|w| w.starts_with("pipelines/") || w.starts_with("datasets/")) {
            assert!(root().join(word).exists(), "{line}: {word} is not there");
        }
        let job = match &cli.command {
            Command::Run(args) => Some((&args.pipeline, args.overrides())),
            Command::Plan(args) => Some((&args.job.pipeline, args.overrides())),
            _ => None,
        };
        if let Some((pipeline, overrides)) = job {
            let pipeline = pipeline.as_deref().map(|p| root().join(p));
            let spec = spec::load(pipeline.as_deref(), &overrides).unwrap_or_else(|e| panic!("{line}: {e:#}"));
            Config::new(spec, false, true).unwrap_or_else(|e| panic!("{line}: {e:#}"));
        }
    }
    assert!(n_commands >= 8, "only {n_commands} commands found");
}

/// The README's table of keys is that of the program: each key exists, and no section is left out.
#[test]
fn the_readme_knows_the_pipeline_keys() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for key in [
        "input.files",
        "input.limit",
        "input.max_line_bytes",
        "prompt.user",
        "prompt.system",
        "prompt.text",
        "prompt.messages",
        "output.file",
        "output.prefix",
        "output.columns",
        "output.parts",
        "prompt.tokens",
        "model.name",
        "model.device",
        "model.numerics",
        "model.kv",
        "engine.memory",
        "engine.threads",
        "engine.budget_tokens",
        "engine.max_running",
        "job.seed",
        "job.window_rows",
        "job.window_bytes",
        "job.dedup",
        "engine.kind",
        "prices.hour",
    ] {
        assert!(readme.contains(key), "README does not describe {key}");
    }
}
