//! What valar reads from outside, each parser as a function of some bytes: it may refuse them, with an error, and must not
//! panic, hang or ask for memory without bound. The fuzzers call these with what they make up, and the tests with the
//! corpus that the fuzzers left.

use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use object_store::memory::InMemory;
use valar::format::openai::{parse_batch_line, parse_object};
use valar::format::{Limits, LineSplitter, Source, anthropic, inspect, schema_of};
use valar::gguf::Gguf;
use valar::hf::HfFolder;
use valar::journal::{IfRunning, JobDir, Journal, Manifest, Noted, Record, Terms};
use valar::model::{ModelFile as _, ModelSpec};
use valar::pipeline::spec;
use valar::request::Params;
use valar::storage::{Location, Storage};
use valar::text::hf::HfFiles;
use valar::text::template::{ChatTemplate, RowTemplate};
use valar::text::tokenizer::Tokenizer;

/// Takes anything.
pub type Parser = fn(&[u8]);

/// All of them, by name.
pub const PARSERS: [(&str, Parser); 11] = [
    ("request_row", request_row),
    ("lines", lines),
    ("pipeline", pipeline),
    ("template", template),
    ("gguf", gguf),
    ("hf_folder", hf_folder),
    ("safetensors", safetensors),
    ("journal", journal),
    ("rows_parquet", rows_parquet),
    ("rows_gz", rows_gz),
    ("rows_zst", rows_zst),
];

/// One for all: it has a thread.
static STORAGE: LazyLock<Storage> = LazyLock::new(|| Storage::new().expect("a storage thread"));

/// A line of a request file, and the body of a live call.
pub fn request_row(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _refused = parse_batch_line(7, text, &Params::default());
    if let Ok(body) = parse_object(text) {
        let _refused = anthropic::parse_messages(&body, &Params::default(), true);
    }
}

/// Lines, cut at a limit, whatever pieces they come in.
pub fn lines(data: &[u8]) {
    let Some((&size, data)) = data.split_first() else { return };
    let in_pieces = |size: usize| {
        let mut splitter = LineSplitter::new(16);
        let mut found = Vec::new();
        for piece in data.chunks(size) {
            let mut piece = piece.to_vec().into();
            found.extend(std::iter::from_fn(|| splitter.next_line(&mut piece)));
        }
        found.extend(splitter.last_line());
        found
    };
    assert_eq!(in_pieces(1 + usize::from(size)), in_pieces(usize::MAX));
}

/// A pipeline file.
pub fn pipeline(data: &[u8]) {
    let file = temporary(data);
    let _refused = spec::load(Some(file.path()), &[]);
    if let Ok(text) = std::str::from_utf8(data) {
        let _refused = spec::parse_override(text);
    }
}

/// A row template; its output is bounded by the fuel that templates have.
pub fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (source, row) = text.split_once("\n%%\n").unwrap_or((text, "{\"text\": \"a\", \"n\": 3}"));
    if let (Ok(template), Ok(row)) = (RowTemplate::compile(source), parse_object(row)) {
        let _refused = template.render(&row);
    }
}

/// A GGUF file: its header, and what a model, a tokenizer and a template are made of.
pub fn gguf(data: &[u8]) {
    let file = temporary(data);
    let Ok(gguf) = Gguf::open(file.path()) else { return };
    for name in gguf.tensor_names() {
        assert!(gguf.tensor(name).expect("it is listed").bytes.len() <= data.len());
    }
    let _refused = ModelSpec::from_gguf(&gguf);
    let _refused = ChatTemplate::from_gguf(&gguf);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
        let ids = tokenizer.encode("a b\u{e9} <s>\n");
        let _text = tokenizer.decode(&ids);
    }
}

/// A Hugging Face directory: `config.json`, `tokenizer.json`, `tokenizer_config.json` and `model.safetensors`, with `%%` on a
/// line between them.
pub fn hf_folder(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut rest = data;
    let mut parts = ["config.json", "tokenizer.json", "tokenizer_config.json"].map(|name| {
        let end = rest.windows(4).position(|window| window == b"\n%%\n").unwrap_or(rest.len());
        let part = &rest[..end];
        rest = rest.get(end + 4..).unwrap_or_default();
        (name, part)
    });
    if parts[2].1.is_empty() {
        parts[2].1 = b"{}";
    }
    for (name, part) in parts.into_iter().chain([("model.safetensors", rest)]) {
        write(folder.path(), name, part);
    }
    look_into(folder.path());
    let [Ok(tokenizer), Ok(tokenizer_config)] = [parts[1].1, parts[2].1].map(std::str::from_utf8) else { return };
    let files = HfFiles {
        tokenizer,
        tokenizer_config: Some(tokenizer_config),
        chat_template: None,
        generation_config: None,
        n_vocab: 300,
    };
    let _refused = ChatTemplate::from_hf(&files);
    if let Ok(tokenizer) = Tokenizer::from_hf(&files) {
        let ids = tokenizer.encode("a b\u{e9} <s>\n");
        let _text = tokenizer.decode(&ids);
    }
}

/// The tensors of a small llama.
pub fn safetensors(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), "config.json", include_bytes!("../golden/models/llama-linear-rope/config.json"));
    write(folder.path(), "model.safetensors", data);
    look_into(folder.path());
}

fn look_into(folder: &Path) {
    let Ok(folder) = HfFolder::open(folder) else { return };
    let _refused = folder.spec();
    for name in folder.tensor_names() {
        let tensor = folder.find_tensor(name).expect("it is listed");
        assert!(tensor.bytes.len() <= 2 << 20);
    }
}

/// A job's state: a journal of two rows, one of whose files is another one. Its first byte says which.
pub fn journal(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let terms = Terms { if_running: IfRunning::TakeOver, lease: Duration::from_mins(1), unguarded: false, restart: false };
    let results = Location::new(Arc::new(InMemory::new()), "x.jsonl".into(), "x.jsonl");
    let at = results.with_extension("job").expect("a name");
    let manifest = Manifest {
        format_version: Manifest::FORMAT_VERSION,
        valar_version: String::new(),
        job_fingerprint: "job".to_owned(),
        created_unix_s: 0,
        job_seed: 0,
        model_fingerprint: String::new(),
        pipeline: String::new(),
        inputs: Vec::new(),
        rows: 0..u64::MAX,
        replaces: None,
        retries: None,
        versions: Vec::new(),
    };
    let claim = || JobDir::claim(&STORAGE, &at, &terms);
    let mut journal = Journal::create(claim().expect("nobody else is there"), &manifest).expect("a new journal");
    for row in [0, 1] {
        let line = "{}".into();
        let record =
            Record { row, ok: row == 0, prompt_tokens: 1, completion_tokens: 2, cached_tokens: 0, key: None, id: None, line };
        journal.append(&record).expect("memory takes it");
        journal.commit().expect("memory takes it");
    }
    drop(journal);
    let (name, content) = match which % 4 {
        0 => ("lease.json", data.to_vec()),
        1 => ("manifest-00001.json", data.to_vec()),
        2 => ("seg-00001-00000002.jsonl", data.to_vec()),
        // Checkpoints, or an index of as many rows as its first byte says, that nobody has written so, under a seal that fits.
        _ => {
            let is_index = which & 4 != 0;
            let (rows, data) = if is_index { data.split_first().map_or((0, data), |(&n, rest)| (n, rest)) } else { (0, data) };
            let (lines, index) = if is_index { (&[][..], data) } else { (data, &[][..]) };
            let index = [b"{\"index\":\"", index, b"\"}\n"].concat();
            let before = [lines, &index].concat();
            let hash = blake3::Hasher::new().update(&before).update(b"0 None").finalize().to_hex();
            let (n_checkpoints, index_hash) = (lines.split(|&byte| byte == b'\n').count() - 1, blake3::hash(&index).to_hex());
            let seal = format!(
                "{{\"rows\":{rows},\"checkpoints\":{n_checkpoints},\"failed\":0,\"job\":\"job\",\"index\":{},\
                 \"index_blake3\":\"{index_hash}\",\"blake3\":\"{hash}\"}}\n",
                index.len()
            );
            ("seg-00001-00000001.jsonl", [&before, seal.as_bytes()].concat())
        }
    };
    STORAGE.put(&at.child(name).expect("a name"), content.into()).expect("memory takes it");
    let Ok(dir) = claim() else { return };
    let Ok(Some(manifest)) = dir.manifest() else { return };
    let mut seen = 0;
    let each = &mut |_: &Noted, _| {
        seen += 1;
        Ok(())
    };
    if let Ok(journal) = Journal::resume(dir, &manifest, each) {
        assert_eq!(journal.done_rows().len(), seen);
    }
}

/// A Parquet file of rows.
pub fn rows_parquet(data: &[u8]) {
    rows("x.parquet", data);
}

/// A gzip file of rows.
pub fn rows_gz(data: &[u8]) {
    rows("x.jsonl.gz", data);
}

/// A Zstandard file of rows.
pub fn rows_zst(data: &[u8]) {
    rows("x.jsonl.zst", data);
}

fn rows(name: &str, data: &[u8]) {
    let at = Location::new(Arc::new(InMemory::new()), name.into(), name);
    STORAGE.put(&at, data.to_vec().into()).expect("memory takes it");
    let told = inspect(&STORAGE, &at).map(|inspection| inspection.n_rows);
    if name.ends_with("parquet") {
        let _refused = schema_of(&STORAGE, &at);
    }
    let limits = Limits { max_row_bytes: 1 << 16 };
    let Ok(mut source) = Source::open(&STORAGE, std::slice::from_ref(&at), limits) else { return };
    let mut n_rows = 0;
    // A small file may hold a great many rows: what comes first is enough.
    while n_rows < 100_000 {
        match source.next_chunk(1000, 1 << 20) {
            Ok(Some(rows)) => {
                n_rows += rows.len() as u64;
                for row in &rows {
                    drop(row.text().map(str::len));
                }
            }
            Ok(None) => {
                assert_eq!(told.ok(), Some(n_rows), "counted otherwise than read");
                break;
            }
            Err(_) => break,
        }
    }
}

fn temporary(data: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("a temporary file takes it");
    file
}

fn write(folder: &Path, name: &str, content: &[u8]) {
    std::fs::write(folder.join(name), content).expect("a temporary folder takes it");
}
