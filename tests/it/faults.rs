//! An S3 server on this machine (moto's, from the Python registry) and a proxy before it that fails as told: each request
//! has a connection of its own, so that a fault has one victim.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

const MOTO: &str = "moto[server,s3]==5.2.5";

/// A running server, ended when dropped. It keeps objects in memory and checks no signatures.
pub(crate) struct S3 {
    pub(crate) port: u16,
    child: Child,
}

impl S3 {
    /// With an empty bucket called `bucket`.
    pub(crate) fn start() -> Self {
        // On a port that it finds itself: one that was free a moment ago may be another's by now.
        let mut command = Command::new(python());
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let port = loop {
            let mut line = String::new();
            assert!(said.read_line(&mut line).unwrap() > 0, "moto's server does not start");
            if let Some((_, port)) = line.split_once("Running on http://127.0.0.1:") {
                break port.trim().parse().unwrap();
            }
        };
        // Whatever else it says goes nowhere, and must not stop it.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let server = Self { port, child };
        server.put("", b"");
        // The tests read without signing.
        let policy = r#"{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*",
            "Action": "s3:GetObject", "Resource": "arn:aws:s3:::bucket/*"}]}"#;
        ureq::put(format!("{}?policy", server.url(""))).send(policy).unwrap();
        server
    }

    /// The URL of an object as the server has it; of the bucket, if the key is empty.
    pub(crate) fn url(&self, key: &str) -> String {
        format!("http://127.0.0.1:{}/bucket{}{key}", self.port, if key.is_empty() { "" } else { "/" })
    }

    pub(crate) fn put(&self, key: &str, content: &[u8]) {
        // So that it may be read as from any web server, too.
        ureq::put(self.url(key)).header("x-amz-acl", "public-read").send(content).unwrap();
    }

    pub(crate) fn get(&self, key: &str) -> Vec<u8> {
        let mut answer = ureq::get(self.url(key)).call().unwrap_or_else(|e| panic!("{key}: {e}"));
        answer.body_mut().with_config().limit(1 << 30).read_to_vec().unwrap()
    }

    pub(crate) fn delete(&self, key: &str) {
        ureq::delete(self.url(key)).call().unwrap();
    }

    /// Ids of the uploads that were begun and neither completed nor aborted.
    pub(crate) fn uploads(&self) -> Vec<String> {
        let text = ureq::get(format!("{}?uploads", self.url(""))).call().unwrap().body_mut().read_to_string().unwrap();
        text.split("<UploadId>").skip(1).map(|rest| rest.split("</UploadId>").next().unwrap().to_owned()).collect()
    }

    /// All keys.
    pub(crate) fn keys(&self) -> Vec<String> {
        let url = format!("{}?list-type=2", self.url(""));
        let text = ureq::get(url).call().unwrap().body_mut().read_to_string().unwrap();
        text.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap().to_owned()).collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A Python with moto, made on first use in the target folder.
fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = root.join("moto-5.2.5");
    let lock = File::create(root.join("moto.lock")).unwrap();
    lock.lock().unwrap();
    if !folder.join("complete").exists() {
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
        run(Command::new(folder.join("bin/python")).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            MOTO,
        ]));
        File::create(folder.join("complete")).unwrap();
    }
    folder.join("bin/python")
}

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Answered 503 and not passed on.
    Busy,
    /// Answered 403, with what servers echo of a request.
    Forbidden,
    /// Answered 404, as a store does that is told twice to complete an upload.
    Gone,
    /// The answer's body ends half-way.
    CutBody,
    /// The answer's body comes in small pieces with pauses.
    SlowBody,
    /// Done, but the answer never comes.
    LostAnswer,
    /// Nothing happens, and the connection stays open until the client gives up.
    Hang,
    /// Done when the gate is opened, if the client is there then.
    Held(Gate),
    /// Done without its conditions, as by a store that does not know them.
    Unconditional,
    /// Answered 400 and not passed on, as by a store that takes no empty parts of uploads.
    Empty,
}

/// Holds requests until it is opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate(&'static AtomicBool);

impl Gate {
    /// A closed one.
    pub(crate) fn closed() -> Self {
        Self(Box::leak(Box::default()))
    }

    pub(crate) fn open(self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn is_open(self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl PartialEq for Gate {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Gate {}

/// A request as the proxy sees it: `PUT`, path with query, and the body's bytes.
pub(crate) struct Seen<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) n_body: usize,
}

/// Decides on each request's fault.
type Plan = Box<dyn FnMut(&Seen<'_>) -> Fault + Send>;

/// Starts a proxy before a port; the port of the proxy, and the faults that happened.
pub(crate) fn proxy(upstream: u16, plan: Plan) -> (u16, Arc<Mutex<Vec<Fault>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (plan, happened) = (Arc::new(Mutex::new(plan)), Arc::new(Mutex::new(Vec::new())));
    let log = Arc::clone(&happened);
    // Ends with the test's process.
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (plan, log) = (Arc::clone(&plan), Arc::clone(&log));
            // A client that is killed or gives up cuts its connection: nothing to tell.
            std::thread::spawn(move || pass(client.unwrap(), upstream, &plan, &log).ok());
        }
    });
    (port, happened)
}

/// Whether a client that waits for its answer has closed the connection.
fn is_gone(client: &TcpStream) -> std::io::Result<bool> {
    client.set_nonblocking(true)?;
    let peeked = client.peek(&mut [0]);
    client.set_nonblocking(false)?;
    Ok(peeked.map_or_else(|e| e.kind() != ErrorKind::WouldBlock, |n| n == 0))
}

fn pass(mut client: TcpStream, upstream: u16, plan: &Mutex<Plan>, log: &Mutex<Vec<Fault>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut head, mut n_body) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(length) = lower.strip_prefix("content-length:") {
            n_body = length.trim().parse().unwrap();
        }
        if line == "\r\n" {
            head.push_str("Connection: close\r\n\r\n");
            break;
        }
        if !lower.starts_with("connection:") {
            head.push_str(&line);
        }
    }
    let mut body = vec![0; n_body];
    reader.read_exact(&mut body)?;
    let mut words = head.split(' ');
    let seen = Seen { method: words.next().unwrap_or_default(), path: words.next().unwrap_or_default(), n_body };
    let fault = plan.lock().unwrap()(&seen);
    log.lock().unwrap().push(fault);
    while fault == Fault::Hang || matches!(fault, Fault::Held(gate) if !gate.is_open()) {
        if is_gone(&client)? {
            return Ok(());
        }
        sleep(Duration::from_millis(10));
    }
    let refusal = match fault {
        Fault::Busy => Some(("503 Slow Down", "<Error><Code>SlowDown</Code></Error>".to_owned())),
        Fault::Gone => Some(("404 Not Found", "<Error><Code>NoSuchUpload</Code></Error>".to_owned())),
        Fault::Empty => Some(("400 Bad Request", "<Error><Code>InvalidRequest</Code></Error>".to_owned())),
        Fault::Forbidden => Some(("403 Forbidden", format!("<Error><Code>AccessDenied</Code><Echo>{head}</Echo></Error>"))),
        _ => None,
    };
    if let Some((status, text)) = refusal {
        let length = text.len();
        return client
            .write_all(format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}").as_bytes());
    }
    let head = match fault {
        Fault::Unconditional => head.split_inclusive('\n').filter(|line| !line.to_ascii_lowercase().starts_with("if-")).collect(),
        _ => head,
    };
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    server.write_all(head.as_bytes())?;
    server.write_all(&body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let body_at = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    match fault {
        Fault::LostAnswer => {}
        Fault::CutBody => client.write_all(&answer[..body_at + (answer.len() - body_at) / 2])?,
        Fault::SlowBody => {
            for piece in answer.chunks((answer.len() / 8).max(1)) {
                client.write_all(piece)?;
                sleep(Duration::from_millis(100));
            }
        }
        _ => client.write_all(&answer)?,
    }
    Ok(())
}
