//! Jobs on other servers than moto's: Azurite (Azure Blob Storage) and s3rver (S3 that ignores conditions and much else), from
//! the npm registry. Slow and in need of Node, so only on request: `cargo test --test it -- --ignored other_stores`.

use crate::common::Sandbox;
use crate::s3::expect;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PACKAGES: [&str; 2] = ["azurite@3.35.0", "s3rver@3.7.1"];

/// What every Azurite knows: the account of its documentation.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

struct Running {
    port: u16,
    child: Child,
}

impl Running {
    fn start(program: &str, folder: &Path, args: impl Fn(u16) -> Vec<String>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(programs().join(program));
        command.args(args(port)).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_mins(1);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "{program} does not start");
            sleep(Duration::from_millis(50));
        }
        Self { port, child }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Where the servers are, installed on first use.
fn programs() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("npm");
    let programs = folder.join("node_modules/.bin");
    if !PACKAGES.iter().all(|package| programs.join(package.split('@').next().unwrap()).exists()) {
        std::fs::create_dir_all(&folder).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]).arg(&folder).args(PACKAGES);
        assert!(npm.status().expect("npm is needed").success());
    }
    programs
}

const N_ROWS: usize = 8000;

/// Rows whose results take several parts of an upload.
fn rows() -> String {
    let pad = "words ".repeat(300);
    let lines: Vec<String> = (0..N_ROWS).map(|i| format!("{{\"id\":{i},\"q\":\"Row {i}?\",\"pad\":\"{pad}\"}}\n")).collect();
    lines.concat()
}

fn job<'a>(input: &'a str, output: &'a str) -> Vec<&'a str> {
    let settings = ["--set", "prompt.text={{ q }}", "--set", "sampling.max_tokens=2", "--set", "job.seed=3"];
    ["run", "--quiet", "--engine", "null", "-i", input, "-o", output].into_iter().chain(settings).collect()
}

/// A job whose input is the results of one.
fn job_after<'a>(input: &'a str, output: &'a str) -> Vec<&'a str> {
    job(input, output).into_iter().chain(["--set", "output.prefix=second_"]).collect()
}

fn unguarded<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &["--unguarded"]].concat()
}

/// Blobs in memory, and an empty container called `jobs`.
struct Azure(Running);

impl Azure {
    fn start(sandbox: &Sandbox) -> Self {
        let args = |port: u16| {
            let args = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort"];
            args.into_iter().map(str::to_owned).chain([port.to_string()]).collect()
        };
        let server = Self(Running::start("azurite-blob", &sandbox.path("."), args));
        let url = format!("{}?restype=container", server.url(""));
        let (date, signature) = signed("PUT", "jobs\nrestype:container");
        let put = ureq::put(url).header("x-ms-date", date).header("x-ms-version", VERSION);
        put.header("authorization", signature).send_empty().unwrap();
        server
    }

    fn url(&self, blob: &str) -> String {
        format!("http://127.0.0.1:{}/{ACCOUNT}/jobs{}{blob}", self.0.port, if blob.is_empty() { "" } else { "/" })
    }

    fn get(&self, blob: &str) -> Vec<u8> {
        let (date, signature) = signed("GET", &format!("jobs/{blob}"));
        let get = ureq::get(self.url(blob)).header("x-ms-date", date).header("x-ms-version", VERSION);
        let mut answer = get.header("authorization", signature).call().unwrap();
        answer.body_mut().with_config().limit(1 << 30).read_to_vec().unwrap()
    }

    fn command(&self, sandbox: &Sandbox, args: &[&str]) -> Command {
        let mut command = sandbox.command(args);
        command
            .env("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
            .env("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
            .env("AZURE_STORAGE_ENDPOINT", format!("http://127.0.0.1:{}/{ACCOUNT}", self.0.port))
            .env("AZURE_ALLOW_HTTP", "true")
            .env("NO_PROXY", "127.0.0.1");
        command
    }
}

const VERSION: &str = "2021-08-06";

/// Date and authorization of a request without a body ("Authorize with Shared Key" of Azure Storage's REST documentation).
fn signed(method: &str, resource: &str) -> (String, String) {
    let date = chrono::Utc::now().format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let text = format!("{method}{}x-ms-date:{date}\nx-ms-version:{VERSION}\n/{ACCOUNT}/{ACCOUNT}/{resource}", "\n".repeat(12));
    let mut mac = Hmac::<Sha256>::new_from_slice(&STANDARD.decode(ACCOUNT_KEY).unwrap()).unwrap();
    mac.update(text.as_bytes());
    (date, format!("SharedKey {ACCOUNT}:{}", STANDARD.encode(mac.finalize().into_bytes())))
}

#[test]
#[ignore = "installs servers with npm"]
fn azure_blobs_hold_a_job() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows());
    let (calm, killed) = (Azure::start(&sandbox), Azure::start(&sandbox));
    let args = job("in.jsonl", "az://jobs/a/out.jsonl");
    let said = expect(calm.command(&sandbox, &args), 1);
    assert!(said.contains("can't be broken off") && said.contains("--unguarded"), "{said}");
    expect(calm.command(&sandbox, &unguarded(&args)), 0);
    sandbox.expect(&job("in.jsonl", "a/out.jsonl"), 0);
    assert!(calm.get("a/out.jsonl") == std::fs::read(sandbox.path("a/out.jsonl")).unwrap(), "not what a local job writes");

    // What a killed run has committed is not computed again, and the outputs are those of the undisturbed one.
    for after_ms in [700, 900, 1100] {
        let mut child = killed.command(&sandbox, &unguarded(&args)).spawn().unwrap();
        sleep(Duration::from_millis(after_ms));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    expect(killed.command(&sandbox, &unguarded(&args)), 0);
    assert!(killed.get("a/out.jsonl") == calm.get("a/out.jsonl"), "the outputs differ");
    let status = killed.command(&sandbox, &["status", "az://jobs/a/out.jsonl"]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains(&format!("{N_ROWS} of {N_ROWS} rows")), "{status}");

    // The store as an input, by name and by pattern.
    for (input, output) in [("az://jobs/a/out.jsonl", "b.jsonl"), ("az://jobs/a/*.jsonl", "c.jsonl")] {
        expect(calm.command(&sandbox, &job_after(input, output)), 0);
    }
    let questions: Vec<_> = sandbox.rows("b.jsonl").iter().map(|row| row["q"].clone()).collect();
    assert_eq!(questions, sandbox.rows("in.jsonl").iter().map(|row| row["q"].clone()).collect::<Vec<_>>());
}

#[test]
#[ignore = "installs servers with npm"]
fn a_server_that_ignores_conditions_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", rows());
    let folder = sandbox.path("objects").to_string_lossy().into_owned();
    let server = Running::start("s3rver", &sandbox.path("."), |port| {
        let port = port.to_string();
        ["--silent", "-d", &folder, "-p", &port, "--configure-bucket", "jobs"].map(str::to_owned).to_vec()
    });
    let command = |args: &[&str]| {
        let mut command = crate::s3::command(&sandbox, server.port, args);
        command.env("AWS_ACCESS_KEY_ID", "S3RVER").env("AWS_SECRET_ACCESS_KEY", "S3RVER").env_remove("AWS_SESSION_TOKEN");
        command
    };
    let args = job("in.jsonl", "s3://jobs/out.jsonl");
    let said = expect(command(&args), 1);
    assert!(said.contains("does not honour conditional writes") && said.contains("--unguarded"), "{said}");
    expect(command(&unguarded(&args)), 0);
    expect(command(&job_after("s3://jobs/out.jsonl", "back.jsonl")), 0);
    assert_eq!(sandbox.rows("back.jsonl").len(), N_ROWS);
}
