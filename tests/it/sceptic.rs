//! For whoever does not believe it: the real program, killed with SIGKILL at random moments over one job, on the local disk
//! and on S3, whole and in three shards, now and then taken over by another process; then the outputs are compared, byte for
//! byte, with those of an undisturbed run. The model is a tiny one, so that a run's time is its job's and not that of loading
//! weights. Takes long, so it runs only when asked:
//!
//! `VALAR_KILLS=300 cargo test --test it -- --ignored --nocapture sceptic`
//!
//! Each of the four is killed so often; each kill is logged with its phase, and with the rows that the next run computes again.
//! These are found out as any user could: a run tells how far it is at every change (`--log-format json --progress-every 0`), in
//! a file that outlives it, and the next one how many rows it found done. What was told to be committed must be found, so that
//! no more is computed again than was in flight; of rows without an outcome, no more than three windows are. As the number of
//! rows is the program's own word, tokens are counted, too: all runs of a job together generate no more of them than an
//! undisturbed one and the rows that were lost.
//!
//! A job on S3 is taken over while its run stalls; that one comes back then, and must notice. The store's lease is all that the
//! two processes have in common: one that stalls is not known to be dead, on whatever machine. On a disk a process that
//! lives keeps its lock however long it stalls, by design; another one leaves, and one that waits takes over when it is killed.

use crate::common::{Sandbox, chat_line, splitmix64, tiny_llama};
use crate::faults::S3;
use crate::s3::signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
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

/// A process, and the file that it tells in how far it is.
struct Run {
    child: Child,
    said: PathBuf,
}

/// The last that a run has told.
struct Told {
    done: u64,
    committed: u64,
    open: u64,
    running: u64,
}

impl Told {
    /// Rows between reading and commit.
    fn in_flight(&self) -> u64 {
        self.open + self.done - self.committed
    }
}

struct Job {
    sandbox: Sandbox,
    place: Place,
    random: u64,
    n_runs: usize,
    /// For each kill.
    log: Vec<Phase>,
    n_takeovers: usize,
    /// By shard.
    told: BTreeMap<String, Told>,
    /// Of the job under way: tokens that its runs have generated, and rows that were computed again.
    generated: u64,
    n_again: u64,
    /// Most rows computed again after one end of a run, and most that were in flight.
    most_again: u64,
    most_in_flight: u64,
}

const N_ROWS: usize = 15_000;
/// As rows have them.
const MAX_TOKENS: u64 = 30 + 4 * 16;
/// Rows of three windows.
const MAX_OPEN: u64 = 3 * 16;
const SETTINGS: [&str; 16] = [
    "-m",
    "tiny-llama",
    "--log-format",
    "json",
    "--progress-every",
    "0",
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

/// How long a run may take for what it must do some time.
const PATIENCE: Duration = Duration::from_mins(10);
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
        Self {
            sandbox,
            place,
            random: seed,
            n_runs: 0,
            log: Vec::new(),
            n_takeovers: 0,
            told: BTreeMap::new(),
            generated: 0,
            n_again: 0,
            most_again: 0,
            most_in_flight: 0,
        }
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

    fn start(&mut self, what: &str, more: &[&str]) -> Run {
        self.n_runs += 1;
        let said = self.sandbox.path(&format!("said-{}.log", self.n_runs));
        let child = self.command(what, more).stdout(Stdio::null()).stderr(File::create(&said).unwrap()).spawn().unwrap();
        Run { child, said }
    }

    /// Takes note of what a run has told until now: no more of what the one before it had done is lost than was in flight.
    #[expect(clippy::print_stdout, reason = "it takes long: whoever waits sees how far it is")]
    fn hear(&mut self, shard: &str, run: &Run) {
        let said = std::fs::read_to_string(&run.said).unwrap();
        let parse = |line: &str| serde_json::from_str::<Value>(line).ok();
        let number = |line: &Value, name: &str| line[name].as_u64();
        let resumed = said.lines().filter_map(parse).find_map(|line| number(&line, "resumed"));
        if let Some((resumed, before)) = resumed.and_then(|resumed| Some((resumed, self.told.remove(shard)?))) {
            let (in_flight, again) = (before.in_flight(), (before.done + before.running).saturating_sub(resumed));
            println!("  the next run finds {resumed} rows done and computes {again} again; {in_flight} were in flight");
            assert!(resumed >= before.committed, "{} rows were committed", before.committed);
            assert!(before.open <= MAX_OPEN, "{} rows were open", before.open);
            self.n_again += again;
            self.most_again = self.most_again.max(again);
            self.most_in_flight = self.most_in_flight.max(in_flight);
        }
        let told = said.lines().rev().filter_map(parse).find_map(|line| {
            let number = |name| number(&line, name);
            let told = Told {
                done: number("done")?,
                committed: number("committed")?,
                open: number("open")?,
                running: number("running")?,
            };
            Some((told, number("decode_tokens")?))
        });
        if let Some((told, generated)) = told {
            self.told.insert(shard.to_owned(), told);
            self.generated += generated;
        }
    }

    /// Lets a run go on for a while, then kills it; whether it had ended before.
    #[expect(clippy::print_stdout, reason = "it takes long: whoever waits sees how far it is")]
    fn kill(&mut self, shard: &str, mut run: Run, before: &Before) -> bool {
        // Most moments are while it decodes; some while it starts or ends.
        let (early, finalising) = (Duration::from_millis(self.below(3000)), Duration::from_micros(self.below(30_000)));
        let decoding = Duration::from_millis(self.below(1500));
        let moment = self.below(10);
        let look = LOOKS[usize::from(matches!(self.place, Place::Store(_)))];
        let start = Instant::now();
        while run.child.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE {
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
        let ended = run.child.try_wait().unwrap();
        run.child.kill().unwrap();
        run.child.wait().unwrap();
        self.hear(shard, &run);
        if let Some(status) = ended {
            assert!(matches!(status.code(), Some(0 | 3 | 4)), "it ended by itself with {status}: {}", run.said());
        } else {
            self.log.push(match () {
                () if self.is_finalising(before) => Phase::Finalising,
                () if self.n_segments() > before.n_segments => Phase::Decoding,
                () => Phase::Starting,
            });
            println!("kill {}: {:?}", self.log.len(), self.log.last());
        }
        run.forget();
        ended.is_some()
    }

    /// A run stalls, another process wants its job and gets it sooner or later; both come to a sudden end.
    fn stall_and_take_over(&mut self, shard: &str, more: &[&str]) {
        let before = self.before();
        let mut first = self.start("run", more);
        first.wait_until_it_works();
        sleep(Duration::from_millis(self.below(1500)));
        if first.child.try_wait().unwrap().is_none() {
            signal(&first.child, "-STOP");
        }
        if first.child.try_wait().unwrap().is_some() {
            self.hear(shard, &first);
            return first.forget();
        }
        let mut second = self.start("run", &[more, &["--if-running", "wait"]].concat());
        let before_second = self.before();
        if let Place::Store(_) = self.place {
            // What it does after that is in vain, and it is to find out.
            self.hear(shard, &first);
            second.wait_until_it_works();
            signal(&first.child, "-CONT");
            self.kill(shard, second, &before_second);
            let status = first.end();
            let was_taken = first.said().contains("taken this job over");
            assert!(was_taken || matches!(status.code(), Some(0 | 3)), "{status}: {}", first.said());
            self.n_takeovers += usize::from(was_taken);
            first.forget();
        } else {
            let mut third = self.start("run", more);
            let status = third.end();
            let has_left = status.code() == Some(4) && third.said().contains("another run is at this job");
            assert!(has_left || matches!(status.code(), Some(0 | 3)), "{status}: {}", third.said());
            third.forget();
            signal(&first.child, "-CONT");
            let had_ended = self.kill(shard, first, &before);
            second.wait_until_it_works();
            self.n_takeovers += usize::from(has_left && !had_ended && second.works());
            let before = self.before();
            self.kill(shard, second, &before);
        }
    }

    /// Kills until so many were killed, beginning the job anew whenever it is done; then lets it end.
    fn shake(&mut self, n_kills: usize, shards: &[&str]) -> String {
        let (expected, calm) = undisturbed(shards);
        let mut n_ended = 0;
        while self.log.len() < n_kills {
            let mut n_left = shards.len();
            for &shard in shards {
                let more: &[&str] = if shard.is_empty() { &[] } else { &["--shard", shard] };
                if self.below(8) == 0 {
                    self.stall_and_take_over(shard, more);
                } else {
                    let before = self.before();
                    let run = self.start("run", more);
                    n_left -= usize::from(self.kill(shard, run, &before));
                }
            }
            if n_left == 0 || self.log.len() >= n_kills {
                self.end(shards, &expected, calm);
                n_ended += 1;
            }
        }
        let mut phases = BTreeMap::new();
        self.log.iter().for_each(|phase| *phases.entry(*phase).or_insert(0) += 1);
        let n_of = |phase| phases.get(&phase).copied().unwrap_or_default();
        // A few are no sample.
        if n_kills >= 100 {
            let n_takeovers = self.n_takeovers;
            assert!(2 * n_of(Phase::Decoding) >= self.log.len(), "too few where it hurts: {phases:?}");
            assert!(n_of(Phase::Finalising) > 0 && n_takeovers > 0, "{phases:?}, {n_takeovers} takeovers");
        }
        format!(
            "{} kills: {phases:?}; {} takeovers; {n_ended} jobs ended, each right; after a kill at most {} rows were computed \
             again, and {} in flight",
            self.log.len(),
            self.n_takeovers,
            self.most_again,
            self.most_in_flight
        )
    }

    /// Runs to the end, killing the last run now and then, compares, and clears the place.
    fn end(&mut self, shards: &[&str], expected: &[Vec<u8>; 2], calm: u64) {
        for &shard in shards {
            self.expect("run", shard);
        }
        if shards.len() > 1 {
            let before = self.before();
            let run = self.start("merge", &[]);
            self.kill("", run, &before);
            self.expect("merge", "");
        }
        let (generated, n_again) = (self.generated, self.n_again);
        assert!(generated <= calm + MAX_TOKENS * n_again, "{generated} tokens, not {calm}, with {n_again} rows again");
        (self.generated, self.n_again) = (0, 0);
        self.told.clear();
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

    fn expect(&mut self, what: &str, shard: &str) {
        let more: &[&str] = if shard.is_empty() { &[] } else { &["--shard", shard] };
        let mut run = self.start(what, &[more, &["--if-running", "wait"]].concat());
        let status = run.end();
        assert!(matches!(status.code(), Some(0 | 3)), "{status}: {}", run.said());
        self.hear(shard, &run);
        run.forget();
    }
}

impl Run {
    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap()
    }

    /// Whether it has told how far the job was that it goes on with.
    fn works(&self) -> bool {
        self.said().contains("\"resumed\":")
    }

    /// Waits until it works, or has ended.
    fn wait_until_it_works(&mut self) {
        let start = Instant::now();
        while !self.works() && self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "it does not get on: {}", self.said());
            sleep(LOOKS[0]);
        }
    }

    /// Waits until it ends by itself.
    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end: {}", self.said());
            sleep(LOOKS[0]);
        }
    }

    /// Its file may be large.
    fn forget(self) {
        std::fs::remove_file(self.said).unwrap();
    }
}

/// The files of a job that nobody disturbs, whole, and how many tokens are generated for it in these shards.
fn undisturbed(shards: &[&str]) -> ([Vec<u8>; 2], u64) {
    let mut job = Job::new(Place::Disk, 0);
    job.expect("run", "");
    let files = ["out.jsonl", "out.errors.jsonl"].map(|name| std::fs::read(job.sandbox.path(name)).unwrap());
    if shards.len() > 1 {
        job = Job::new(Place::Disk, 0);
        for shard in shards {
            job.expect("run", shard);
        }
    }
    (files, job.generated)
}

fn n_kills() -> usize {
    std::env::var("VALAR_KILLS").ok().map_or(300, |text| text.parse().expect("VALAR_KILLS is a number"))
}

const WHOLE: [&str; 1] = [""];
const SHARDS: [&str; 3] = ["0/3", "1/3", "2/3"];

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_the_disk() {
    println!("{}", Job::new(Place::Disk, 1).shake(n_kills(), &WHOLE));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_the_disk_in_shards() {
    println!("{}", Job::new(Place::Disk, 2).shake(n_kills(), &SHARDS));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_s3() {
    println!("{}", Job::new(Place::Store(S3::start()), 3).shake(n_kills(), &WHOLE));
}

#[test]
#[ignore = "takes long: hundreds of kills"]
fn killed_on_s3_in_shards() {
    println!("{}", Job::new(Place::Store(S3::start()), 4).shake(n_kills(), &SHARDS));
}
