//! Models called `org/name`, from a hub on this machine: a small HTTP server that each test starts and that breaks off,
//! refuses and lies as told.

use crate::common::golden;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use valar::hf::HfFolder;
use valar::hub::remote::Remote;
use valar::hub::{self, LocalModel};
use valar::model::ModelFile;

const COMMIT: &str = "0123456789abcdef";

/// What a server does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Each answer with weights ends after so many bytes.
    BreaksOffAfter(usize),
    /// It says that files are a byte longer, or shorter, than they are.
    SaysLonger,
    SaysShorter,
    /// It says that the weights have another SHA-256.
    SaysOtherHash,
    /// It sends whole files only.
    NoRanges,
    /// It answers everything with this status.
    Status(u16),
    /// Weights are elsewhere, at this port.
    RedirectsTo(u16),
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    fault: Fault,
    /// The requests so far: path, `Range`, `Authorization`.
    seen: Vec<[String; 3]>,
}

/// A hub with one repository, `acme/tiny`.
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves a model of `tests/golden/models`.
    fn start(model: &str, fault: Fault) -> Self {
        let files = fs::read_dir(golden("models").join(model)).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
        });
        let state = Arc::new(Mutex::new(State { files: files.collect(), fault, seen: Vec::new() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || listener.incoming().for_each(|stream| answer(stream.unwrap(), &shared)));
        Self { port, state }
    }

    fn remote(&self) -> Remote {
        Remote { endpoint: format!("http://127.0.0.1:{}", self.port), token: Some("secret".to_owned()) }
    }

    fn set(&self, fault: Fault) {
        self.state.lock().unwrap().fault = fault;
    }

    /// The requests since the last call.
    fn seen(&self) -> Vec<[String; 3]> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    fn resolve(&self, cache: &Path) -> Result<LocalModel, String> {
        hub::resolve("acme/tiny", cache, Some(&self.remote()), &mut |_| {}).map_err(|e| format!("{e:#}"))
    }
}

/// Reads one request, answers it and closes the connection.
fn answer(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let [mut range, mut token] = [String::new(), String::new()];
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap_or(0) == 0 || header == "\r\n" {
            break;
        }
        match header.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => value.clone_into(&mut range),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => value.clone_into(&mut token),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.seen.push([path.clone(), range.clone(), token]);
    let (head, body) = response(&state, &path, &range);
    drop(state);
    let mut stream = stream;
    // A client that has seen enough closes the connection.
    let _gone = stream
        .write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes())
        .and_then(|()| stream.write_all(&body));
}

/// The status line with headers, and the body.
fn response(state: &State, path: &str, range: &str) -> (String, Vec<u8>) {
    if let Fault::Status(status) = state.fault {
        return (format!("{status} No\r\nContent-Length: 0"), Vec::new());
    }
    if path == "/api/models/acme/tiny/revision/main?blobs=true" {
        let body = listing(state).to_string().into_bytes();
        return (format!("200 OK\r\nContent-Length: {}", body.len()), body);
    }
    let name = path.strip_prefix(&format!("/acme/tiny/resolve/{COMMIT}/"));
    let Some((name, content)) = name.and_then(|name| state.files.get_key_value(name)) else {
        return ("404 Not Found\r\nContent-Length: 0".to_owned(), Vec::new());
    };
    let is_weights = name.ends_with(".safetensors");
    if let Fault::RedirectsTo(port) = state.fault
        && is_weights
    {
        return (format!("302 Found\r\nLocation: http://localhost:{port}{path}\r\nContent-Length: 0"), Vec::new());
    }
    let start = range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')).map_or(0, |r| r.parse().unwrap());
    let start = if state.fault == Fault::NoRanges { 0 } else { start };
    let rest = &content[start..];
    let sent = match state.fault {
        Fault::BreaksOffAfter(n) if is_weights => &rest[..n.min(rest.len())],
        _ => rest,
    };
    let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
    (format!("{status}\r\nContent-Length: {}", rest.len()), sent.to_vec())
}

fn listing(state: &State) -> serde_json::Value {
    let files = state.files.iter().map(|(name, content)| {
        let size = match state.fault {
            Fault::SaysLonger => content.len() + 1,
            Fault::SaysShorter => content.len() - 1,
            _ => content.len(),
        };
        let mut file = json!({"rfilename": name, "size": size});
        if name.ends_with(".safetensors") {
            let hash = Sha256::digest(content).iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
            let hash = if state.fault == Fault::SaysOtherHash { "0".repeat(64) } else { hash };
            file["lfs"] = json!({"sha256": hash, "size": size});
        }
        file
    });
    json!({"sha": COMMIT, "siblings": files.collect::<Vec<_>>()})
}

/// The folder holds the model that the server has.
#[track_caller]
fn check(local: &LocalModel, model: &str) {
    assert_eq!((local.name.as_str(), local.is_called("tiny")), ("acme/tiny", true));
    assert!(local.path.ends_with(COMMIT), "{}", local.path.display());
    let original = HfFolder::open(&golden("models").join(model)).unwrap();
    let fetched = HfFolder::open(&local.path).unwrap();
    assert_eq!(fetched.spec().unwrap(), original.spec().unwrap());
    assert!(fetched.content() == original.content());
}

#[test]
fn a_model_is_fetched_once() {
    for model in ["qwen2", "mistral"] {
        let (server, cache) = (Server::start(model, Fault::None), tempfile::tempdir().unwrap());
        check(&server.resolve(cache.path()).unwrap(), model);
        let seen = server.seen();
        assert!(seen.iter().all(|[_, range, token]| range.is_empty() && token == "Bearer secret"), "{seen:?}");
        assert!(!seen.iter().any(|[path, ..]| path.contains("expected.json")), "{seen:?}");
        check(&server.resolve(cache.path()).unwrap(), model);
        assert!(server.seen().is_empty(), "what is in the cache needs no hub");
        server.set(Fault::Status(500));
        check(&server.resolve(cache.path()).unwrap(), model);
    }
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let (server, cache) = (Server::start("qwen2", Fault::BreaksOffAfter(30_000)), tempfile::tempdir().unwrap());
    check(&server.resolve(cache.path()).unwrap(), "qwen2");
    let ranges: Vec<_> =
        server.seen().into_iter().filter(|[path, ..]| path.ends_with(".safetensors")).map(|[_, r, _]| r).collect();
    assert_eq!(ranges, ["", "bytes=30000-", "bytes=60000-"]);
}

#[test]
fn a_download_that_failed_is_taken_up_by_the_next() {
    let (server, cache) = (Server::start("qwen2", Fault::BreaksOffAfter(10_000)), tempfile::tempdir().unwrap());
    let error = server.resolve(cache.path()).unwrap_err();
    assert!(["acme/tiny", "model.safetensors", "3 attempts"].iter().all(|part| error.contains(part)), "{error}");
    server.seen();
    for fault in [Fault::None, Fault::NoRanges] {
        let again = tempfile::tempdir().unwrap();
        copy_folder(cache.path(), again.path());
        server.set(fault);
        check(&server.resolve(again.path()).unwrap(), "qwen2");
        let seen = server.seen();
        let weights = seen.iter().find(|[path, ..]| path.ends_with(".safetensors")).unwrap();
        assert_eq!(weights[1], "bytes=30000-");
        assert!(!seen.iter().any(|[path, ..]| path.ends_with("config.json")), "a file that is there is not fetched again");
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_folder(&path, &target) } else { fs::copy(&path, &target).map(drop).unwrap() }
    }
}

#[test]
fn what_the_hub_refuses_is_said_clearly() {
    for (status, fragment) in [(404, "not found"), (401, "HF_TOKEN"), (403, "HF_TOKEN"), (503, "the hub answers 503")] {
        let (server, cache) = (Server::start("qwen2", Fault::Status(status)), tempfile::tempdir().unwrap());
        let error = server.resolve(cache.path()).unwrap_err();
        assert!(error.contains("acme/tiny") && error.contains("127.0.0.1") && error.contains(fragment), "{error}");
    }
    let cache = tempfile::tempdir().unwrap();
    // Nobody listens there; a port that was free a moment ago may be another test's by now.
    let remote = Remote { endpoint: "http://127.0.0.1:1".to_owned(), token: None };
    let error = format!("{:#}", hub::resolve("acme/tiny", cache.path(), Some(&remote), &mut |_| {}).unwrap_err());
    assert!(error.contains("does not answer"), "{error}");
    let error = format!("{:#}", hub::resolve("acme/tiny", cache.path(), None, &mut |_| {}).unwrap_err());
    assert!(error.contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn what_is_not_what_the_hub_says_is_not_kept() {
    for (fault, fragment) in
        [(Fault::SaysLonger, "ended after"), (Fault::SaysShorter, "the hub says"), (Fault::SaysOtherHash, "SHA-256")]
    {
        let (server, cache) = (Server::start("qwen2", fault), tempfile::tempdir().unwrap());
        let error = server.resolve(cache.path()).unwrap_err();
        assert!(error.contains(fragment), "{error}");
        let folder = cache.path().join("hub/acme--tiny");
        assert!(!folder.join(COMMIT).exists() && !folder.join("main.ref").exists());
    }
    // What was refused does not stand in the way of the right file.
    let (server, cache) = (Server::start("qwen2", Fault::SaysOtherHash), tempfile::tempdir().unwrap());
    server.resolve(cache.path()).unwrap_err();
    server.set(Fault::None);
    check(&server.resolve(cache.path()).unwrap(), "qwen2");
}

#[test]
fn the_token_goes_to_the_hub_only() {
    let elsewhere = Server::start("qwen2", Fault::None);
    let (server, cache) = (Server::start("qwen2", Fault::RedirectsTo(elsewhere.port)), tempfile::tempdir().unwrap());
    check(&server.resolve(cache.path()).unwrap(), "qwen2");
    let seen = elsewhere.seen();
    assert!(!seen.is_empty() && seen.iter().all(|[.., token]| token.is_empty()), "{seen:?}");
}

#[test]
fn an_update_asks_the_hub_again() {
    let (server, cache) = (Server::start("qwen2", Fault::None), tempfile::tempdir().unwrap());
    let path = hub::update("acme/tiny", cache.path(), Some(&server.remote()), &mut |_| {}).unwrap();
    server.seen();
    assert_eq!(hub::update("acme/tiny", cache.path(), Some(&server.remote()), &mut |_| {}).unwrap(), path);
    assert_eq!(server.seen().len(), 1, "the list of files, and no file");
}
