//! Outputs in parts: together they are the file that the job would have written; whoever reads by the list finds the old
//! state or the new one, whatever is killed; another job reads exactly what is listed.

use crate::common::{Sandbox, chat_line};
use crate::dying::{Death, DyingStore};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;
use valar::format::{PartList, PartSize, Parts, Records, Sink};
use valar::storage::{Location, Storage};

fn rows(n: usize) -> String {
    (0..n).map(|i| json!({"id": i, "q": format!("Row {}?", i % 40), "deep": [{"x": i}]}).to_string() + "\n").collect()
}

const DATASET: [&str; 6] =
    ["--quiet", "--engine=null", "--set=prompt.text={{ q }}", "--set=sampling.max_tokens=2", "--set=job.seed=3", "-i"];

fn job<'a>(command: &[&'a str], input: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [command, &DATASET, &[input, "-o", output], more].concat()
}

/// The list of a folder, which must hold the listed parts and nothing else.
#[track_caller]
fn list(sandbox: &Sandbox, folder: &str) -> PartList {
    let list: PartList = serde_json::from_str(&sandbox.read(&format!("{folder}/_SUCCESS"))).unwrap();
    let there: BTreeSet<String> =
        fs::read_dir(sandbox.path(folder)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let wanted: BTreeSet<String> = list.parts.iter().map(|part| part.name.clone()).chain(["_SUCCESS".to_owned()]).collect();
    assert_eq!(there, wanted, "{folder}");
    for part in &list.parts {
        let content = fs::read(sandbox.path(&format!("{folder}/{}", part.name))).unwrap();
        assert_eq!((content.len() as u64, blake3::hash(&content).to_hex().to_string()), (part.bytes, part.blake3.clone()));
    }
    list
}

/// All parts, one after the other.
fn joined(sandbox: &Sandbox, folder: &str) -> String {
    list(sandbox, folder).parts.iter().map(|part| sandbox.read(&format!("{folder}/{}", part.name))).collect()
}

fn records(files: &[Location]) -> Vec<Value> {
    let (mut source, mut found) = (Records::open(&Storage::new().unwrap(), files, None).unwrap(), Vec::new());
    while let Some(chunk) = source.next_chunk().unwrap() {
        found.extend(chunk.iter().map(|text| serde_json::from_slice::<Value>(text).unwrap()));
    }
    found
}

#[test]
fn parts_are_what_one_file_would_be() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows(250) + "broken\n" + &rows(50));
    sandbox.expect(&job(&["run"], "in.jsonl", "one.jsonl", &[]), 3);
    let parts = ["--parts", "64"];
    sandbox.expect(&job(&["run"], "in.jsonl", "out.jsonl/", &parts), 3);
    assert_eq!(list(&sandbox, "out.jsonl").parts.iter().map(|part| part.rows).collect::<Vec<_>>(), [64, 64, 64, 64, 44]);
    assert!(joined(&sandbox, "out.jsonl") == sandbox.read("one.jsonl"), "the parts are not the file");
    assert!(sandbox.read("out.errors.jsonl") == sandbox.read("one.errors.jsonl"));
    assert!(!sandbox.path("out.job").exists());
    let shown: Value = serde_json::from_slice(&sandbox.run(&["status", "out.jsonl", "--json"]).stdout).unwrap();
    assert!(shown["state"] == "finished" && shown["rows"] == 301, "{shown}");
    // A finished job is not run again, and --restart replaces all of it.
    let before = list(&sandbox, "out.jsonl");
    sandbox.expect(&job(&["run"], "in.jsonl", "out.jsonl", &parts), 3);
    assert_eq!(list(&sandbox, "out.jsonl"), before);
    sandbox.expect(&job(&["run"], "in.jsonl", "out.jsonl", &["--parts=9KiB", "--restart"]), 3);
    let after = list(&sandbox, "out.jsonl");
    assert!(after.parts.len() > 5 && after.parts.iter().all(|part| part.bytes <= 9 << 10), "{after:?}");
    assert!(after.parts.iter().all(|part| before.parts.iter().all(|other| other.name != part.name)));
    assert!(joined(&sandbox, "out.jsonl") == sandbox.read("one.jsonl"), "the parts are not the file");

    sandbox.expect(&job(&["run"], "in.jsonl", "one.parquet", &[]), 3);
    sandbox.expect(&job(&["run"], "in.jsonl", "out.parquet", &["--restart", "--set=output.parts=100"]), 3);
    let at = |name: &str| Location::parse(sandbox.path(name).to_str().unwrap()).unwrap();
    let files: Vec<_> =
        list(&sandbox, "out.parquet").parts.iter().map(|part| at(&format!("out.parquet/{}", part.name))).collect();
    assert!(files.len() == 3 && records(&files) == records(&[at("one.parquet")]), "{files:?}");

    // A job that reads them finds what one that reads the file finds; what nobody lists is not read.
    sandbox.write("out.jsonl/part-00000-0123456789ab.jsonl", "{\"q\": \"stray\"}\n");
    let again = ["--set=output.prefix=again_"];
    for ending in ["jsonl", "parquet"] {
        let (one, folder) = (format!("one.{ending}"), format!("out.{ending}"));
        sandbox.expect(&job(&["run"], &one, "from_one.jsonl", &[&again[..], &["--restart"]].concat()), 0);
        sandbox.expect(&job(&["run"], &folder, "from_parts.jsonl", &[&again[..], &["--restart"]].concat()), 0);
        assert!(sandbox.read("from_parts.jsonl") == sandbox.read("from_one.jsonl"), "{ending}");
    }
    let name = format!("out.jsonl/{}", after.parts[1].name);
    let text = sandbox.read(&name).replacen("Row", "Raw", 1);
    sandbox.write(&name, text);
    let said = sandbox.expect(&job(&["run"], "out.jsonl", "changed.jsonl", &again), 1);
    assert!(said.contains(&name) && said.contains("it was changed"), "{said}");
    fs::remove_file(sandbox.path("out.jsonl/_SUCCESS")).unwrap();
    assert!(sandbox.expect(&job(&["run"], "out.jsonl", "open.jsonl", &again), 1).contains("not published them yet"));
}

#[test]
fn no_rows_are_one_part() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", "broken\n");
    for output in ["out.jsonl", "out.parquet"] {
        sandbox.expect(&job(&["run"], "in.jsonl", output, &["--parts=5", "--restart"]), 3);
        assert_eq!(list(&sandbox, output).parts.iter().map(|part| part.rows).collect::<Vec<_>>(), [0]);
    }
}

#[test]
fn what_can_not_be_a_folder_of_parts_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows(20));
    sandbox.expect(&job(&["run"], "in.jsonl", "one.jsonl", &[]), 0);
    sandbox.expect(&job(&["run"], "in.jsonl", "out.jsonl", &["--parts=6"]), 0);
    let said = |output: &str, more: &[&str], code| sandbox.expect(&job(&["run"], "in.jsonl", output, more), code);
    assert!(said("one.jsonl", &["--parts=6", "--restart"], 1).contains("one.jsonl is one file"));
    assert!(said("out.jsonl", &["--restart"], 1).contains("with --parts"));
    assert!(said("out", &["--parts=6"], 1).contains("can't tell the format"));
    for (parts, why) in [("0", "at least 1 row"), ("5 parsecs", "unknown unit"), ("10B", "1KiB"), ("-1", "unknown unit")] {
        let said = said("new.jsonl", &[&format!("--parts={parts}")], 2);
        assert!(said.contains("output.parts") && said.contains(why), "{said}");
    }
    let unit = said("new.jsonl", &["--set=output.parts=\"100\""], 2);
    assert!(unit.contains("has no unit"), "{unit}");
    fs::create_dir(sandbox.path("mine.jsonl")).unwrap();
    sandbox.write("mine.jsonl/data.jsonl", "{}\n");
    let mixed = said("mine.jsonl", &["--parts=6", "--restart"], 1);
    assert!(mixed.contains("holds data.jsonl"), "{mixed}");
    let said = sandbox.expect(&job(&["run"], "out.jsonl", "out.jsonl", &["--parts=6", "--restart"]), 1);
    assert!(said.contains("is an input"), "{said}");
    assert_eq!(list(&sandbox, "out.jsonl").rows, 20);
}

#[test]
fn shards_and_retries_write_parts() {
    let sandbox = Sandbox::new();
    let line = |i: usize| {
        let text = if i % 5 == 2 { format!("Long {i}. {}", "la ".repeat(700)) } else { format!("Short {i}.") };
        chat_line(&format!("row-{i}"), &text, json!({"max_tokens": 2})) + "\n"
    };
    sandbox.write("in.jsonl", (0..60).map(line).collect::<String>());
    let job = |command: &[&'static str], output: &'static str, limit: &'static str, more: &[&'static str]| {
        let set = ["-i", "in.jsonl", "-o", output, "--quiet", "--engine=null", "--set=job.window_rows=16", limit];
        [command, &set, more].concat()
    };
    let (small, large) = ("--set=input.max_line_bytes=1024", "--set=input.max_line_bytes=100000");
    let (retry, parts) = (["retry", "--errors"], "--parts=7");
    sandbox.expect(&job(&["run"], "one.jsonl", small, &[]), 3);
    sandbox.expect(&job(&["run"], "out.jsonl", small, &[parts]), 3);
    for shard in ["1/2", "0/2"] {
        sandbox.expect(&job(&["run"], "cut.jsonl", small, &[parts, "--shard", shard]), 3);
    }
    sandbox.expect(&job(&["merge"], "cut.jsonl", small, &[parts]), 3);
    let whole = list(&sandbox, "out.jsonl");
    assert_eq!(list(&sandbox, "cut.jsonl"), whole, "merged parts are not those of the whole job");
    assert!(joined(&sandbox, "out.jsonl") == sandbox.read("one.jsonl"));
    // Merged before.
    sandbox.expect(&job(&["merge"], "cut.jsonl", small, &[parts]), 3);

    sandbox.expect(&job(&retry, "one.jsonl", large, &[]), 0);
    sandbox.expect(&job(&retry, "out.jsonl", large, &[parts]), 0);
    for shard in ["0/2", "1/2"] {
        sandbox.expect(&job(&retry, "cut.jsonl", large, &[parts, "--shard", shard]), 0);
    }
    sandbox.expect(&job(&["merge"], "cut.jsonl", large, &[parts]), 0);
    for output in ["out.jsonl", "cut.jsonl"] {
        let now = list(&sandbox, output);
        assert!(now.rows == 60 && now.parts.iter().all(|part| whole.parts.iter().all(|old| old.name != part.name)), "{now:?}");
        assert!(joined(&sandbox, output) == sandbox.read("one.jsonl"), "{output} differs from one file");
    }
}

#[test]
fn readers_find_the_old_parts_or_the_new_ones_whatever_write_is_the_last() {
    let storage = Storage::new().unwrap().with_part_bytes(100);
    let lines = |state: &str, n: usize| (0..n).map(|i| format!("{{\"{state}\":{i}}}")).collect::<Vec<_>>();
    let write = |store: &Arc<dyn ObjectStore>, state: &str, n: usize| -> anyhow::Result<()> {
        let at = Location::new(Arc::clone(store), "out.jsonl".into(), "out.jsonl");
        let mut sink = Sink::create_parts(&storage, &at, None, Parts::new(PartSize::Rows(3), "job", state))?;
        lines(state, n).iter().try_for_each(|line| sink.write(line))?;
        sink.publish().map(drop)
    };
    let read = |store: &Arc<dyn ObjectStore>| {
        let at = Location::new(Arc::clone(store), "out.jsonl".into(), "out.jsonl");
        let mut source = Records::open(&storage, &PartList::files(&storage, &at).unwrap(), None).unwrap();
        let mut found = Vec::new();
        while let Some(chunk) = source.next_chunk().unwrap() {
            found.extend(chunk.iter().map(|text| String::from_utf8(text.to_vec()).unwrap()));
        }
        (found, storage.list(&at).unwrap())
    };
    let old = || {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        write(&store, "old", 11).unwrap();
        store
    };
    let calm = old();
    let counting = DyingStore::immortal(calm.clone());
    write(&(Arc::new(counting.clone()) as Arc<dyn ObjectStore>), "new", 8).unwrap();
    let (wanted, n_writes) = (read(&calm), counting.n_writes());
    let (mut n_old, mut n_new) = (0, 0);
    // A store that tears puts has no atomic list.
    for death in Death::ALL.into_iter().filter(|death| *death != Death::Torn) {
        for n in 1..=n_writes {
            let store = old();
            let dying: Arc<dyn ObjectStore> = Arc::new(DyingStore::new(store.clone(), n, death));
            write(&dying, "new", 8).unwrap_err();
            let (found, _) = read(&store);
            let is_new = found == lines("new", 8);
            assert!(is_new || found == lines("old", 11), "write {n}, {death:?}: {found:?}");
            (n_old, n_new) = (n_old + usize::from(!is_new), n_new + usize::from(is_new));
            write(&store, "new", 8).unwrap();
            assert_eq!(read(&store), wanted, "write {n}, {death:?}");
        }
    }
    assert!(n_old > 8 && n_new > 8, "{n_old} times old, {n_new} times new");
}

#[test]
fn a_job_that_is_killed_while_it_writes_its_parts_goes_on() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows(4000));
    let args = |output: &'static str| job(&["run"], "in.jsonl", output, &["--parts=40"]);
    sandbox.expect(&args("calm.jsonl"), 0);
    let mut n_killed = 0;
    for n_parts in [1, 5, 20, 60, 99] {
        let mut child = sandbox.command(&args("out.jsonl")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let names = || fs::read_dir(sandbox.path("out.jsonl")).map_or(0, Iterator::count);
        while names() < n_parts && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        if child.wait().unwrap().code().is_none() {
            n_killed += 1;
            let is_listed = sandbox.path("out.jsonl/_SUCCESS").exists();
            assert!(!is_listed || names() > 100, "the list came before the last part");
        }
    }
    assert!(n_killed > 0, "nothing was killed");
    sandbox.expect(&args("out.jsonl"), 0);
    assert_eq!(list(&sandbox, "out.jsonl"), list(&sandbox, "calm.jsonl"));
    assert!(!sandbox.path("out.job").exists());
}
