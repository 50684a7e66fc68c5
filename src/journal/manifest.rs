//! What job a journal belongs to. Knows how to tell two jobs apart in words; does not decide what to do about it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The form of journals this program reads and writes.
const FORMAT_VERSION: u32 = 5;

/// All that any form of a manifest is known to have.
#[derive(Deserialize)]
struct Form {
    format_version: u32,
}

/// The journal is of another form.
#[derive(Debug, thiserror::Error)]
#[error("it has form {0}; this program knows form {known}", known = FORMAT_VERSION)]
struct OtherForm(u32);

/// What identifies a job, and what its outputs depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The form of the journal; see [`Manifest::FORMAT_VERSION`].
    pub format_version: u32,
    /// The program that began the job.
    pub valar_version: String,
    /// Identifies the job: equal for equal inputs, pipeline, seed and model. Every segment carries it.
    pub job_fingerprint: String,
    /// When the job began, seconds since 1970. Outputs that state a time state this one.
    pub created_unix_s: u64,
    /// Seeds of rows that have none derive from it.
    pub job_seed: u64,
    /// What the bits depend on: weights, tokenizer, kernels, device.
    pub model_fingerprint: String,
    /// The pipeline with all defaults filled in, as TOML.
    pub pipeline: String,
    /// The input files, in order.
    pub inputs: Vec<Input>,
    /// The rows of all inputs that this journal is of.
    pub rows: Range<u64>,
    /// Hash of the report of the finished job whose outputs this one replaces; `None` if it replaces none.
    pub replaces: Option<String>,
    /// How many of these rows were errors in the finished job that this one takes all its other rows from; `None` if it
    /// computes all rows itself.
    pub retries: Option<u64>,
    /// What each input was when it was hashed, as its store says it: one that is still that need not be hashed again. No part
    /// of what makes two jobs the same.
    #[serde(default)]
    pub versions: Vec<String>,
}

/// One of the equal parts that a job's rows are cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shard {
    /// Which, from 0.
    pub index: u32,
    /// Of how many.
    pub of: u32,
}

impl Shard {
    /// Its rows of a job with so many.
    pub fn rows(self, n_rows: u64) -> Range<u64> {
        let cut = |i: u32| (u128::from(n_rows) * u128::from(i) / u128::from(self.of)) as u64;
        cut(self.index)..cut(self.index + 1)
    }

    /// The name of its directory in the job's.
    pub fn dir_name(self) -> String {
        format!("shard-{:05}-of-{:05}", self.index, self.of)
    }

    /// The shard whose directory has that name.
    pub fn of_dir_name(name: &str) -> Option<Self> {
        let (index, of) = name.strip_prefix("shard-")?.split_once("-of-")?;
        let shard: Self = format!("{index}/{of}").parse().ok()?;
        (shard.dir_name() == name).then_some(shard)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (index, of) = text.split_once('/').ok_or("expected I/N, such as 0/3")?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is not a number"));
        let shard = Self { index: number(index)?, of: number(of)? };
        if shard.index >= shard.of {
            return Err(format!("shards of {of} are 0/{of} to {}/{of}", i64::from(shard.of) - 1));
        }
        Ok(shard)
    }
}

/// One input file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// As the user named it.
    pub url: String,
    /// Size, bytes.
    pub n_bytes: u64,
    /// Hash of its content, hexadecimal.
    pub blake3: String,
    /// Rows in it.
    pub n_rows: u64,
}

impl Manifest {
    /// What [`Manifest::format_version`] must be.
    pub const FORMAT_VERSION: u32 = FORMAT_VERSION;

    /// Of the text that stands at `url`; an error names it, and says what helps.
    pub(super) fn parse_at(text: &[u8], url: &str) -> Result<Self> {
        Self::parse(text).map_err(|error| {
            let what = match error.downcast_ref() {
                Some(OtherForm(form)) if *form < FORMAT_VERSION => "was written by an older valar: finish it with that one, or",
                Some(OtherForm(_)) => "was written by a newer valar: finish it with that one, or",
                None => "is damaged:",
            };
            error.context(format!("{url} {what} throw it away with --restart"))
        })
    }

    fn parse(text: &[u8]) -> Result<Self> {
        // Another form may have other fields.
        let Form { format_version } = serde_json::from_slice(text)?;
        ensure!(format_version == FORMAT_VERSION, OtherForm(format_version));
        let manifest: Self = serde_json::from_slice(text)?;
        let n_inputs = manifest.inputs.iter().try_fold(0u64, |sum, input| sum.checked_add(input.n_rows));
        ensure!(n_inputs.is_some(), "inputs: the sum of n_rows is over {}", u64::MAX);
        let Range { start, end } = manifest.rows;
        ensure!(start <= end, "rows: {start} to {end} is no range");
        let n_retried = manifest.retries.unwrap_or(0);
        ensure!(n_retried <= end - start, "retries: {n_retried} of {} rows", end - start);
        Ok(manifest)
    }

    pub(super) fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("strings and numbers are JSON");
        text.push('\n');
        text
    }

    /// Rows of all inputs.
    pub fn n_rows(&self) -> u64 {
        self.inputs.iter().map(|input| input.n_rows).sum()
    }

    /// Hash of all inputs' content and rows, hexadecimal.
    pub fn inputs_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for Input { blake3, n_rows, .. } in &self.inputs {
            hasher.update(blake3.as_bytes()).update(&n_rows.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// What is different in `now`, a line each, for people; empty if it is the same job. When a job began does not
    /// count.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, old: &str, new: &str| {
            if old != new {
                found.push(format!("{what}: {old} -> {new}"));
            }
        };
        compare("valar version", &self.valar_version, &now.valar_version);
        compare("model fingerprint", &self.model_fingerprint, &now.model_fingerprint);
        compare("job seed", &self.job_seed.to_string(), &now.job_seed.to_string());
        found.extend(pipeline_differences(&self.pipeline, &now.pipeline));
        found.extend(input_differences(&self.inputs, &now.inputs));
        match (self.retries, now.retries) {
            (Some(_), None) => {
                found.push("it runs the errors of a finished job again: valar retry --errors goes on with it".into());
            }
            (None, Some(_)) => found.push("it is no retry of a finished job's errors".into()),
            _ => {}
        }
        if found.is_empty() && self.rows != now.rows {
            found.push(format!("rows: {:?} -> {:?}", self.rows, now.rows));
        }
        if found.is_empty() && self.job_fingerprint != now.job_fingerprint {
            found.push(format!("job fingerprint: {} -> {}", self.job_fingerprint, now.job_fingerprint));
        }
        found
    }
}

/// The name of the manifest that an epoch has written.
pub(super) fn name_of(epoch: u32) -> String {
    format!("manifest-{epoch:05}.json")
}

/// The epoch that wrote the manifest called `name`; `None` if it is not a manifest's name.
pub(super) fn epoch_of(name: &str) -> Option<u32> {
    let epoch = name.strip_prefix("manifest-")?.strip_suffix(".json")?.parse().ok()?;
    (name_of(epoch) == name).then_some(epoch)
}

fn input_differences(old: &[Input], new: &[Input]) -> Vec<String> {
    let by_url = |inputs: &[Input]| inputs.iter().map(|input| (input.url.clone(), input.clone())).collect::<BTreeMap<_, _>>();
    let (by_old, by_new) = (by_url(old), by_url(new));
    let mut found = Vec::new();
    for url in by_old.keys().chain(by_new.keys()).collect::<BTreeSet<_>>() {
        match (by_old.get(url), by_new.get(url)) {
            (Some(old), Some(new)) if old == new => {}
            (Some(old), Some(new)) if old.n_bytes != new.n_bytes => {
                found.push(format!("input {url} changed: {} bytes -> {}", old.n_bytes, new.n_bytes));
            }
            (Some(old), Some(new)) => found.push(format!("input {url} changed: blake3 {} -> {}", old.blake3, new.blake3)),
            (None, _) => found.push(format!("input {url} is new")),
            (_, None) => found.push(format!("input {url} is no longer one")),
        }
    }
    if found.is_empty() && old != new {
        found.push("the inputs come in another order".to_owned());
    }
    found
}

fn pipeline_differences(old: &str, new: &str) -> Vec<String> {
    if old == new {
        return Vec::new();
    }
    let (Ok(by_old), Ok(by_new)) = (settings(old), settings(new)) else { return vec!["the pipeline changed".to_owned()] };
    let mut found = Vec::new();
    for key in by_old.keys().chain(by_new.keys()).collect::<BTreeSet<_>>() {
        let show = |value: Option<&String>| value.map_or("not set", String::as_str).to_owned();
        let (old, new) = (by_old.get(key), by_new.get(key));
        if old != new {
            found.push(format!("pipeline: {key} {} -> {}", show(old), show(new)));
        }
    }
    if found.is_empty() {
        found.push("the pipeline is written differently".to_owned());
    }
    found
}

/// The settings of a TOML text by their dotted keys.
fn settings(text: &str) -> Result<BTreeMap<String, String>, toml::de::Error> {
    fn gather(prefix: &str, value: &toml::Value, into: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    gather(&key, value, into);
                }
            }
            value => {
                into.insert(prefix.to_owned(), value.to_string());
            }
        }
    }
    let mut found = BTreeMap::new();
    gather("", &toml::Value::Table(text.parse()?), &mut found);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let input = |url: &str| Input { url: url.to_owned(), n_bytes: 7, blake3: format!("hash of {url}"), n_rows: 3 };
        Manifest {
            format_version: FORMAT_VERSION,
            valar_version: "0.1.0".to_owned(),
            job_fingerprint: "j1".to_owned(),
            created_unix_s: 1,
            job_seed: 0,
            model_fingerprint: "m1".to_owned(),
            pipeline: "model = \"a\"\n[sampling]\ntemperature = 0.0\nstop = [\"x\"]\n".to_owned(),
            inputs: vec![input("a.jsonl"), input("b.jsonl")],
            rows: 0..6,
            replaces: None,
            retries: None,
            versions: Vec::new(),
        }
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Manifest), wanted: &[&str]) {
        let mut now = manifest();
        change(&mut now);
        assert_eq!(manifest().differences(&now), wanted);
    }

    #[test]
    fn differences_are_told_in_words() {
        check(|_| {}, &[]);
        check(|m| m.created_unix_s = 2, &[]);
        check(|m| m.job_fingerprint = "j2".to_owned(), &["job fingerprint: j1 -> j2"]);
        check(|m| m.job_seed = 5, &["job seed: 0 -> 5"]);
        check(
            |m| m.pipeline = "model = \"a\"\nmax_tokens = 5\n[sampling]\ntemperature = 0.7\nstop = [\"x\"]".to_owned(),
            &["pipeline: max_tokens not set -> 5", "pipeline: sampling.temperature 0.0 -> 0.7"],
        );
        check(|m| m.inputs[0].blake3 = "new".to_owned(), &["input a.jsonl changed: blake3 hash of a.jsonl -> new"]);
        check(|m| m.inputs[0].n_bytes = 9, &["input a.jsonl changed: 7 bytes -> 9"]);
        check(|m| m.retries = Some(1), &["it is no retry of a finished job's errors"]);
        check(|m| m.inputs.swap(0, 1), &["the inputs come in another order"]);
        check(|m| m.inputs[1].url = "c.jsonl".to_owned(), &["input b.jsonl is no longer one", "input c.jsonl is new"]);
    }

    #[test]
    fn shards_are_a_cut_of_the_rows() {
        for (n_rows, of) in [(0, 1), (0, 3), (1, 3), (10, 3), (7, 7), (1_000_003, 64)] {
            let rows: Vec<u64> = (0..of).flat_map(|index| Shard { index, of }.rows(n_rows)).collect();
            assert_eq!(rows, (0..n_rows).collect::<Vec<_>>(), "{n_rows} rows in {of}");
            let sizes = (0..of).map(|index| Shard { index, of }.rows(n_rows).count());
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
        let shard: Shard = "2/16".parse().unwrap();
        assert_eq!((shard.to_string().as_str(), Shard::of_dir_name(&shard.dir_name())), ("2/16", Some(shard)));
        for wrong in ["", "1", "3/3", "0/0", "-1/3", "a/3", "1/3/5"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
        assert_eq!(Shard::of_dir_name("shard-1-of-3"), None);
    }

    #[test]
    fn comes_back_from_json_and_other_forms_are_refused() {
        let json = manifest().to_json();
        assert_eq!(Manifest::parse(json.as_bytes()).unwrap(), manifest());
        let form = |n: u32| format!("\"format_version\": {n}");
        let said = |text: &str| format!("{:#}", Manifest::parse_at(text.as_bytes(), "at/manifest").unwrap_err());
        let other = |n: u32| said(&json.replace(&form(FORMAT_VERSION), &form(n)));
        assert!(other(FORMAT_VERSION - 1).contains("at/manifest was written by an older valar: finish it with that one, or"));
        assert!(other(FORMAT_VERSION - 1).contains(&format!("form {}", FORMAT_VERSION - 1)));
        assert!(other(FORMAT_VERSION + 1).contains("by a newer valar"));
        // It had not all of today's fields, or others.
        let said_of_old = said("{\"format_version\": 1, \"rows\": 7}");
        assert!(said_of_old.contains("by an older valar") && said_of_old.contains("form 1;"), "{said_of_old}");
        assert!(said(&json[..json.len() / 2]).contains("at/manifest is damaged: throw it away with --restart"));
    }
}
