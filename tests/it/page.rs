//! The page for people, in a real browser: Chromium without a window, driven through `ChromeDriver`. Where they are not
//! installed (Debian's packages chromium and chromium-driver), the tests say that they were skipped.

use crate::serving::{FOREVER, KEY, MODEL, Server};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use ureq::Agent;

/// Without a window, and without calling anybody's home.
const FLAGS: [&str; 8] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// A browser that is open until it is dropped.
struct Browser {
    driver: Child,
    agent: Agent,
    session: String,
    /// Removed with it.
    profile: TempDir,
}

impl Browser {
    /// Opens one; `None` where none is installed.
    #[expect(clippy::print_stdout, reason = "who runs the tests is told that some were skipped")]
    fn open() -> Option<Self> {
        let has_browser = ["chromium", "google-chrome"].iter().any(|name| Command::new(name).arg("--version").output().is_ok());
        let mut driver = Command::new("chromedriver");
        driver.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null());
        let Some(Ok(mut driver)) = has_browser.then(|| driver.spawn()) else {
            println!("skipped: no chromedriver and chromium here (Debian: chromium, chromium-driver)");
            return None;
        };
        let mut said = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = said
            .find_map(|line| Some(line.unwrap().split_once("successfully on port ")?.1.trim_end_matches('.').to_owned()))
            .unwrap();
        let agent = Agent::config_builder().http_status_as_error(false).timeout_global(Some(FOREVER)).build();
        let (profile, base) = (tempfile::tempdir().unwrap(), format!("http://127.0.0.1:{port}/session"));
        let mut browser = Self { driver, agent: agent.into(), session: base, profile };
        let mut flags: Vec<String> = FLAGS.iter().map(|&flag| flag.to_owned()).collect();
        flags.push(format!("--user-data-dir={}", browser.profile.path().display()));
        let wanted = json!({"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}});
        let made = browser.post("", json!({"capabilities": {"alwaysMatch": wanted}}));
        browser.session = format!("{}/{}", browser.session, made["sessionId"].as_str().unwrap());
        Some(browser)
    }

    #[track_caller]
    #[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
    fn post(&self, path: &str, body: Value) -> Value {
        let mut answer = self.agent.post(format!("{}{path}", self.session)).send(body.to_string()).unwrap();
        let value: Value = serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
        assert!(answer.status().is_success(), "{path} {body}: {value}");
        value["value"].clone()
    }

    fn visit(&self, url: &str) {
        self.post("/url", json!({"url": url}));
    }

    /// What a function's body returns, run in the page.
    #[track_caller]
    fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", json!({"script": script, "args": []}))
    }

    /// Waits until that holds in the page.
    #[track_caller]
    fn until(&self, condition: &str) {
        let start = Instant::now();
        while self.run(&format!("return Boolean({condition})")) != true {
            let page = self.run("return document.body.innerText");
            assert!(start.elapsed() < FOREVER, "{condition} never holds: {}", page.as_str().unwrap());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Types into what a selector names; of a field for files, their paths.
    fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.post(&format!("/element/{element}/value"), json!({"text": text}));
    }

    fn click(&self, selector: &str) {
        let element = self.element(selector);
        self.post(&format!("/element/{element}/click"), json!({}));
    }

    #[track_caller]
    fn element(&self, selector: &str) -> String {
        let found = self.post("/element", json!({"using": "css selector", "value": selector}));
        found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned()
    }

    /// Presses keys, wherever the focus is.
    fn press(&self, keys: &str) {
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()})))
            .collect();
        self.post("/actions", json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}));
    }

    /// As on a screen of that size, in that scheme.
    fn look(&self, scheme: &str, width: u32) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        for (command, params) in [
            ("Emulation.setEmulatedMedia", json!({"features": features})),
            (
                "Emulation.setDeviceMetricsOverride",
                json!({"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": false}),
            ),
        ] {
            self.post("/goog/cdp/execute", json!({"cmd": command, "params": params}));
        }
    }

    /// Leaves a picture of the page among the tests' files.
    fn picture(&self, name: &str) {
        let mut answer = self.agent.get(format!("{}/screenshot", self.session)).call().unwrap();
        let value: Value =
            serde_json::from_str(&answer.body_mut().with_config().limit(1 << 26).read_to_string().unwrap()).unwrap();
        let picture = STANDARD.decode(value["value"].as_str().unwrap()).unwrap();
        std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("page-{name}.png")), picture).unwrap();
    }

    /// What the browser complained of, but for requests that were refused.
    fn complaints(&self) -> Vec<String> {
        let log = self.post("/se/log", json!({"type": "browser"}));
        let messages = log.as_array().unwrap().iter().map(|entry| entry["message"].as_str().unwrap().to_owned());
        messages.filter(|message| !message.contains("Failed to load resource")).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        drop(self.agent.delete(&self.session).call());
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}

/// Texts whose contrast with what is behind them is less than 4.5 (3 where they are large), and things without a name.
const FAULTS: &str = r#"
const faults = [];
const parse = color => color.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = node => {
  for (let at = node; at; at = at.parentElement) {
    const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
    if (a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(node.tagName)) continue;
  const style = getComputedStyle(node), [a, b] = [light(parse(style.color)), light(behind(node))];
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  seen += 1;
  if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) faults.push(`contrast ${contrast}: ${node.outerHTML}`);
}
if (seen < 20) faults.push(`only ${seen} texts`);
for (const node of document.querySelectorAll("input, select, textarea")) if (!node.labels.length) faults.push(`no label: ${node.outerHTML}`);
for (const node of document.querySelectorAll("progress, meter")) if (!node.ariaLabel) faults.push(`no label: ${node.outerHTML}`);
for (const node of document.querySelectorAll("button")) if (!(node.ariaLabel || node.textContent.trim())) faults.push(`no text: ${node.outerHTML}`);
for (const node of document.querySelectorAll("table")) if (!node.caption) faults.push(`no caption: ${node.outerHTML}`);
for (const node of document.querySelectorAll("th")) if (!node.scope) faults.push(`no scope: ${node.outerHTML}`);
const ids = [...document.querySelectorAll("[id]")].map(node => node.id);
if (new Set(ids).size !== ids.length) faults.push(`an id stands there twice: ${ids}`);
if (document.documentElement.scrollWidth > innerWidth) faults.push(`wider than the screen: ${document.documentElement.scrollWidth}`);
return faults;
"#;

/// What would run if it were taken for HTML.
const HOSTILE: &str = "<img src=x onerror=document.title='owned'>";

/// Opens the page with our key.
fn unlock(browser: &Browser, server: &Server) {
    browser.visit(&format!("http://{}/", server.address));
    browser.until("!document.getElementById('ask-key').hidden");
    browser.type_into("#key", &format!("{KEY}\n"));
    browser.until("!document.getElementById('batches').hidden");
}

#[test]
fn a_page_that_asks_for_the_key_and_is_fit_for_everybody() {
    let Some(browser) = Browser::open() else { return };
    let config = "[prices]\nhour = 0.8\nasap = { input = 100.0, output = 400.0 }\n";
    let server = Server::with(config, &["--api-key", KEY]);
    assert_eq!(server.post("/v1/responses", json!({"model": MODEL, "input": "Hi", "max_output_tokens": 4})).status, 200);
    assert_eq!(server.post("/v1/responses", json!({"model": HOSTILE, "input": "Hi"})).status, 404);
    browser.visit(&format!("http://{}/", server.address));
    browser.until("document.activeElement.id === 'key'");
    assert_eq!(browser.run("return [...document.querySelectorAll('main > *')].filter(node => node.checkVisibility()).length"), 1);
    // By the keyboard alone: a wrong key, then the right one.
    browser.press("wrong\u{e007}");
    browser.until("document.getElementById('key-fault').textContent.includes('does not know')");
    assert_eq!(browser.run("return sessionStorage.getItem('valar-key')"), Value::Null);
    browser.picture("key");
    browser.press(&format!("{KEY}\u{e007}"));
    browser.until("!document.getElementById('errors').hidden");
    assert_eq!(
        browser.run("return [sessionStorage.getItem('valar-key'), localStorage.length, document.cookie]"),
        json!([KEY, 0, ""])
    );
    // Numbers of the engine, what went wrong, and what it has cost.
    browser.until("document.querySelector('#engines h2').textContent === 'SmolLM2-135M-Instruct'");
    browser.until("document.querySelector('#engines dd').textContent === '0'");
    browser.until("document.querySelector('#cost tfoot').textContent.includes('USD')");
    let shown = browser.run("return document.querySelector('#errors tbody tr').innerText");
    assert!(shown.as_str().unwrap().contains("model_not_found") && shown.as_str().unwrap().contains("<img src=x"), "{shown}");
    let queue = browser.run("return [...document.querySelectorAll('#engines tbody tr')].map(row => row.innerText.split(/\\s+/))");
    assert_eq!(queue, json!([["asap", "0", "0"], ["standard", "0", "0"]]));
    for (name, scheme, width) in
        [("light", "light", 1200), ("dark", "dark", 1200), ("narrow", "light", 380), ("narrow-dark", "dark", 380)]
    {
        browser.look(scheme, width);
        assert_eq!(browser.run(FAULTS), json!([]), "{name}");
        browser.picture(name);
    }
    // All that it took came from here; scripts of others do not run; nobody complained.
    let origins = browser.run("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)");
    assert!(origins.as_array().unwrap().iter().all(|origin| *origin == format!("http://{}", server.address)), "{origins}");
    assert_eq!(browser.run("return document.title"), "valar");
    assert_eq!(browser.complaints(), [""; 0]);
    let injected = "const node = document.createElement('b');
        try { node.innerHTML = '<i>x</i>'; return 'markup'; } catch {}
        const script = document.createElement('script');
        try { script.text = 'window.owned = 1'; document.body.append(script); } catch {}
        return window.owned ?? 'nothing'";
    assert_eq!(browser.run(injected), "nothing");
    // The key is forgotten.
    browser.click("#forget");
    browser.until("document.getElementById('state').textContent === 'locked'");
    assert_eq!(browser.run("return sessionStorage.length"), 0);
}

#[test]
fn a_file_is_run_from_the_page_and_nothing_in_it_becomes_html() {
    let Some(browser) = Browser::open() else { return };
    let server = Server::start();
    let line = |id: &str, content: &str, max_tokens: u64| {
        json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": {"model": MODEL,
               "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true}})
        .to_string()
    };
    let name = format!("{}.jsonl", HOSTILE.replace('/', ""));
    server.sandbox.write(&name, format!("{}\n{}\n", line(HOSTILE, HOSTILE, 8), line("<b>b", "Hi", 8)));
    unlock(&browser, &server);
    browser.type_into("#file", server.sandbox.path(&name).to_str().unwrap());
    browser.click("#run-button");
    browser.until("/ runs as batch_/.test(document.getElementById('run-said').textContent)");
    browser.until("document.querySelector('#batches tbody td')?.textContent === 'completed'");
    let row = browser.run("return document.querySelector('#batches tbody tr').innerText");
    assert!(row.as_str().unwrap().starts_with(&name) && row.as_str().unwrap().contains("2 of 2"), "{row}");
    browser.click("button[aria-label^=View]");
    browser.until("document.querySelectorAll('#results tbody tr').length === 2");
    let results = browser.run(
        "return [...document.querySelectorAll('#results tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))",
    );
    let batch = server.get("/v1/batches").json()["data"][0]["id"].as_str().unwrap().to_owned();
    for (row, id) in results.as_array().unwrap().iter().zip([HOSTILE, "<b>b"]) {
        assert_eq!((&row[0], &row[1]), (&json!(id), &json!("200")), "{results}");
        if !id.contains('=') {
            let line = server.get(&format!("/v1/batches/{batch}/%3Cb%3Eb")).json();
            assert_eq!(row[2], line["response"]["body"]["choices"][0]["message"]["content"]);
        }
    }
    browser.look("dark", 1000);
    assert_eq!(browser.run(FAULTS), json!([]));
    browser.picture("results");
    // The dialog is left by the keyboard.
    browser.press("\u{e00c}");
    browser.until("!document.getElementById('results').open");
    // A file that is refused says why.
    server.sandbox.write("bad.jsonl", "{\"custom_id\": \"<b>x\"}\n");
    browser.type_into("#file", server.sandbox.path("bad.jsonl").to_str().unwrap());
    browser.click("#run-button");
    browser.until("document.querySelector('#batches tbody tr').innerText.includes('failed')");
    browser.click("button[aria-label='View results of bad.jsonl']");
    browser.until("/line 1/.test(document.querySelector('#results tbody').textContent)");
    browser.press("\u{e00c}");
    // One that takes long is cancelled from the page, and the queue is seen.
    let long: Vec<String> = (0..400).map(|i| line(&format!("long-{i}"), "Tell me a story.", 6000)).collect();
    server.sandbox.write("long.jsonl", long.join("\n"));
    browser.type_into("#file", server.sandbox.path("long.jsonl").to_str().unwrap());
    browser.click("#run-button");
    browser.until("/^[1-9]/.test(document.querySelectorAll('#engines dd')[2].textContent)");
    browser.look("light", 1000);
    browser.picture("busy");
    browser.click("button[aria-label='Cancel long.jsonl']");
    browser.until("document.querySelector('#batches tbody tr').innerText.includes('cancelled')");
    // Nothing of all this became an element, or ran.
    assert_eq!(
        browser.run("return [document.images.length, document.querySelectorAll('b').length, document.title]"),
        json!([0, 0, "valar"])
    );
    assert_eq!(browser.complaints(), [""; 0]);
    server.wait_idle();
}

#[test]
fn the_page_shows_which_models_are_loaded() {
    let Some(browser) = Browser::open() else { return };
    let config = |id: &str, numerics: &str, memory: u32| {
        format!(
            "[[model]]\nid = {id:?}\nweights = {MODEL:?}\nnumerics = {numerics:?}\nmemory = \"{memory}MiB\"\nload = \"on_demand\"\n"
        )
    };
    let server = Server::with(&(config("org/first", "int8", 400) + &config("org/second", "bf16", 500)), &["--api-key", KEY]);
    unlock(&browser, &server);
    let rows =
        "[...document.querySelectorAll('#models tbody tr')].map(row => [...row.cells].slice(0, 2).map(cell => cell.textContent))";
    let is = |first: &str| format!("JSON.stringify({rows}) === '[[\"org/first\",\"{first}\"],[\"org/second\",\"unloaded\"]]'");
    browser.until(&is("unloaded"));
    assert_eq!(server.post("/v1/responses", json!({"model": "org/first", "input": "Hi", "max_output_tokens": 2})).status, 200);
    browser.until(&is("loaded"));
    let engine = &server.get("/v1/status").json()["engines"][0];
    let mib = engine["memory_bytes"].as_f64().unwrap() / f64::from(1 << 20);
    browser.until(&format!("document.querySelector('#models tbody tr').cells[2].textContent.startsWith('{}')", mib.round()));
    browser
        .until("/^[1-9][0-9.,]* MiB of 1,024 MiB for models on cpu in use$/.test(document.getElementById('memory').textContent)");
    for width in [1200, 380] {
        browser.look("light", width);
        assert_eq!(browser.run(FAULTS), json!([]));
        browser.picture(&format!("models-{width}"));
    }
    assert_eq!(browser.complaints(), [""; 0]);
}

#[test]
fn the_page_is_one_file_with_a_strict_policy() {
    let server = Server::start();
    let answer = server.send("GET", "/", &[], "");
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/html; charset=utf-8"));
    let policy = answer.header("content-security-policy");
    for part in ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "script-src 'sha256-"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    assert_eq!((answer.header("x-content-type-options"), answer.header("referrer-policy")), ("nosniff", "no-referrer"));
}

#[test]
fn a_key_sees_its_own_errors_and_an_admin_all() {
    let config = "[[key]]\nname = \"boss\"\nkey = \"boss\"\nadmin = true\n[[key]]\nkey = \"one\"\n[[key]]\nkey = \"two\"\n";
    let server = Server::with(config, &[]);
    for key in ["one", "two", "nobody"] {
        server.send("GET", &format!("/v1/files/of-{key}?secret=x"), &[("x-api-key", key)], "");
    }
    let errors = |key: &str| -> Vec<Value> {
        let status = server.send("GET", "/v1/status", &[("x-api-key", key)], "").json();
        status["errors"].as_array().unwrap().iter().map(|error| json!([error["status"], error["path"]])).collect()
    };
    assert_eq!(errors("one"), [json!([404, "/v1/files/of-one"])]);
    assert_eq!(
        errors("boss"),
        [json!([401, "/v1/files/of-nobody"]), json!([404, "/v1/files/of-two"]), json!([404, "/v1/files/of-one"])]
    );
    // No more are kept than are of use.
    for i in 0..120 {
        server.send("GET", &format!("/v1/files/{i}"), &[("x-api-key", "two")], "");
    }
    assert_eq!((errors("two").len(), errors("one").len()), (100, 0));
    assert_eq!(server.send("GET", "/v1/status", &[], "").status, 401);
}
