//! A server of our own, for tests that speak to it: the real program on a free port, and a small HTTP client.

use crate::common::Sandbox;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::http::{HeaderMap, Method, Request};

/// The key that the server wants.
pub(crate) const KEY: &str = "a key of ours";
/// The default model's name.
pub(crate) const MODEL: &str = "SmolLM2-135M-Instruct";

/// Longer than anything that a test waits for may take, on any machine: only what would never come is ended by it.
pub(crate) const FOREVER: Duration = Duration::from_mins(15);

/// A server that runs until it is dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
    pub(crate) sandbox: Sandbox,
    /// What it has said on standard error, lines that are whole.
    pub(crate) said: Said,
    args: Vec<String>,
    /// Variables of its environment.
    env: Vec<(String, String)>,
    agent: Agent,
}

/// What a server has said, with those that ran before it in its sandbox.
pub(crate) type Said = Arc<Mutex<String>>;

/// Starts the program; where it listens.
fn spawn(sandbox: &Sandbox, args: &[String], env: &[(String, String)], words: &Said) -> (Child, String) {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut child = sandbox.command(&args).envs(env.iter().cloned()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut before = String::new();
    let address = loop {
        let mut line = String::new();
        assert!(said.read_line(&mut line).unwrap() > 0, "the server ended before it listened: {before}");
        words.lock().unwrap().push_str(&line);
        if let Some((_, (_, address))) =
            line.split_once("listening on ").and_then(|(said, rest)| Some((said, rest.split_once("://")?)))
        {
            // It may stand in a JSON object.
            break address.trim().trim_end_matches(['"', '}']).to_owned();
        }
        before.push_str(&line);
    };
    // Whatever else it says must not stop it.
    let words = Arc::clone(words);
    std::thread::spawn(move || {
        let mut line = String::new();
        while said.read_line(&mut line).is_ok_and(|n_bytes| n_bytes > 0) {
            words.lock().unwrap().push_str(&line);
            line.clear();
        }
    });
    (child, address)
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The events of a stream: their names (empty where they have none) and data.
    pub(crate) fn events(&self) -> Vec<(String, String)> {
        let blocks = self.text.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
        let event = |block: &str| {
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
            (field("event: "), field("data: "))
        };
        blocks.map(event).collect()
    }

    /// The data of a stream's events, up to `[DONE]`, which must be there.
    #[track_caller]
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().map(|(_, data)| data).as_deref(), Some("[DONE]"), "{}", self.text);
        events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect()
    }
}

impl Server {
    /// The default model, and a key.
    pub(crate) fn start() -> Self {
        Self::with("", &["--api-key", KEY])
    }

    /// With a configuration file and flags.
    pub(crate) fn with(config: &str, flags: &[&str]) -> Self {
        Self::with_files(config, flags, |_| {})
    }

    /// The same, in a folder that something is put into before.
    pub(crate) fn with_files(config: &str, flags: &[&str], put: impl FnOnce(&Sandbox)) -> Self {
        Self::with_env(config, flags, &[], put)
    }

    /// The same, with variables in its environment.
    pub(crate) fn with_env(config: &str, flags: &[&str], env: &[(&str, &str)], put: impl FnOnce(&Sandbox)) -> Self {
        let sandbox = Sandbox::new();
        put(&sandbox);
        sandbox.write("valar.toml", config);
        let args = ["serve", "--config", "valar.toml", "--port", "0", "--data", "data", "--memory", "1GiB"];
        let args: Vec<String> = args.iter().chain(flags).map(|&arg| arg.to_owned()).collect();
        let env: Vec<_> = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let said = Said::default();
        let (child, address) = spawn(&sandbox, &args, &env, &said);
        // A connection for each request: of one that is used again, the server may think at that moment that nobody needs it.
        let agent = Agent::config_builder().http_status_as_error(false).timeout_global(Some(FOREVER)).max_idle_connections(0);
        Self { child, address, sandbox, said, args, env, agent: agent.build().into() }
    }

    /// Kills it, if it still runs, and starts it again on what it left.
    pub(crate) fn restart(&mut self) {
        drop(self.child.kill());
        self.child.wait().unwrap();
        (self.child, self.address) = spawn(&self.sandbox, &self.args, &self.env, &self.said);
    }

    /// A request with our key.
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[("authorization", &format!("Bearer {KEY}"))], "")
    }

    /// A request with our key and a JSON body.
    #[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
    pub(crate) fn post(&self, path: &str, body: Value) -> Answer {
        self.send("POST", path, &[("authorization", &format!("Bearer {KEY}"))], body.to_string())
    }

    /// Any request.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Answer {
        let url = format!("http://{}{path}", self.address);
        let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap()).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = body.into();
        let response =
            if body.is_empty() { self.agent.run(request.body(()).unwrap()) } else { self.agent.run(request.body(body).unwrap()) };
        let mut response = response.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.body_mut().with_config().limit(1 << 30).read_to_string().unwrap() }
    }

    /// Sends bytes as they are, and gives the connection.
    pub(crate) fn raw(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(FOREVER)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// A request on a connection of its own, whose answer is not read yet.
    pub(crate) fn open(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {}\r\n\r\n", body.len());
        self.raw((head + &body).as_bytes())
    }

    /// A number that `/metrics` shows.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let metrics = self.get("/metrics").text;
        let lines = metrics.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        lines.map(|(_, value)| value.parse::<u64>().unwrap()).sum()
    }

    /// Waits until nothing runs or waits.
    #[track_caller]
    pub(crate) fn wait_idle(&self) {
        let start = Instant::now();
        let names = ["valar_running{", "valar_waiting{", "valar_queued_calls{", "valar_open_calls{"];
        while names.iter().any(|name| self.metric(name) > 0) {
            assert!(start.elapsed() < FOREVER, "work is left behind: {}", self.get("/metrics").text);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Reads until the text is there.
pub(crate) fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "{text:?} never came: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..n]);
        let so_far = String::from_utf8_lossy(&seen);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
