//! What several test modules need: the model, golden files, and the program itself in an empty folder.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;
use valar::{config, hub};

/// The default model's file; fetched on first use, like any user's.
pub(crate) fn model_path() -> PathBuf {
    let cache = config::cache_folder().expect("a home to keep models in");
    hub::pull(&hub::CATALOG[0], &cache, &mut |_| {}).expect("the default model can be fetched")
}

/// A file under `tests/golden`.
pub(crate) fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The program, run in a folder of its own.
pub(crate) struct Sandbox {
    folder: TempDir,
}

impl Sandbox {
    /// An empty folder; the model is in the cache already.
    pub(crate) fn new() -> Self {
        model_path();
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("the folder takes files");
    }

    /// Reads a file as text.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Reads a JSONL file.
    pub(crate) fn rows(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).expect("every line is JSON")).collect()
    }

    /// The program with arguments, not started yet. A fixed date makes runs comparable byte for byte.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_valar"));
        command.args(args).current_dir(self.folder.path()).env("SOURCE_DATE_EPOCH", "1700000000");
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the program starts")
    }

    /// Runs the program and checks its exit code; what it said on standard error.
    #[track_caller]
    pub(crate) fn expect(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "valar {}: {said}", args.join(" "));
        said
    }
}

/// A Batch line for a chat of one message.
#[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
pub(crate) fn chat_line(custom_id: &str, content: &str, extra: Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}).to_string()
}

/// The next number of a sequence that depends on its seed alone (Steele, Lea, Flood 2014).
pub(crate) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A folder `tiny-llama` in the sandbox: a model of random weights that starts at once, with a tokenizer of lower-case
/// letters; the folder, and the chat template.
pub(crate) fn tiny_llama(sandbox: &Sandbox) -> (PathBuf, &'static str) {
    let folder = sandbox.path("tiny-llama");
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("models/llama3-rope").join(name), folder.join(name)).unwrap();
    }
    let letters: Vec<String> = "\u{120}abcdefghijklmnopqrstuvwxyz.,?!0123456789".chars().map(String::from).collect();
    let tokens: Vec<String> = ["<pad>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(letters).collect();
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(i, c)| (c.clone(), json!(i))).collect();
    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0, "<pad>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}";
    fs::write(
        folder.join("tokenizer_config.json"),
        json!({"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}).to_string(),
    )
    .unwrap();
    (folder, template)
}
