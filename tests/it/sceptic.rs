//! For whoever does not believe it: the real program, killed with SIGKILL at random moments over one job, on the local disk
//! and on S3, whole and in three shards, now and then taken over by another process while the first one stalls; then the
//! outputs are compared, byte for byte, with those of an undisturbed run. The model is a tiny one, so that a run's time is its
//! job's and not that of loading weights. Takes long, so it runs only when asked:
//!
//! `VALAR_KILLS=300 cargo test --test it -- --ignored --nocapture sceptic`
//!
//! Each of the four is killed so often; each kill is logged with its phase.

use crate::common::{Sandbox, chat_line, splitmix64, tiny_llama};
use crate::faults::S3;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where the outputs are, and the state.
enum Place {
    Disk,
    Store(S3),
}

/// What there was before a run.
struct Before {
    n_segments: usize,
    traces: BTreeSet<String>,
}

/// Where a run was when it was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// No outcome was committed in this run.
    Starting,
    /// Outcomes were being committed.
    Decoding,
    /// The files were being written, or were there and their state was being removed.
    Finalising,
}

struct Job {
    sandbox: Sandbox,
    place: Place,
    random: u64,
    /// For each kill.
    log: Vec<Phase>,
}

const N_ROWS: usize = 15_000;
const SETTINGS: [&str; 13] = [
    "-m",
    "tiny-llama",
    "--quiet",
    "--set",
    "engine.max_running=2",
    "--set",
    "engine.threads=1",
    "--set",
    "job.window_rows=16",
    "--set",
    "job.seed=3",
    "--lease",
    "1",
];

/// Between two looks at a run: the server of the store is not fast.
const LOOKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];

impl Job {
    fn new(place: Place, seed: u64) -> Self {
        let sandbox = Sandbox::new();
        let line = |i: usize| {
            let said = if i % 4 == 3 { i % 16 } else { i };
            let extra = json!({"max_tokens": 30 + 4 * (i % 17), "temperature": if i.is_multiple_of(3) { 1.0 } else { 0.0 }, "ignore_eos": true});
            chat_line(&format!("row-{i}"), &format!("tell me about {said}."), extra)
        };
        let mut lines: Vec<String> = (0..N_ROWS).map(line).collect();
        tiny_llama(&sandbox);
        lines.insert(20, "broken".to_owned());
        sandbox.write("in.jsonl", lines.join("\n"));
        Self { sandbox, place, random: seed, log: Vec::new() }
    }

    fn below(&mut self, end: u64) -> u64 {
        splitmix64(&mut self.random) % end
    }

    fn command(&self, what: &str, more: &[&str]) -> Command {
        let output = match &self.place {
            Place::Disk => "out.jsonl",
            Place::Store(_) => "s3://bucket/out.jsonl",
        };
        let mut command = self.sandbox.command(&[&[what, "-i", "in.jsonl", "-o", output], &SETTINGS[..], more].concat());
        if let Place::Store(server) = &self.place {
            command
                .envs([("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1")])
                .envs([("AWS_ALLOW_HTTP", "true"), ("NO_PROXY", "127.0.0.1")])
                .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", server.port));
        }
        command
    }

    fn names(&self) -> Vec<String> {
        match &self.place {
            Place::Store(server) => server.keys(),
            Place::Disk => {
                let mut names = Vec::new();
                let mut folders = vec![self.sandbox.path(".")];
                while let Some(folder) = folders.pop() {
                    // What is deleted meanwhile is not there.
                    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                        match entry.file_type() {
                            Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                            _ => names.push(entry.path().to_string_lossy().into_owned()),
                        }
                    }
                }
                names
            }
        }
    }

    fn n_segments(&self) -> usize {
        self.names().iter().filter(|name| name.contains("/seg-")).count()
    }

    /// What shows that files are being written or were: a killed run may have left some, which the next one removes.
    fn traces(&self) -> BTreeSet<String> {
        let names = self.names().into_iter().filter(|name| name.contains("out.jsonl") || name.contains("out.errors.jsonl"));
        match &self.place {
            Place::Store(server) => names.chain(server.uploads()).collect(),
            Place::Disk => {
                let with_time = |name: String| {
                    let written = std::fs::metadata(&name).and_then(|found| found.modified());
                    format!("{name} {:?}", written.ok())
                };
                names.map(with_time).collect()
            }
        }
    }

    /// What there is before a run.
    fn before(&self) -> Before {
        Before { n_segments: self.n_segments(), traces: self.traces() }
    }

    fn is_finalising(&self, before: &Before) -> bool {
        !self.traces().is_subset(&before.traces)
    }

    /// Lets a run go on for a while, then kills it; whether it had ended before.
    #[expect(clippy::print_stdout, reason = "it takes long: whoever waits sees how far it is")]
    fn kill(&mut self, mut child: Child, before: &Before) -> bool {
        // Most moments are while it decodes; some while it starts or ends.
        let (early, finalising) = (Duration::from_millis(self.below(3000)), Duration::from_micros(self.below(30_000)));
        let decoding = Duration::from_millis(self.below(1500));
        let moment = self.below(10);
        let look = LOOKS[usize::from(matches!(self.place, Place::Store(_)))];
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_mins(5) {
            let (is_there, then) = match moment {
                0 => (true, early),
                1 | 2 => (self.is_finalising(before), finalising),
                _ => (self.n_segments() > before.n_segments, decoding),
            };
            if is_there {
                sleep(then);
                break;
            }
            sleep(look);
        }
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if let Some(status) = ended {
            assert!(matches!(status.code(), Some(0 | 3 | 4)), "it ended by itself with {status}");
        }
        if ended.is_none() {
            self.log.push(match () {
                () if self.is_finalising(before) => Phase::Finalising,
                () if self.n_segments() > before.n_segments => Phase::Decoding,
                () => Phase::Starting,
            });
            println!("kill {}: {:?}", self.log.len(), self.log.last());
        }
        ended.is_some()
    }

    /// A run stalls, another process takes the job over and is killed, and the first one comes back for a moment.
    fn stall_and_take_over(&mut self, more: &[&str]) {
        let signal = |child: &Child, name: &str| {
            Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
        };
        let before = self.before();
        let mut first = self.command("run", more).stderr(Stdio::null()).spawn().unwrap();
        let pause = Duration::from_millis(500 + self.below(1500));
        sleep(pause);
        signal(&first, "-STOP");
        let second = self.command("run", &[more, &["--if-running", "wait"]].concat()).stderr(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(1500));
        signal(&first, "-CONT");
        self.kill(second, &before);
        first.kill().unwrap();
        first.wait().unwrap();
    }

    /// Kills until so many were killed, beginning the job anew whenever it is done; then lets it end.
    fn shake(&mut self, n_kills: usize, shards: &[&str], expected: &[Vec<u8>; 2]) -> String {
        let mut n_ended = 0;
        while self.log.len() < n_kills {
            let mut n_left = shards.len();
            for &shard in shards {
                let more: &[&str] = if shard.is_empty() { &[] } else { &["--shard", shard] };
                if self.below(8) == 0 && matches!(self.place, Place::Store(_)) {
                    self.stall_and_take_over(more);
                } else {
                    let before = self.before();
                    let child = self.command("run", more).stderr(Stdio::null()).spawn().unwrap();
                    n_left -= usize::from(self.kill(child, &before));
                }
            }
            if n_left == 0 || self.log.len() >= n_kills {
                self.end(shards, expected);
                n_ended += 1;
            }
        }
        let mut phases = BTreeMap::new();
        self.log.iter().for_each(|phase| *phases.entry(*phase).or_insert(0) += 1);
        let n_of = |phase| phases.get(&phase).copied().unwrap_or_default();
        assert!(2 * n_of(Phase::Decoding) >= self.log.len() && n_of(Phase::Finalising) > 0, "too few where it hurts: {phases:?}");
        format!("{} kills: {phases:?}; {n_ended} jobs ended, each right", self.log.len())
    }

    /// Runs to the end, killing the last run now and then, compares, and clears the place.
    fn end(&mut self, shards: &[&str], expected: &[Vec<u8>; 2]) {
        for &shard in shards {
            let more: &[&str] = if shard.is_empty() { &[] } else { &["--shard", shard] };
            self.expect("run", more);
        }
        if shards.len() > 1 {
            let before = self.before();
            let child = self.command("merge", &[]).stderr(Stdio::null()).spawn().unwrap();
            self.kill(child, &before);
            self.expect("merge", &[]);
        }
        for (name, expected) in ["out.jsonl", "out.errors.jsonl"].iter().zip(expected) {
            let content = match &self.place {
                Place::Disk => std::fs::read(self.sandbox.path(name)).unwrap(),
                Place::Store(server) => server.get(name),
            };
            assert!(content == *expected, "{name} differs after {:?}", self.log);
        }
        for name in ["out.jsonl", "out.errors.jsonl", "out.report.json"] {
            match &self.place {
                Place::Disk => std::fs::remove_file(self.sandbox.path(name)).unwrap(),
                Place::Store(server) => server.delete(name),
            }
        }
        assert_eq!(self.n_segments(), 0, "state is left");
    }

    fn expect(&self, what: &str, more: &[&str]) {
        let output = self.command(what, &[more, &["--if-running", "wait"]].concat()).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The files of a run that nobody disturbs.
fn undisturbed() -> [Vec<u8>; 2] {
    let job = Job::new(Place::Disk, 0);
    job.expect("run", &[]);
    ["out.jsonl", "out.errors.jsonl"].map(|name| std::fs::read(job.sandbox.path(name)).unwrap())
}

fn n_kills() -> usize {
    std::env::var("VALAR_KILLS").ok().map_or(300, |text| text.parse().expect("VALAR_KILLS is a number"))
}

const WHOLE: [&str; 1] = [""];
const SHARDS: [&str; 3] = ["0/3", "1/3", "2/3"];

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_the_disk() {
    let expected = undisturbed();
    println!("{}", Job::new(Place::Disk, 1).shake(n_kills(), &WHOLE, &expected));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_the_disk_in_shards() {
    let expected = undisturbed();
    println!("{}", Job::new(Place::Disk, 2).shake(n_kills(), &SHARDS, &expected));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_s3() {
    let expected = undisturbed();
    println!("{}", Job::new(Place::Store(S3::start()), 3).shake(n_kills(), &WHOLE, &expected));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_s3_in_shards() {
    let expected = undisturbed();
    println!("{}", Job::new(Place::Store(S3::start()), 4).shake(n_kills(), &SHARDS, &expected));
}
