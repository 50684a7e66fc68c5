//! Journals that are not what was written: of the last segment the rows are computed again, anywhere else it is an error.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use valar::journal::{Manifest, finalise};
use valar::storage::Storage;

use crate::common::{Sandbox, chat_line};
use crate::resume::{Life, N_ROWS, Places, contents, five_segments, outcome, resume, run, uninterrupted};

/// What the journal says of damage, when it is opened or when something is added to it.
fn found_damage(storage: &Storage, places: &Places) -> String {
    let mut journal = match resume(storage, places) {
        Err(error) => return format!("{error:#}"),
        Ok(journal) => journal,
    };
    for row in 10..N_ROWS {
        journal.append(&outcome(row)).unwrap();
        // Segments are verified on a thread of their own, which takes longer on a machine that has other work.
        std::thread::sleep(Duration::from_millis(20 * (row - 9)));
        if let Err(error) = journal.commit() {
            return format!("{error:#}");
        }
    }
    panic!("nothing was found");
}

#[test]
fn damage_in_the_middle_is_an_error_that_names_the_segment() {
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let (storage, _, places) = five_segments();
        let at = places.dir.child("seg-00001-00000003.jsonl").unwrap();
        let mut content = storage.get(&at).unwrap().unwrap().to_vec();
        change(&mut content);
        storage.put(&at, content.into()).unwrap();
        (storage, places, at)
    };
    let in_line = |content: &mut Vec<u8>| content[20] ^= 1;
    let in_index = |content: &mut Vec<u8>| {
        let index = content.windows(9).rposition(|text| text == b"{\"index\":").unwrap() + 20;
        content[index] ^= 1;
    };
    for (is_in_line, wanted) in [(true, "its checksum is wrong"), (false, "its index is damaged")] {
        let (storage, places, _) = if is_in_line { damaged(&in_line) } else { damaged(&in_index) };
        let finished = resume(&storage, &places).and_then(|mut journal| finalise(&mut journal, &places.outputs, 10));
        let error = format!("{:#}", finished.unwrap_err());
        assert!(error.contains("seg-00001-00000003.jsonl"), "{error}");
        let error = found_damage(&storage, &places);
        assert!(error.contains(&format!("seg-00001-00000003.jsonl: {wanted}")), "{error}");
    }
    let (storage, places, at) = damaged(&|_| {});
    storage.delete(&at).unwrap();
    let error = found_damage(&storage, &places);
    assert!(error.contains("x.job/seg-00001-00000003.jsonl is gone"), "{error}");
}

#[test]
fn a_tail_cut_off_or_corrupted_anywhere_costs_its_own_rows() {
    let (storage, store, places) = five_segments();
    let at = places.dir.child("seg-00001-00000005.jsonl").unwrap();
    let whole = storage.get(&at).unwrap().unwrap();
    let lease = places.dir.child("lease.json").unwrap();
    let flipped = |i: usize| {
        let mut content = whole.to_vec();
        content[i] ^= 1 << (i % 8);
        Bytes::from(content)
    };
    let n = whole.len();
    let damaged = (0..n).map(|end| whole.slice(..end)).chain((0..n).map(flipped));
    for (i, content) in damaged.enumerate() {
        // As a run that was killed leaves it: each finds the same lease.
        let before = storage.get(&lease).unwrap().unwrap();
        storage.put(&at, content).unwrap();
        let journal = resume(&storage, &places).unwrap_or_else(|e| panic!("damage {i}: {e:#}"));
        assert_eq!((journal.done_rows().len(), journal.warnings.len()), (8, 1), "damage {i}");
        assert!(journal.warnings[0].contains("seg-00001-00000005.jsonl is damaged"), "{:?}", journal.warnings);
        drop(journal);
        storage.put(&lease, before).unwrap();
    }
    // What was lost is computed again.
    let mut life = Life::default();
    run(&storage, &places, 1, &mut life).unwrap();
    assert!(life.computed.contains(&8) && life.computed.contains(&9) && !life.computed.contains(&7), "{:?}", life.computed);
    assert_eq!(contents(&storage, &store), uninterrupted(&storage, "x.jsonl").0);
}

/// What can't be read is named, and what is of another version is not called damaged.
#[test]
fn state_that_can_not_be_read_is_named_and_kept() {
    let sandbox = Sandbox::new();
    let lines: Vec<String> = (0..40).map(|i| chat_line(&format!("row-{i}"), &format!("Say {i}."), json!({}))).collect();
    sandbox.write("in.jsonl", lines.join("\n"));
    let run = ["run", "-q", "--engine=null", "-i", "in.jsonl", "-o", "out.jsonl", "--set=job.window_rows=8"];
    let anew = ["run", "-q", "--engine=null", "-i", "in.jsonl", "-o", "anew.jsonl", "--set=job.window_rows=8"];
    sandbox.expect(&anew, 0);
    sandbox.expect(&[&run[..], &["--max-tokens", "60"]].concat(), 6);
    let manifest = "out.job/manifest-00001.json";
    let content = sandbox.read(manifest);
    let form = Manifest::FORMAT_VERSION;
    let with_form = |n: u32| content.replace(&format!("\"format_version\": {form}"), &format!("\"format_version\": {n}"));
    for (changed, wanted) in [
        (content[..content.len() / 2].to_owned(), "is damaged"),
        (with_form(form - 1), "was written by an older valar"),
        (with_form(form + 1), "was written by a newer valar"),
    ] {
        sandbox.write(manifest, changed);
        for args in [&run[..], &["status", "out.jsonl"]] {
            let said = sandbox.expect(args, 1);
            assert!(said.contains(&format!("{manifest} {wanted}")) && said.contains("--restart"), "{said}");
        }
    }
    sandbox.write(manifest, &content);
    // Without the lease nobody knows what counts: it is not guessed, and nothing is thrown away.
    let lease = sandbox.read("out.job/lease.json");
    std::fs::remove_file(sandbox.path("out.job/lease.json")).unwrap();
    let said = sandbox.expect(&run, 1);
    assert!(said.contains("out.job has manifest-00001.json, but no lease.json"), "{said}");
    sandbox.write("out.job/lease.json", lease);
    assert!(sandbox.run(&["status", "out.jsonl"]).status.success());
    sandbox.expect(&run, 0);
    assert!(sandbox.read("out.jsonl") == sandbox.read("anew.jsonl"), "rows were lost");
    // Unless it may be.
    for name in ["out.jsonl", "out.errors.jsonl", "out.report.json"] {
        std::fs::remove_file(sandbox.path(name)).unwrap();
    }
    sandbox.expect(&[&run[..], &["--max-tokens", "60"]].concat(), 6);
    std::fs::remove_file(sandbox.path("out.job/lease.json")).unwrap();
    sandbox.expect(&[&run[..], &["--restart"]].concat(), 0);
    assert!(sandbox.read("out.jsonl") == sandbox.read("anew.jsonl") && !sandbox.path("out.job").exists());
}
