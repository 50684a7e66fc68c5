//! The server over TLS: with a certificate made here, and with files that are none.

use crate::common::Sandbox;
use crate::serving::{KEY, MODEL, Server, read_until};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::Arc;
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// A certificate of this machine and its key, as PEM.
fn certificate() -> (String, String) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    (cert.pem(), signing_key.serialize_pem())
}

/// A client that trusts that certificate.
fn agent(pem: &str) -> Agent {
    let roots = RootCerts::Specific(Arc::new(vec![Certificate::from_pem(pem.as_bytes()).unwrap()]));
    let tls = TlsConfig::builder().root_certs(roots).build();
    Agent::config_builder().tls_config(tls).http_status_as_error(false).build().into()
}

#[test]
fn calls_are_encrypted() {
    let ((cert, key), other) = (certificate(), certificate());
    let sandbox = Sandbox::new();
    sandbox.write("cert.pem", &cert);
    sandbox.write("key.pem", key);
    let (cert_path, key_path) = (sandbox.path("cert.pem"), sandbox.path("key.pem"));
    let config = format!("[server]\nheader_timeout_s = 3\ntls_cert = {cert_path:?}\n");
    let flags = ["--api-key", KEY, "--tls-key", key_path.to_str().unwrap()];
    let server = Server::with(&config, &flags);
    let url = format!("https://{}", server.address);
    let client = agent(&cert);
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 0, "ignore_eos": true});
    let ask = |stream: bool| {
        let mut body = body.clone();
        body["stream"] = stream.into();
        let call = client.post(format!("{url}/v1/chat/completions")).header("x-api-key", KEY);
        call.send(body.to_string()).unwrap().body_mut().read_to_string().unwrap()
    };
    let whole: Value = serde_json::from_str(&ask(false)).unwrap();
    let streamed = ask(true);
    let chunks = streamed.split("\n\n").filter_map(|event| event.strip_prefix("data: {")).map(|rest| format!("{{{rest}"));
    let pieces = chunks.map(|chunk| serde_json::from_str::<Value>(&chunk).unwrap());
    let text: String = pieces.filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    // Whoever trusts another certificate is told so; whoever does not encrypt, or says nothing, gets nothing.
    assert!(agent(&other.0).get(format!("{url}/health")).call().is_err());
    for said in [&b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"[..], b"", b"\x16\x03\x01"] {
        let mut answer = Vec::new();
        drop(server.raw(said).read_to_end(&mut answer));
        assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(client.get(format!("{url}/health")).call().unwrap().status(), 200);
}

#[test]
fn a_client_that_breaks_off_frees_what_it_held_also_under_tls() {
    let (cert, key) = certificate();
    let sandbox = Sandbox::new();
    sandbox.write("cert.pem", &cert);
    sandbox.write("key.pem", key);
    let (cert_path, key_path) = (sandbox.path("cert.pem"), sandbox.path("key.pem"));
    let flags = ["--tls-cert", cert_path.to_str().unwrap(), "--tls-key", key_path.to_str().unwrap()];
    let server = Server::with("", &flags);
    let client = agent(&cert);
    let url = format!("https://{}", server.address);
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let mut call = client.post(format!("{url}/v1/chat/completions")).send(body.to_string()).unwrap();
    let mut first = [0; 64];
    assert!(call.body_mut().as_reader().read(&mut first).unwrap() > 0);
    drop(call);
    let status = || -> Value {
        serde_json::from_str(&client.get(format!("{url}/v1/status")).call().unwrap().body_mut().read_to_string().unwrap())
            .unwrap()
    };
    while status()["engines"][0]["windows"][0]["open"] != 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn files_that_are_no_certificate_or_key_are_named() {
    let sandbox = Sandbox::new();
    let (cert, key) = certificate();
    let (_, other) = certificate();
    let (cut, rest) = cert.split_at(cert.len() / 2);
    let garbled = cert.replacen("MII", "AII", 1);
    for (name, content) in [
        ("cert.pem", &*cert),
        ("key.pem", &key),
        ("other.pem", &other),
        ("cut.pem", cut),
        ("rest.pem", rest),
        ("garbled.pem", &garbled),
        ("empty.pem", ""),
    ] {
        sandbox.write(name, content);
    }
    for (cert, key, named, said) in [
        ("missing.pem", "key.pem", "missing.pem", "No such file"),
        ("cert.pem", "missing.pem", "missing.pem", "No such file"),
        ("empty.pem", "key.pem", "empty.pem", "holds no certificate"),
        ("key.pem", "key.pem", "key.pem", "holds no certificate"),
        ("cert.pem", "cert.pem", "cert.pem", "holds no private key"),
        ("cut.pem", "key.pem", "cut.pem", "no certificate in PEM form"),
        ("rest.pem", "key.pem", "rest.pem", "no certificate in PEM form"),
        ("garbled.pem", "key.pem", "garbled.pem", ""),
        ("cert.pem", "other.pem", "other.pem", "is not the key of the certificate in cert.pem"),
    ] {
        let error = sandbox.expect(&["serve", "--port", "0", "--data", "data", "--tls-cert", cert, "--tls-key", key], 1);
        let last = error.lines().last().unwrap();
        assert!(last.contains(named) && last.contains(said), "{cert}, {key}: {error}");
        assert!(!error.contains("listening"), "{error}");
    }
    let error = sandbox.expect(&["serve", "--tls-cert", "cert.pem"], 2);
    assert!(error.contains("server.tls_cert: needs server.tls_key"), "{error}");
    let error = sandbox.expect(&["serve", "--tls-key", "key.pem"], 2);
    assert!(error.contains("server.tls_key: needs server.tls_cert"), "{error}");
}

#[test]
fn without_tls_a_handshake_is_a_bad_request() {
    let server = Server::start();
    let mut hello = server.raw(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03");
    hello.write_all(&[7; 200]).unwrap();
    read_until(&mut hello, "400 Bad Request");
    assert_eq!(server.get("/health").status, 200);
}
